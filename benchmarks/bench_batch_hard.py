"""Workload of the loss over `batch_hard`: the triplet loss of the hardest positives and negatives."""

from functools import partial

import torch

import ssl_kernels
from benchmarks import bench_contrastive
from benchmarks.bench_contrastive import TOLERANCES, our_implementations
from benchmarks.harness import Workload, loss_and_gradients
from benchmarks.machine import free_memory
from benchmarks.peers import MATRICES_OF_LOGITS, plain_triplet_loss, triplet_peers

ROWS_OF_A_LABEL = 4


def triplet(batch_size, dim, dtype, device):
    """Batch-hard triplet loss of N rows, four of a label.

    Its operations: the matrix of products is symmetric, half of its 2·N²·D.
    """
    torch.manual_seed(batch_size)
    labels = torch.arange(batch_size, device=device) // ROWS_OF_A_LABEL
    inputs = (torch.randn(batch_size, dim).to(device, dtype).requires_grad_(), labels)

    def expected():
        wide = dtype if dtype == torch.float64 else torch.float32
        wide_inputs = [inputs[0].detach().to(wide).requires_grad_(), labels]
        fits = MATRICES_OF_LOGITS * batch_size**2 * wide.itemsize < free_memory(device)
        streamed = partial(ssl_kernels.triplet_loss, backend="chunked")
        return loss_and_gradients(plain_triplet_loss if fits else streamed, wide_inputs)

    return Workload(
        loss="triplet",
        sizes={"N": batch_size, "D": dim},
        inputs=inputs,
        implementations=[
            *triplet_peers(batch_size**2 * max(4, dtype.itemsize)),
            *our_implementations(
                ssl_kernels.triplet_loss,
                inputs,
                lambda backend: partial(ssl_kernels.triplet_loss, backend=backend),
            ),
        ],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        operations=batch_size**2 * dim,
    )


workloads = partial(bench_contrastive.workloads, losses=(triplet,))
