"""The tuner of the tile tables, with an emulated card in the place of the one it is for."""

import copy
import runpy

import pytest
import torch

from ssl_kernels.triton import tiles, tune
from ssl_kernels.triton.tiles import Tile

SLOW, FAST = Tile(32, 16, 16, 4, 2, 1), Tile(64, 64, 16, 4, 2, 1)


@pytest.fixture
def table(monkeypatch):
    """A copy of the tables that the tuner may change."""
    own = copy.deepcopy(tiles.TILES)
    kept = copy.deepcopy(tiles.TILES)
    yield own
    tiles.TILES.clear()
    tiles.TILES.update(kept)


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
    impossible = Tile(48, 16, 16, 4, 2, 1)  # no power of two
    monkeypatch.setattr(tune, "candidates", lambda *_: iter([impossible, FAST]))
    with gpu.triton() as launches:

        def do_bench(function):
            before = len(launches)
            function()
            return sum(launch.counters.instructions for launch in launches[before:])

        monkeypatch.setattr("triton.testing.do_bench", do_bench)
        tile, time, before = tune.best_tile(kernel, gpu.arch, "half", largest_d, SLOW)
    assert tile == FAST and 0 < time < before
    assert tiles.TILES == table  # as it was


def test_what_is_written_is_read_back(table, monkeypatch, tmp_path, capsys):
    written = tmp_path / "tiles.py"
    for name, value in (
        ("is_available", True), ("get_device_capability", (8, 9)), ("get_device_name", "a card"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    tuned = Tile(16, 16, 16, 4, 2, 1)
    monkeypatch.setattr(tune, "best_tile", lambda *_: (tuned, 1.0, 2.0))
    tune.main(["--dtype", "half", "--output", str(written)])
    assert "entries of architecture 86" in capsys.readouterr().out
    found = runpy.run_path(str(written))
    for arch, dtype_classes in table.items():
        for dtype_class, kernels in dtype_classes.items():
            for kernel, entries in kernels.items():
                changed = (arch, dtype_class) == (86, "half")
                expected = [(d, tuple(tuned) if changed else tile) for d, tile in entries]
                assert found["TILES"][arch][dtype_class][kernel] == expected
    assert found["__doc__"] == tiles.__doc__ and found["Tile"]._fields == Tile._fields
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_candidates_cover_the_widths_of_their_place():
    assert {tile.block_d for tile in tune.candidates("backward", 64)} == {64}
    assert {tile.block_d for tile in tune.candidates("product", None)} == set(tune.BLOCKS_D)
    assert all(tile.blocks == 1 for tile in tune.candidates("forward", 128))
