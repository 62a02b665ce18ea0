"""CUDA kernels at the edges of what they promise: sizes beside those of tiles, short norms, far rows, exact results."""

import pytest

from tests.cuda import edges

PAIRWISE = ("contrastive", "sigmoid_pairs", "batch_hard")
ELSEWHERE = ("contrastive_additions",)  # in test_contrastive_additions.py


@pytest.fixture
def on_the_host(gpu):
    if not gpu.emulated:
        pytest.skip("its tensors lie in memory of the host")


@pytest.mark.parametrize("operation", sorted({*edges.CHECKS} - {*PAIRWISE, *ELSEWHERE}))
def test_edges(on_the_host, library_of, operation):
    edges.CHECKS[operation](library_of(f"{operation}.cu"))


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
