"""Whether other work had the cores while something was measured."""

import dataclasses
import os
import pathlib
import time

BUSY = 0.1  # of the time in which the threads wanted to run, they waited for a core


@dataclasses.dataclass(frozen=True)
class Contention:
    """waiting: Of the time in which this process's threads could run, the part that they waited for a core, or None
    where the system does not tell. load: Of the machine over the last minute, in cores, or None. own_load: Of this
    process."""

    waiting: float | None
    load: float | None
    own_load: float
    cores: int

    @property
    def is_busy(self):
        if self.waiting is not None:
            return self.waiting > BUSY
        return self.load is not None and self.load - self.own_load > 0.5

    def describe(self):
        """One sentence for the reader of the times, "" on a quiet machine."""
        if not self.is_busy:
            return ""
        reasons = []
        if self.waiting is not None:
            reasons.append(
                f"threads of this process waited for a core {100 * self.waiting:.0f} % of their time"
            )
        if self.load is not None:
            reasons.append(f"load average {self.load:.1f} on {self.cores} cores")
        return f"the machine was busy ({', '.join(reasons)}): measure times again on a quiet one"


class Watch:
    """From its making on; `read()` gives the `Contention` since then."""

    def __init__(self):
        self._start = self._clocks()

    def read(self):
        wall, running, waiting = (
            None if now is None or then is None else now - then
            for now, then in zip(self._clocks(), self._start, strict=True)
        )
        known = waiting is not None and running + waiting > 0
        return Contention(
            waiting=max(0.0, waiting / (running + waiting)) if known else None,
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            own_load=running / wall if wall > 0 else 0.0,
            cores=os.cpu_count() or 1,
        )

    @staticmethod
    def _clocks():
        return time.perf_counter(), time.process_time(), _seconds_waited()


def _seconds_waited():
    """Seconds that the threads of this process have spent waiting for a core, or None; see schedstat in proc(5)."""
    total, known = 0, False
    for path in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
            known = True
        except (OSError, ValueError, IndexError):  # the thread has ended
            continue
    return total / 1e9 if known else None
