"""Workload of the loss over `sigmoid_pairs`: SigLIP."""

from functools import partial

import torch

import ssl_kernels
from benchmarks import bench_contrastive
from benchmarks.bench_contrastive import TOLERANCES, our_implementations
from benchmarks.harness import Workload, loss_and_gradients
from benchmarks.machine import free_memory
from benchmarks.peers import MATRICES_OF_LOGITS, plain_siglip_loss, siglip_peers


def siglip(batch_size, dim, dtype, device):
    """SigLIP of N pairs with a learnable scale and bias, both as the paper begins.

    Its operations: the logits and the gradients of either side, three products of 2·N²·D.
    """
    torch.manual_seed(batch_size)
    wide = dtype if dtype == torch.float64 else torch.float32
    features = (torch.randn(batch_size, dim).to(device, dtype) for _ in range(2))
    scalars = (torch.tensor(value, dtype=wide, device=device) for value in (10.0, -10.0))
    inputs = tuple(tensor.requires_grad_() for tensor in (*features, *scalars))

    def expected():
        wide_inputs = [x.detach().to(wide).requires_grad_() for x in inputs]
        fits = MATRICES_OF_LOGITS * batch_size**2 * wide.itemsize < free_memory(device)
        streamed = partial(ssl_kernels.siglip_loss, backend="chunked")
        return loss_and_gradients(plain_siglip_loss if fits else streamed, wide_inputs)

    return Workload(
        loss="siglip",
        sizes={"N": batch_size, "D": dim},
        inputs=inputs,
        implementations=[
            *siglip_peers(batch_size**2 * dtype.itemsize),
            *our_implementations(
                ssl_kernels.siglip_loss,
                inputs,
                lambda backend: partial(ssl_kernels.siglip_loss, backend=backend),
            ),
        ],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        operations=6 * batch_size**2 * dim,
    )


workloads = partial(bench_contrastive.workloads, losses=(siglip,))
