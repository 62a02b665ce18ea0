import os
import time

import pytest

from ssl_kernels.recipes import contention
from ssl_kernels.recipes.contention import Contention, Watch


@pytest.mark.parametrize(
    "waited, load, busy",
    [
        (0.0, 2.0, False),
        (0.3, 2.0, False),
        (3.0, 2.0, True),
        (None, 2.0, False),
        (None, 5.0, True),
        (None, None, False),
    ],
)
def test_busy_is_a_process_that_waits_for_cores(monkeypatch, waited, load, busy):
    """Without the system's word on waiting, a load well over the process's own."""
    clocks = iter([(10.0, 1.0, waited and 7.0), (14.0, 8.0, waited and 7.0 + waited)])
    if waited == 0:
        clocks = iter([(10.0, 1.0, 7.0), (14.0, 8.0, 7.0)])
    monkeypatch.setattr(Watch, "_clocks", staticmethod(lambda: next(clocks)))
    if load is None:
        monkeypatch.delattr(os, "getloadavg")
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    found = Watch().read()
    assert found.waiting == (None if waited is None else pytest.approx(waited / (7 + waited)))
    assert found.own_load == pytest.approx(7 / 4)
    assert found.is_busy == busy and bool(found.describe()) == busy


def test_what_the_reader_is_told():
    busy = Contention(waiting=0.345, load=5.25, own_load=1.0, cores=2)
    assert busy.describe() == (
        "the machine was busy (threads of this process waited for a core 34 % of their time, load average 5.2 on"
        " 2 cores): measure times again on a quiet one"
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not tell")
def test_waiting_is_read_from_the_system():
    threads = len(os.listdir("/proc/self/task"))
    assert (
        0 <= contention._seconds_waited() <= threads * time.monotonic()
    )  # which counts from the start of the machine
    watch = Watch()
    sum(range(10**5))
    assert 0 <= watch.read().waiting <= 1


def test_waiting_is_summed_over_the_threads(tmp_path, monkeypatch):
    """The second number of each thread's file, in nanoseconds; of a thread that has ended there is none."""
    for thread, text in (("1", "5 2000000000 3"), ("2", "1 500000000 1"), ("3", "")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text)
    monkeypatch.setattr(contention.pathlib, "Path", lambda _: tmp_path)
    assert contention._seconds_waited() == 2.5
