"""Workloads of the average of a half-precision encoder: float32 masters moved, and rounded into their shadows.

The tensors are the parameters of a transformer of 12 layers, 384 wide: 144 tensors, 21 million elements. There is no
loss: as in bench_mixing a weighted sum of some numbers of the result is what implementations must agree on, and each
works on masters and shadows of its own.
"""

import torch
from torch import nn

from benchmarks.bench_contrastive import TOLERANCES, our_implementations
from benchmarks.bench_mixing import Probe
from benchmarks.harness import Implementation, Workload
from ssl_kernels.ops.momentum_update import momentum_update_

LAYERS = (12,)
QUICK_LAYERS = (2,)
DIM = 384
MOMENTUM = 0.996
SHADOW = torch.bfloat16


def parameter_shapes(layers, dim):
    layer = nn.TransformerEncoderLayer(dim, 6, 4 * dim, device="meta")
    return [parameter.shape for parameter in layer.parameters()] * layers


def momentum_update(layers, dim, dtype, device):
    """Parameters in `dtype`, averages in bfloat16 with float32 masters."""
    generator = torch.Generator().manual_seed(layers)
    shapes = parameter_shapes(layers, dim)
    start, sources = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    start = [tensor.to(device, SHADOW) for tensor in start]
    sources = tuple(tensor.to(device, dtype) for tensor in sources)
    elements = sum(tensor.numel() for tensor in start)
    probe = Probe(start[0])

    def on_copies(step):
        """`step(masters, shadows, sources)` on tensors of its own, made at the first call."""
        own = []

        def run(*sources):
            if not own:
                own.extend(([tensor.float() for tensor in start], [tensor.clone() for tensor in start]))
            step(*own, sources)
            return probe(own[0][0]) + probe(own[1][0])

        return run

    def two_calls(masters, shadows, sources):
        torch._foreach_lerp_(masters, [source.float() for source in sources], 1 - MOMENTUM)
        torch._foreach_copy_(shadows, masters)

    def expected():
        master = torch.lerp(start[0].double(), sources[0].double(), 1 - MOMENTUM)
        return probe(master) + probe(master.to(SHADOW)), ()

    def on_backend(backend):
        return on_copies(
            lambda masters, shadows, sources: momentum_update_(
                masters, shadows, sources, MOMENTUM, backend=backend
            )
        )

    return Workload(
        loss="momentum_update",
        sizes={"L": layers, "D": dim},
        inputs=sources,
        implementations=[
            Implementation("two foreach calls", on_copies(two_calls), baseline=True),
            *our_implementations(momentum_update_, sources, on_backend),
        ],
        expected=expected,
        # A master next to the middle of two bfloat16 may be rounded either way.
        tolerance=max(TOLERANCES[dtype], 1e-3),
        bytes_moved=elements * (4 + 2 + dtype.itemsize + 4 + 2),
    )


def workloads(options):
    """Functions that make the workloads that `options` ask for, by rising size; batch sizes are numbers of layers."""
    if options.dtype == torch.float64:
        return []  # masters are float32
    layers = options.batch_sizes or (QUICK_LAYERS if options.quick else LAYERS)
    return [
        lambda count=count: momentum_update(count, options.dim or DIM, options.dtype, options.device)
        for count in sorted(layers)
    ]
