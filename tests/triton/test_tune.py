"""The tuner of the tile tables, with an emulated card or made-up times in the place of the card it is for."""

import copy
import json
import math
import runpy

import pytest
import torch

from ssl_kernels.triton import tiles, tune
from ssl_kernels.triton.tiles import Tile
from ssl_kernels.triton.tune import Place

SLOW, FAST = Tile(32, 16, 16, 4, 2, 1), Tile(64, 64, 16, 4, 2, 1)
IMPOSSIBLE = Tile(48, 16, 16, 4, 2, 1)  # no power of two


@pytest.fixture
def table():
    """A copy of the tables, which the tuner may change: they are put back."""
    kept = copy.deepcopy(tiles.TILES)
    yield copy.deepcopy(kept)
    tiles.TILES.clear()
    tiles.TILES.update(kept)


class Clock:
    """Stands for the module time; only what adds to `now` takes any."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tune, "time", clock)
    return clock


@pytest.fixture
def card(monkeypatch):
    """An RTX 4090 by its name."""
    for name, value in (
        ("is_available", True), ("get_device_capability", (8, 9)), ("get_device_name", "a card"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def tune_here(tmp_path, *arguments):
    """What a run writes as the new table, and the lines of its record."""
    output, record = tmp_path / "tiles.py", tmp_path / "record.jsonl"
    tune.main([*arguments, "--output", str(output), "--record", str(record)])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return runpy.run_path(str(output))["TILES"] if output.exists() else None, lines


@pytest.mark.parametrize(
    "kernel, largest_d", [("forward", 16), pytest.param("coefficient", None, marks=pytest.mark.slow)]
)
def test_the_fastest_tile_is_taken(kernel, largest_d, gpu, table, monkeypatch):
    """Timed by emulated instructions, of which small tiles need more; one candidate does not compile."""
    if not gpu.emulated:
        pytest.skip("times are those of the emulator")
    if gpu.arch != 80:
        pytest.skip("one architecture is enough")
    monkeypatch.setattr(tune, "ROWS", 128)
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "candidates", lambda *_: [IMPOSSIBLE, FAST])
    place, reasons = Place("half", kernel, largest_d, largest_d or 512), []
    with gpu.triton() as launches:

        def do_bench(function):
            before = len(launches)
            function()
            return sum(launch.counters.instructions for launch in launches[before:])

        def timed(place, tile):
            ms, reason = tune.time_tile(gpu.arch, place, tile)
            reasons.append(reason)
            return math.inf if ms is None else ms

        monkeypatch.setattr("triton.testing.do_bench", do_bench)
        tile, time, before, tried = tune.best_tile(place, SLOW, timed, math.inf)
    assert tile == FAST and 0 < time < before and tried == 3
    assert reasons[0] is reasons[2] is None and reasons[1]
    assert tiles.TILES == table  # as it was
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_what_does_not_fit_the_memory_is_passed_over(gpu, table, monkeypatch):
    monkeypatch.setattr(tune, "ROWS", 32)
    monkeypatch.setattr(tune, "DEVICE", gpu.device)

    def out_of_memory(call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")

    monkeypatch.setattr("triton.testing.do_bench", out_of_memory)
    with gpu.triton():
        found = tune.time_tile(gpu.arch if gpu.emulated else 80, Place("half", "forward", 16, 16), FAST)
    assert found == (None, "out of memory")
    assert tiles.TILES == table


def test_an_error_that_is_no_tiles_fault_ends_the_run(gpu, table, monkeypatch):
    monkeypatch.setattr(tune, "ROWS", 32)
    monkeypatch.setattr(tune, "DEVICE", gpu.device)

    def fail(call):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("triton.testing.do_bench", fail)
    with gpu.triton(), pytest.raises(RuntimeError, match="illegal memory access"):
        tune.time_tile(gpu.arch if gpu.emulated else 80, Place("half", "forward", 16, 16), FAST)
    assert tiles.TILES == table


def test_what_is_written_is_read_back(table, card, monkeypatch, tmp_path, capsys):
    tuned = Tile(16, 16, 16, 4, 2, 1)
    monkeypatch.setattr(tune, "best_tile", lambda *_: (tuned, 1.0, 2.0, 3))
    output = tmp_path / "tiles.py"
    tune.main(["--dtype", "half", "--output", str(output), "--record", str(tmp_path / "record")])
    assert "entries of architecture 86" in capsys.readouterr().out
    found = runpy.run_path(str(output))
    for arch, dtype_classes in table.items():
        for dtype_class, kernels in dtype_classes.items():
            for kernel, entries in kernels.items():
                changed = (arch, dtype_class) == (86, "half")
                expected = [(d, tuple(tuned) if changed else tile) for d, tile in entries]
                assert found["TILES"][arch][dtype_class][kernel] == expected
    assert found["__doc__"] == tiles.__doc__ and found["Tile"]._fields == Tile._fields


def test_kernels_and_widths_choose_the_entries(table):
    entries = table[86]
    everything = tune.places(entries)
    assert len(everything) == sum(len(places) for kernels in entries.values() for places in kernels.values())
    assert {place.kernel for place in everything} == set(tune.KERNELS)
    assert Place("half", "forward", 128, 128) in everything
    assert Place("half", "forward", None, tune.WIDTH_OF_ANY) in everything
    assert tune.places(entries, ["half"], ["forward"], [100, 65, 768]) == [
        Place("half", "forward", 128, 100),
        Place("half", "forward", None, 768),
    ]
    assert tune.places(entries, ["half"], ["backward"], [129]) == []


def test_a_run_goes_on_where_it_was_cut_off(table, card, clock, monkeypatch, tmp_path, capsys):
    """Ten minutes for two entries at a minute per tile; then what the first run timed is not timed again."""
    asked = []

    def timer(arch, place, tile):
        asked.append((place, tile))
        clock.now += 60
        if tile.num_warps == 4:
            return None, "out of memory"
        return 1000.0 / (tile.block_n * tile.block_m), None

    monkeypatch.setattr(tune, "time_tile", timer)
    chosen = ("--dtype", "half", "--kernel", "forward", "--kernel", "coefficient", "--width", "128")
    first, lines = tune_here(tmp_path, *chosen, "--minutes", "10")
    assert len(lines) == len(asked) == 10
    assert [place.kernel for place, _ in asked] == ["forward"] * 5 + ["coefficient"] * 5
    assert all((line["ms"] is None) == (line["error"] == "out of memory") for line in lines)
    assert any(line["error"] for line in lines)
    assert first[86]["half"]["backward"] == table[86]["half"]["backward"]

    asked.clear()
    second, lines = tune_here(tmp_path, *chosen)
    assert "10 times on record" in capsys.readouterr().out
    assert len(lines) == 10 + len(asked) == len({(*line["place"], *line["tile"]) for line in lines})
    (best,) = [tile for d, tile in second[86]["half"]["forward"] if d == 128]
    assert best[:2] == (128, 128) and best[3] == 8

    asked.clear()
    tune_here(tmp_path, *chosen)
    assert not asked
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
    tune_here(tmp_path, *chosen, "--minutes", "1")
    assert asked


def test_no_entry_is_begun_after_the_budget(table, card, clock, monkeypatch, tmp_path, capsys):
    def timer(arch, place, tile):
        clock.now += 600
        return 1.0, None

    monkeypatch.setattr(tune, "time_tile", timer)
    _, lines = tune_here(tmp_path, "--dtype", "half", "--minutes", "5")
    assert len(lines) == 1
    left = len(tune.places(tiles.TILES[86], ["half"])) - 1
    assert f"{left} entries are left" in capsys.readouterr().out


def test_an_entry_that_cannot_run_stays(clock):
    tile, ms, before, _ = tune.best_tile(
        Place("half", "forward", 16, 16), SLOW, lambda *_: math.inf, math.inf
    )
    assert tile == SLOW and ms == before == math.inf


def test_candidates_cover_the_widths_of_their_place_and_begin_near_the_entry():
    assert {tile.block_d for tile in tune.candidates("backward", 64, SLOW)} == {64}
    found = tune.candidates("coefficient", None, SLOW)
    assert {tile.block_d for tile in found} == set(tune.BLOCKS_D)
    assert all(tile.blocks == 1 for tile in found) and SLOW not in found
    assert Tile(64, 16, 16, 4, 2, 1) in found[:8] and found[-1].num_stages == 4
