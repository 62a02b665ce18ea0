"""CUDA kernels of `cutmix`, as nvcc compiled them, against plain PyTorch."""

import pytest
import torch

from ssl_kernels.reference import cutmix as reference
from tests.cuda.mixing_calls import aligned, counted, cutmix, cutmix_bwd, library_of
from tests.support.mixing import PERMUTATIONS, boxes_of, permutation_of

SECTOR = 32
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture
def library(gpu, nvcc):
    return library_of(gpu, "cutmix")


def images(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 120, shape, generator=generator).to(dtype).to(device)


def check(library, x, boxes, permutation, **options):
    exact = reference.cutmix(x.cpu(), boxes.cpu(), permutation.cpu())
    out, launches = cutmix(library, x, boxes, permutation, torch.full_like(x, 77), **options)
    assert torch.equal(out.cpu(), exact)
    in_place = torch.empty_like(x).copy_(x)
    cutmix(library, in_place, boxes, permutation, in_place, **options)
    assert torch.equal(in_place.cpu(), exact)
    return launches


@pytest.mark.parametrize("kind", PERMUTATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_pixels_inside_the_boxes_come_from_the_partner(library, gpu, dtype, kind):
    """Rows of whole vectors, and rows that vectors straddle with features left over."""
    for shape in [(7, 2, 6, 16), (5, 3, 5, 7)]:
        x = images(shape, dtype, gpu.device)
        boxes = boxes_of(len(x), *shape[-2:], seed=shape[0]).to(gpu.device)
        check(library, x, boxes, permutation_of(kind, len(x)).to(gpu.device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_layouts(library, gpu, dtype, layout):
    x = LAYOUTS[layout](images((6, 3, 8, 12), dtype, gpu.device))
    boxes = boxes_of(6, 8, 12).to(gpu.device)
    check(library, x, boxes, permutation_of("one cycle", 6).to(gpu.device))


def test_masks_and_slices_of_a_batch(library, gpu):
    """(B, H, W); samples further apart than they are large, which stays untouched between them."""
    memory = images((6, 2, 5, 8), torch.float32, gpu.device)
    boxes, permutation = boxes_of(6, 5, 8).to(gpu.device), permutation_of("random", 6).to(gpu.device)
    masks = memory[:, 1]
    exact = memory.clone()
    exact[:, 1] = reference.cutmix(masks.cpu(), boxes.cpu(), permutation.cpu())
    cutmix(library, masks, boxes, permutation, masks)
    assert torch.equal(memory, exact)


def test_overlapping_chains(library, gpu):
    """In one cycle of whole-image boxes every sample moves by one; the first is held for the last."""
    x = images((130, 1, 2, 3), torch.float32, gpu.device)
    boxes = torch.tensor([0, 2, 0, 3], device=gpu.device).expand(130, 4)
    check(library, x, boxes, permutation_of("one cycle", 130).to(gpu.device))


def test_many_samples_and_schedules(library, gpu):
    """More than a chunk of boxes in shared memory; random orders, with races in warps looked for as well."""
    x = images((300, 1, 4, 6), torch.float16, gpu.device)
    boxes = boxes_of(300, 4, 6).to(gpu.device)
    for options in ({}, {"seed": 1}, {"seed": 2, "warp_races": True}):
        check(library, x, boxes, permutation_of("random", 300).to(gpu.device), **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["random", "fixed points"])
def test_backward_matches_float64(library, gpu, dtype, kind):
    for shape in [(7, 2, 6, 16), (5, 3, 5, 7)]:
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
        boxes, permutation = boxes_of(len(grad), *shape[-2:]), permutation_of(kind, len(grad))
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        exact = reference.cutmix_bwd(grad.to(acc), boxes, permutation).to(dtype)
        device = gpu.device
        grad_x, _ = cutmix_bwd(library, grad.to(device), boxes.to(device), permutation.to(device))
        assert torch.equal(grad_x.cpu(), exact)


def test_bad_values_end_inside_the_tensors(library, gpu):
    x = images((4, 1, 6, 8), torch.float32, gpu.device)
    boxes = torch.tensor(
        [[-5, 99, 2, 3], [4, 2, 0, 8], [2**40, -(2**40), 0, 1], [0, 6, 0, 8]], device=gpu.device
    )
    for bad in ([0, 0, 0, 0], [4, -1, 2**40, 0], [1, 2, 3, 0]):
        permutation = torch.tensor(bad, device=gpu.device)
        out, _ = cutmix(library, x, boxes, permutation)
        cutmix(library, x.clone(), boxes, permutation)
        cutmix_bwd(library, x, boxes, permutation)
        in_place = x.clone()
        cutmix(library, in_place, boxes, permutation, in_place)
        assert torch.equal(in_place[1:3], x[1:3]) and torch.equal(out[1:3], x[1:3])  # empty boxes


def test_calls_can_be_captured(library, gpu):
    if not gpu.emulated:
        pytest.skip("tests/ops captures the operator on a card")
    x, boxes, permutation = (
        images((5, 1, 4, 4), torch.float32, "cpu"),
        boxes_of(5, 4, 4),
        permutation_of("roll", 5),
    )
    launches = [
        *cutmix(library, x, boxes, permutation, x, capturing=True, stream=7)[1],
        *cutmix(library, x, boxes, permutation, capturing=True, stream=7)[1],
        *cutmix_bwd(library, x, boxes, permutation, capturing=True, stream=7)[1],
    ]
    assert {launch.stream for launch in launches} == {7}


def sectors_under(mask, itemsize):
    """Sectors of a batch that hold an element of the mask."""
    return mask.reshape(-1, SECTOR // itemsize).any(1).sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_touches_only_what_lies_under_the_boxes(library, gpu, dtype):
    """At the ends of a row of a box a vector is stored in pieces, which a sector each are counted for."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    shape = (12, 1, 64, 224)
    x = aligned(images(shape, dtype, "cpu"))
    boxes = torch.stack([torch.tensor([i, i + 30, 5 + 7 * i, 117 + 7 * i]) for i in range(12)])
    _, launches = cutmix(library, x, boxes, permutation_of("one cycle", 12), x)
    walk = counted(launches, "walk_kernel")
    inside = reference.inside_boxes(boxes, x).expand(shape)
    minimum = sectors_under(inside, dtype.itemsize)
    held = sectors_under(inside[:1], dtype.itemsize)
    steps = 12 * next(launch for launch in launches if "walk_kernel" in launch.kernel).grid[0]
    assert minimum <= walk.global_load_sectors <= 1.03 * minimum + held + steps
    assert walk.global_store_bytes == inside.sum().item() * dtype.itemsize
    pieces = (1 if dtype == torch.float32 else 2.5) * inside.any(3).sum().item()
    assert minimum <= walk.global_store_sectors <= 1.03 * minimum + pieces


def test_out_of_place_and_backward_read_once_and_write_once(library, gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    shape = (32, 1, 64, 224)
    x = aligned(images(shape, torch.float32, "cpu"))
    out = aligned(torch.zeros(shape))
    boxes, permutation = boxes_of(32, 64, 224), permutation_of("one cycle", 32)
    inside = reference.inside_boxes(boxes, x).expand(shape)
    minimum = sectors_under(inside, 4) + sectors_under(~inside, 4)  # those under an edge from both samples
    for function, name in (("cutmix_fwd", "gather_kernel"), ("cutmix_bwd", "grad_kernel")):
        _, launches = cutmix(library, x, boxes, permutation, out, function=function)
        counters = counted(launches, name)
        assert minimum <= counters.global_load_sectors <= 1.1 * minimum
        assert counters.global_store_sectors == x.nbytes // SECTOR
