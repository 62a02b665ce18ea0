"""The Triton kernels of `cutmix`, as compiled code, against plain PyTorch."""

import pytest
import torch

from ssl_kernels.reference import cutmix as reference
from ssl_kernels.triton import cutmix as kernels
from tests.cuda.mixing_calls import aligned, counted
from tests.helpers import DTYPES
from tests.support.mixing import PERMUTATIONS, boxes_of, permutation_of

SECTOR = 32


def images(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 120, shape, generator=generator).to(dtype)


def check(gpu, x, boxes, permutation, **options):
    exact = reference.cutmix(x, boxes, permutation)
    device = gpu.device
    in_place = torch.empty_like(x, device=device).copy_(x)
    arguments = boxes.to(device), permutation.to(device)
    with gpu.triton(**options) as launches:
        out = kernels.cutmix_fwd(in_place, *arguments)
        kernels.cutmix_(in_place, *arguments)
    assert torch.equal(out.cpu(), exact) and out.stride() == in_place.stride()
    assert torch.equal(in_place.cpu(), exact)
    return launches


@pytest.mark.parametrize("kind", PERMUTATIONS)
def test_pixels_inside_the_boxes_come_from_the_partner(gpu, kind):
    for shape, dtype in [((7, 2, 6, 16), torch.float32), ((5, 3, 5, 7), torch.uint8)]:
        check(gpu, images(shape, dtype), boxes_of(shape[0], *shape[-2:]), permutation_of(kind, shape[0]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_element_sizes(gpu, dtype):
    for seed, kind in enumerate(PERMUTATIONS):
        boxes = boxes_of(9, 5, 7, seed=seed)
        check(gpu, images((9, 5, 7), dtype), boxes, permutation_of(kind, 9, seed), seed=seed)


def test_layouts_and_schedules(gpu):
    boxes, permutation = boxes_of(6, 8, 12), permutation_of("one cycle", 6)
    x = images((6, 3, 8, 12), torch.float32)
    check(gpu, x.to(memory_format=torch.channels_last), boxes, permutation, seed=1, warp_races=True)
    check(gpu, x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), boxes, permutation)
    memory = x.to(gpu.device)
    exact = memory.clone()
    exact[:, 1] = reference.cutmix(x[:, 1], boxes, permutation)
    with gpu.triton():
        kernels.cutmix_(memory[:, 1], boxes.to(gpu.device), permutation.to(gpu.device))
    assert torch.equal(memory, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_matches_float64(gpu, dtype):
    grad = torch.randn((7, 2, 5, 6), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        dtype
    )
    boxes, permutation = boxes_of(7, 5, 6), permutation_of("random", 7, seed=4)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    with gpu.triton():
        grad_x = kernels.cutmix_bwd(*(tensor.to(gpu.device) for tensor in (grad, boxes, permutation)))
        fixed = kernels.cutmix_bwd(
            grad.to(gpu.device), boxes.to(gpu.device), torch.arange(7, device=gpu.device)
        )
    assert torch.equal(grad_x.cpu(), reference.cutmix_bwd(grad.to(acc), boxes, permutation).to(dtype))
    assert torch.equal(fixed.cpu(), grad)


def test_bad_values_end_inside_the_tensors(gpu):
    x = images((4, 1, 6, 8), torch.float32).to(gpu.device)
    boxes = torch.tensor(
        [[-5, 99, 2, 3], [4, 2, 0, 8], [2**40, -(2**40), 0, 1], [0, 6, 0, 8]], device=gpu.device
    )
    for bad in ([0, 0, 0, 0], [4, -1, 2**40, 0], [1, 2, 3, 0]):
        permutation, in_place = torch.tensor(bad, device=gpu.device), x.clone()
        with gpu.triton():
            out = kernels.cutmix_fwd(x, boxes, permutation)
            kernels.cutmix_bwd(x, boxes, permutation)
            kernels.cutmix_(in_place, boxes, permutation)
        assert torch.equal(in_place[1:3], x[1:3]) and torch.equal(out[1:3], x[1:3])  # empty boxes
    far = torch.tensor([1, 0, 3, 2], device=gpu.device) + 2**32
    with gpu.triton():
        assert torch.equal(kernels.cutmix_fwd(x, boxes, far), x)


def test_in_place_touches_only_what_lies_under_the_boxes(gpu):
    """A word and the four ends of a box per sample beside, from the first-level cache, for each warp."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    x = aligned(images((8, 1, 16, 224), torch.float32))
    boxes = torch.stack([torch.tensor([i, i + 8, 5 + 7 * i, 117 + 7 * i]) for i in range(8)])
    with gpu.triton() as launches:
        kernels.cutmix_(x, boxes, permutation_of("flip", 8))
    walk = counted(launches, "cutmix_walk_kernel")
    inside = reference.inside_boxes(boxes, x).expand(x.shape)
    minimum = inside.reshape(-1, SECTOR // 4).any(1).sum().item()
    both = inside & inside[permutation_of("flip", 8)]
    held = both[:4].reshape(-1, SECTOR // 4).any(1).sum().item()
    warps = 16 * 224 // 128
    steps = warps * 8 * 8
    assert walk.global_store_bytes == inside.sum().item() * 4
    # An edge of a box that divides 16 bytes is stored number by number.
    assert minimum <= walk.global_store_sectors <= 1.2 * minimum
    assert minimum <= walk.global_load_sectors <= minimum + held + steps
    assert walk.global_load_sectors - held - steps + walk.global_store_sectors <= 1.1 * 2 * minimum
