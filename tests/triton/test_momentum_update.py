"""The Triton kernel of `momentum_update_`, as compiled code, against the average in float64."""

import pytest
import torch

from ssl_kernels.triton.momentum_update import BLOCK, momentum_update_


@pytest.mark.parametrize(
    "shadow_dtype, source_dtype, momentum",
    [
        (torch.bfloat16, torch.float32, 0.999),
        (torch.bfloat16, torch.bfloat16, 0.25),
        (torch.float16, torch.float16, 0.0),
        (torch.float16, torch.float32, 1.0),
    ],
    ids=str,
)
def test_average(gpu, shadow_dtype, source_dtype, momentum):
    generator = torch.Generator().manual_seed(1)
    shapes = ((1,), (0,), (33, 7), (BLOCK,), (BLOCK + 16,))
    masters, sources = (
        [torch.randn(s, generator=generator).to(gpu.device) for s in shapes] for _ in range(2)
    )
    shadows = [master.to(shadow_dtype) for master in masters]
    sources = [source.to(source_dtype) for source in sources]
    shadows[2][4] = 3.0  # written from outside
    masters[2][4] = -1.0
    averages = [master.clone() for master in masters]
    averages[2][4] = 3.0
    with gpu.triton():
        weight = torch.tensor(1 - momentum, dtype=torch.float32, device=gpu.device)
        momentum_update_(masters, shadows, sources, weight)
    for average, master, shadow, source in zip(averages, masters, shadows, sources, strict=True):
        exact = momentum * average.double() + (1 - momentum) * source.double()
        torch.testing.assert_close(master.double(), exact, rtol=2e-7, atol=5e-7)
        assert torch.equal(shadow, master.to(shadow_dtype))
