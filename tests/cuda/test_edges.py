"""CUDA kernels at the edges of what they promise: sizes beside those of tiles, short norms, far rows, exact results."""

import pytest
import torch

from tests.cuda import edges

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
IN_EVERY_DTYPE = ("queue_push", "row_pairs")
PAIRWISE = ("contrastive", "sigmoid_pairs", "batch_hard")
ELSEWHERE = ("contrastive_additions",)  # in test_contrastive_additions.py


@pytest.fixture
def on_the_host(gpu):
    if not gpu.emulated:
        pytest.skip("its tensors lie in memory of the host")


@pytest.mark.parametrize("operation", sorted({*edges.CHECKS} - {*IN_EVERY_DTYPE, *PAIRWISE, *ELSEWHERE}))
def test_edges(on_the_host, library_of, operation):
    edges.CHECKS[operation](library_of(f"{operation}.cu"))


@pytest.mark.parametrize("operation", IN_EVERY_DTYPE)
def test_edges_in_every_dtype(on_the_host, library_of, operation):
    edges.CHECKS[operation](library_of(f"{operation}.cu"), DTYPES)


@pytest.mark.parametrize(
    "sizes",
    [
        ((31, 63, 127, 65), (63, 129, 257, 513)),
        pytest.param((edges.SIZES, edges.WIDTHS), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
@pytest.mark.parametrize("operation", PAIRWISE)
def test_edges_of_pairwise_losses(on_the_host, library_of, operation, sizes):
    edges.CHECKS[operation](library_of(f"{operation}.cu"), *sizes)
