"""Sizes one below, at and one above every tile, block and panel of the Triton kernels, in every combination."""

import itertools

import pytest
import torch

from ssl_kernels.triton import contrastive, momentum_update
from ssl_kernels.triton.launch import tile_for
from tests.support.mixing import permutation_of
from tests.support.row_pairs import random_call as random_rows
from tests.support.sigmoid_pairs import random_call as random_pairs
from tests.triton import test_mixup_normalize, test_queue_push, test_row_pairs, test_sigmoid_pairs
from tests.triton.contrastive_calls import case

BESIDE = (-1, 0, 1)
# A width that keeps the gradient on chip where the dtype has tiles for that, one that goes through panels, and those
# beside the blocks of the kernels over rows.
WIDTHS = (8, 136)
DTYPES = (torch.float16, torch.float32, torch.float64)
pytestmark = pytest.mark.slow


def tiles_of(d, dtype):
    """Every tile that a call on these rows may take."""
    rows = torch.empty(1, d, dtype=dtype)
    tiles = [tile_for(kernel, rows) for kernel in ("forward", "backward", "coefficient")]
    if contrastive.keeps_expectation(rows):
        tiles.append(tile_for("expectation", rows))
    return [tile for tile in tiles if tile is not None]


def sizes_of(d, dtype):
    """(n, m) beside one block of rows and one and two tiles of columns."""
    found = set()
    for tile in tiles_of(d, dtype):
        for n, m in itertools.product(BESIDE, BESIDE):
            found.add((tile.block_n + n, tile.block_m + m))
            found.add((tile.block_n + n, 2 * tile.block_m + m))
    return sorted(found)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive_at_sizes(gpu, dtype, d):
    with gpu.triton():
        for n, m in sizes_of(d, dtype):
            # Near 0 logits: one entry too many or too few is one in as many as there are.
            options = {"temperature": 10.0, "positives": 1}
            cases = [case(n, m, d, dtype, both_directions=True, **options)]
            cases += [case(n, None, d, dtype, **options)] if m == sizes_of(d, dtype)[0][1] else []
            cases += [case(n, m, d, dtype, expectation=True, **options)]
            for each in cases:
                each.check(gpu.device)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels(gpu, dtype, d, monkeypatch):
    """Panels of one block of rows, the last of them one row short, whole, or of one row."""
    monkeypatch.setattr(contrastive.panels, "SCRATCH_BYTES", 1)
    with gpu.triton():
        block = tile_for("coefficient", torch.empty(1, d, dtype=dtype)).block_n
        for beside in BESIDE:
            n = 2 * block + beside
            case(n, 33, d, dtype, temperature=10.0, both_directions=True).check(gpu.device)
            pairs = random_pairs(n, 33, d, dtype, scale=0.5, bias=-0.5, device=gpu.device)
            test_sigmoid_pairs.check(pairs)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_pairs_at_sizes(gpu, dtype, d):
    with gpu.triton():
        for n, m in sizes_of(d, dtype):
            pairs = random_pairs(n, m, d, dtype, scale=0.5, bias=-0.5, diagonal=1, device=gpu.device)
            test_sigmoid_pairs.check(pairs)


@pytest.mark.parametrize("d", [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 513])
def test_widths(gpu, d):
    """Of the tiles of half precision, and of the kernels over rows."""
    with gpu.triton():
        for options in ({"both_directions": True}, {"expectation": True}):
            case(17, 15, d, torch.bfloat16, temperature=10.0, **options).check(gpu.device)
        pairs = random_pairs(15, 17, d, torch.bfloat16, scale=0.5, bias=-0.5, device=gpu.device)
        test_sigmoid_pairs.check(pairs)


def test_splits(gpu):
    """A walk whose last split has one column, one tile, or all but a column of one."""
    with gpu.triton():
        tile = tile_for("forward", torch.empty(1, 8, dtype=torch.bfloat16))
        for beside in BESIDE:
            m = 9 * tile.block_m + beside
            for options in ({"both_directions": True}, {"expectation": True}):
                case(3, m, 8, torch.bfloat16, temperature=10.0, **options).check(gpu.device)
            pairs = random_pairs(3, m, 8, torch.bfloat16, scale=0.5, bias=-0.5, device=gpu.device)
            test_sigmoid_pairs.check(pairs)


@pytest.mark.parametrize("d", [511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097])
def test_row_pairs_at_widths(gpu, d):
    test_row_pairs.check(gpu, random_rows(2, d, torch.float32, measure="distance"))
    test_row_pairs.check(gpu, random_rows(2, d, torch.bfloat16, triplet=False, measure="product"))


@pytest.mark.parametrize("d", [255, 256, 257, 1023, 1024, 1025])
def test_queue_push_at_widths(gpu, d):
    with gpu.triton():
        test_queue_push.check(gpu, 7, d, (6, 7, 8), torch.bfloat16, torch.float32, True)


@pytest.mark.parametrize("beside", BESIDE)
def test_momentum_update_at_sizes(gpu, beside):
    generator = torch.Generator().manual_seed(1)
    count = momentum_update.BLOCK + beside
    master, source = (torch.randn(count, generator=generator).to(gpu.device) for _ in range(2))
    shadow, exact = master.bfloat16(), 0.75 * master.double() + 0.25 * source.double()
    with gpu.triton():
        momentum_update.momentum_update_([master], [shadow], [source], torch.tensor(0.25, device=gpu.device))
    torch.testing.assert_close(master.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(shadow, master.bfloat16())


@pytest.mark.parametrize(
    "shape",
    [
        *((3, 1, 1, features) for features in (2047, 2048, 2049, 4096)),
        *((count, 1, 1, 16) for count in (1, 2, 3, 4, 5, 1023, 1024, 1025)),
    ],
    ids=str,
)
def test_mixup_normalize_at_sizes(gpu, shape):
    x = test_mixup_normalize.images(shape)
    test_mixup_normalize.check(gpu, x, permutation_of("random", shape[0]), torch.float16)
