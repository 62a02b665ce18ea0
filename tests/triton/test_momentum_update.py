"""The Triton kernel of `momentum_update_`, as compiled code, against the average in float64."""

import pytest
import torch

from ssl_kernels.triton.momentum_update import BLOCK, momentum_update_
from tests.support.momentum_update import check, triples


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
    shapes = ((1,), (0,), (33, 7), (BLOCK,), (BLOCK + 16,))
    given = triples(shadow_dtype, source_dtype, shapes, device=gpu.device)
    given[0][2][4], given[1][2][4] = -1.0, 3.0  # written from outside
    weight = torch.tensor(1 - momentum, dtype=torch.float32, device=gpu.device)
    with gpu.triton():
        check(lambda: momentum_update_(*given, weight), *given, momentum)
