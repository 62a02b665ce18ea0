"""Workloads of the losses over `contrastive`: each maps (B, D, dtype, device) to a `Workload`."""

import torch

import ssl_kernels
from benchmarks.harness import Implementation, Workload, loss_and_gradients
from benchmarks.machine import free_memory
from benchmarks.peers import MATRICES_OF_LOGITS, nt_xent_peers
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

BATCH_SIZES = (2, 16, 64, 256, 1024, 4096)
QUICK_BATCH_SIZES = (16, 128, 1024)
DIM = 128
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def nt_xent(batch_size, dim, dtype, device, temperature=0.5):
    """NT-Xent of two views, N = 2B rows.

    Its operations: the matrix of similarities is symmetric, so the forward needs half of its 2·N²·D, and the
    backward the same half again and one whole product of that size: 4·N²·D.
    """
    torch.manual_seed(batch_size)
    inputs = tuple(torch.randn(batch_size, dim).to(device, dtype).requires_grad_() for _ in range(2))
    rows = 2 * batch_size
    logits_bytes = rows**2 * dtype.itemsize

    def expected():
        wide = dtype if dtype == torch.float64 else torch.float32
        wide_inputs = [x.detach().to(wide).requires_grad_() for x in inputs]
        fits = MATRICES_OF_LOGITS * rows**2 * wide.itemsize < free_memory(device)

        def streamed(z0, z1, temperature):
            return ssl_kernels.nt_xent_loss(z0, z1, temperature, backend="chunked")

        loss = plain_nt_xent_loss if fits else streamed
        return loss_and_gradients(lambda z0, z1: loss(z0, z1, temperature), wide_inputs)

    def on_backend(backend):
        return lambda z0, z1: ssl_kernels.nt_xent_loss(z0, z1, temperature, backend=backend)

    return Workload(
        loss="nt_xent",
        sizes={"B": batch_size, "D": dim},
        inputs=inputs,
        implementations=[
            *nt_xent_peers(temperature, logits_bytes),
            *our_implementations(ssl_kernels.nt_xent_loss, inputs, on_backend),
        ],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        operations=4 * rows**2 * dim,
    )


LOSSES = (nt_xent,)


def our_implementations(loss, inputs, on_backend):
    """An Implementation for each backend meant for this device, in order of preference."""
    backends = ssl_kernels.backends_for(loss, *inputs)
    del backends["reference"]
    if inputs[0].device.type == "cpu":
        del backends["triton"]
    return [
        Implementation(f"ssl_kernels {backend}", on_backend(backend), missing=reason)
        for backend, reason in backends.items()
    ]


def workloads(options, losses=LOSSES):
    """Functions that make the workloads of `losses` that `options` ask for, by rising size."""
    sizes = options.batch_sizes or (QUICK_BATCH_SIZES if options.quick else BATCH_SIZES)
    dim = options.dim or DIM

    def maker(loss, batch_size):
        return lambda: loss(batch_size, dim, options.dtype, options.device)

    return [maker(loss, batch_size) for loss in losses for batch_size in sorted(sizes)]
