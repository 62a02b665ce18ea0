"""Every launch has a grid that a card takes, at the largest sizes; tensors without memory, and no kernel runs."""

import importlib

import pytest
import torch

from ssl_kernels.triton.mixup_cross_entropy import MOST_CLASSES
from ssl_kernels.triton.permutation_walk import MOST_SAMPLES
from tests.gpu_emulation import emulated_triton

ROWS = 2**31 - 2**16 - 1  # see unsupported_operands
SAMPLES = MOST_SAMPLES - 1


def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(operation, function, *args):
    """Grids of a call that the operation says it supports."""
    module = importlib.import_module(f"ssl_kernels.triton.{operation}")
    with emulated_triton(80, executes=False) as launches:
        tensors = args[1:] if function.endswith("_bwd") and operation != "cutmix" else args
        assert module.unsupported(*tensors) is None
        getattr(module, function)(*args)
    assert launches
    return [launch.grid for launch in launches]


@pytest.mark.parametrize("samples", [16 * 65535, 16 * 65535 + 1, SAMPLES])
@pytest.mark.parametrize("function", ["cutmix_fwd", "cutmix_bwd"])
def test_cutmix_of_many_samples(function, samples):
    images, boxes = empty(samples, 1, 40, 40), empty(samples, 4, dtype=torch.int64)
    grids = launches_of("cutmix", function, images, boxes, empty(samples, dtype=torch.int64))
    assert grids[-1] == (-(-samples // 16) * 2, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("samples, features", [(SAMPLES, 1), (3, 2**38)])
def test_mixing_of_many_samples_and_features(samples, features):
    lam, permutation = empty(samples, dtype=torch.float32), empty(samples, dtype=torch.int64)
    x = empty(samples, features)
    launches_of("mixup", "mixup_", x, lam, permutation)
    launches_of("mixup", "mixup_fwd", x, lam, permutation)
    launches_of("cutmix", "cutmix_", x[:, None, None, :], empty(samples, 4, dtype=torch.int64), permutation)
    images, numbers = empty(samples, 1, 1, features, dtype=torch.uint8), empty(1, dtype=torch.float32)
    launches_of(
        "mixup_normalize", "mixup_normalize", images, lam, permutation, numbers, numbers, torch.float32
    )


@pytest.mark.slow
@pytest.mark.parametrize("samples, features", [(SAMPLES, 1), (3, 2**38)])
def test_gradients_of_mixing_of_many_samples_and_features(samples, features):
    lam, permutation = empty(samples, dtype=torch.float32), empty(samples, dtype=torch.int64)
    x = empty(samples, features)
    for with_x in (x, None):
        with emulated_triton(80, executes=False) as launches:
            importlib.import_module("ssl_kernels.triton.mixup").mixup_bwd(x, with_x, lam, permutation, True)
        assert launches


@pytest.mark.parametrize("rows, classes", [(2**31 - 1, 1), (2**31 - 1, 10**6), (3, MOST_CLASSES)])
def test_cross_entropy_of_many_rows_and_classes(rows, classes):
    logits, lam = empty(rows, classes), empty(rows, dtype=torch.float32)
    operands = (logits, *[empty(rows, dtype=torch.int64)] * 2, lam, None)
    options = (0.1, -100, False)
    numbers = empty(rows, dtype=torch.float64)
    launches_of("mixup_cross_entropy", "mixup_cross_entropy_fwd", *operands, *options, "none")
    launches_of("mixup_cross_entropy", "mixup_cross_entropy_bwd", numbers, *operands, numbers, *options)
    module = importlib.import_module("ssl_kernels.triton.mixup_cross_entropy")
    assert str(2**31) in module.unsupported(empty(2**31, 1))
    assert str(MOST_CLASSES) in module.unsupported(empty(1, MOST_CLASSES + 1))


def test_averages_of_many_numbers():
    master, shadow = empty(2**40, dtype=torch.float32), empty(2**40)
    weight = empty(dtype=torch.float32).view(())
    (grid,) = launches_of("momentum_update", "momentum_update_", [master], [shadow], [shadow], weight)
    assert grid == (2**28, 1, 1)


def test_rings_of_many_rows():
    position = torch.empty((), dtype=torch.int64, device="meta")
    for rows, keys in ((2**31 - 1, 2**31 + 5), (7, 2**33)):
        launches_of("queue_push", "queue_push_", empty(rows, 1), empty(keys, 1), position, position, True)
    module = importlib.import_module("ssl_kernels.triton.queue_push")
    assert str(2**31) in module.unsupported(empty(2**31, 1))


@pytest.mark.slow
def test_rows_of_many_and_wide_rows():
    for rows, width in ((2**31 - 1, 1), (3, 2**24)):
        x = empty(rows, width)
        launches_of("row_pairs", "row_pairs_fwd", x, x, x, True, "distance")
        saved, grad = empty(rows, 2, 4, dtype=torch.float32), empty(rows, dtype=torch.float64)
        launches_of("row_pairs", "row_pairs_bwd", grad, x, x, x, saved, True, "distance", True, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("rows, width", [(ROWS, 1), (3, 2**24), (ROWS, 64)])
def test_pairwise_losses_of_many_and_wide_rows(rows, width):
    x, labels = empty(rows, width), empty(rows, dtype=torch.int64)
    launches_of("batch_hard", "batch_hard", x, labels, True, "cosine")
    scale, flags = empty(dtype=torch.float32).view(()), (True, True, False)
    lse, rnorm = empty(rows, dtype=torch.float64), empty(rows, dtype=torch.float32)
    for columns in (None, x):
        operands = (x, columns, scale, None, None, None)
        launches_of("contrastive", "contrastive_fwd", *operands, *flags, False, True, True)
        saved = (lse, lse[:0], rnorm, rnorm, rnorm[:0])
        module = importlib.import_module("ssl_kernels.triton.contrastive")
        with emulated_triton(80, executes=False) as launches:
            module.contrastive_bwd(lse, None, None, *operands, *saved, *flags, False, True, True)
        assert launches
    # The columns' sums come panel by panel of as few rows as their scratch holds: only where there are few panels.
    if rows < 4:
        launches_of("contrastive", "contrastive_fwd", x, x, scale, None, None, None, *flags, True, True, True)
    if width <= 256:
        pairs = (x, x, scale, scale, 0, True, True)
        launches_of("sigmoid_pairs", "sigmoid_pairs_fwd", *pairs, True, True, True, True)
        module = importlib.import_module("ssl_kernels.triton.sigmoid_pairs")
        with emulated_triton(80, executes=False) as launches:
            module.sigmoid_pairs_bwd(lse, *pairs, True, True)
        assert launches
