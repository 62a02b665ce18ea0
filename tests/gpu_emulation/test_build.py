"""The build cache: keyed by content, safe when processes build at once."""

import multiprocessing
import sys

import pytest

from tests.gpu_emulation import build


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_built_once_for_each_content(cache, tmp_path):
    source, built = tmp_path / "a.txt", []

    def make(folder):
        built.append(folder)
        (folder / "out").write_text(source.read_text())

    source.write_text("one")
    first = build._cached("thing", [source, "flag"], make)
    assert build._cached("thing", [source, "flag"], make) == first and len(built) == 1
    assert (first / "out").read_text() == "one"
    source.write_text("two")
    second = build._cached("thing", [source, "flag"], make)
    third = build._cached("thing", [source, "other flag"], make)
    assert len({first, second, third}) == 3 and len(built) == 3


def test_failed_build_leaves_nothing(cache):
    def fail(folder):
        (folder / "half").write_text("")
        raise build.BuildError("no")

    with pytest.raises(build.BuildError):
        build._cached("thing", [], fail)
    assert build._cached("thing", [], lambda folder: (folder / "whole").write_text("")).is_dir()
    assert [path.name for folder in cache.iterdir() if folder.is_dir() for path in folder.iterdir()] == [
        "whole"
    ]


def _build_slowly(cache, log):
    import time

    build.CACHE = cache

    def make(folder):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (folder / "out").write_text("done")

    assert (build._cached("thing", ["key"], make) / "out").read_text() == "done"


def test_processes_do_not_build_twice(cache, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [context.Process(target=_build_slowly, args=(cache, log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "built\n"


def test_included_headers_count(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n  #  include "c.h"\n#include <vector>\n')
    (tmp_path / "b.cuh").write_text('#include "d.h"\n')
    (tmp_path / "inner" / "c.h").write_text("")
    (tmp_path / "inner" / "d.h").write_text('#include "missing.h"\n')
    found = build._with_includes([tmp_path / "a.cu"], [tmp_path / "inner"])
    assert sorted(path.name for path in found) == ["a.cu", "b.cuh", "c.h", "d.h"]


def test_compiler_errors_are_shown(nvcc, cache, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { undeclared(); }\n")
    with pytest.raises(build.BuildError, match="undeclared"):
        build.ptx_text(source, 80)


def test_missing_nvcc(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.nvcc_path() is None
