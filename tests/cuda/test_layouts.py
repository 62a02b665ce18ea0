"""Side inputs in every memory layout: some go to the launchers with their strides, the rest is made contiguous."""

import functools
import re
from pathlib import Path

import pytest
import torch

from tests.cuda import mixing_calls as calls
from tests.layouts import MAIN, check, operators

OPS = Path(__file__).resolve().parents[2] / "csrc" / "ops"
MIXING = [name for name in operators() if name.startswith(("mixup", "cutmix"))]
ON_GPU = [
    name
    for name in operators()
    if (OPS / f"{name.removesuffix('_fwd').removesuffix('_bwd').removesuffix('_')}_cuda.cpp").exists()
]
# Single numbers, and what a check of the operator says must be dense.
AS_THEY_ARE = {"scale", "bias", "position", "filled", "storage", "masters", "shadows", "sources"}


def operation_of(operator):
    return operator.removesuffix("_fwd").removesuffix("_bwd").removesuffix("_")


def run_launcher(gpu, name, *args):
    """An operator by its launcher, as the torch side of csrc/ops calls it; main inputs are dense."""
    library = calls.library_of(gpu, operation_of(name))
    if name in ("mixup_", "cutmix_"):
        getattr(calls, operation_of(name))(library, *args, args[0])
        return []
    if name == "mixup_bwd":
        grad, x, lam, permutation, needed = args
        results = [torch.empty_like(grad) if needed else None, None if x is None else torch.empty_like(lam)]
        if x is None:
            return [calls.mixup_bwd(library, grad, x, lam, permutation)[0]]
        grad_x, grad_lam, _ = calls.mixup_bwd(library, grad, x, lam, permutation)
        return [t for t, wanted in zip((grad_x, grad_lam), results, strict=True) if wanted is not None]
    if name.startswith("mixup_cross_entropy"):
        names = [a.name for a in getattr(torch.ops.ssl_kernels, name).chunked._schema.arguments]
        values = dict(zip(names, args, strict=True))
        values.pop("reduction", None)
        for dense in {"target", "weight", "lse"} & set(values):
            values[dense] = values[dense].contiguous()
        return getattr(calls, name)(library, **values)[:-1]
    found = getattr(calls, {"mixup_fwd": "mixup", "cutmix_fwd": "cutmix"}.get(name, name))(library, *args)
    return found[:-1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("operator", MIXING)
def test_launchers_read_side_inputs_by_their_strides(gpu, nvcc, operator, dtype):
    run = functools.partial(run_launcher, gpu)
    check(run, operator, dtype, gpu.device, unaligned=True, main=())


@pytest.mark.parametrize("operator", ON_GPU)
def test_side_inputs_go_to_launchers_with_strides_or_contiguous(operator):
    source = (OPS / f"{operation_of(operator)}_cuda.cpp").read_text()
    numbers = AS_THEY_ARE | ({"weight"} if operator == "momentum_update_" else set())
    for name in set(operators()[operator]) - numbers - MAIN.get(operator, set()):
        strided = re.search(rf"\b{name}(\.|->)stride\(", source)
        dense = re.search(rf"\b{name}_?(\.|->)contiguous\(\)|\bcontiguous\({name}\)", source)
        assert strided or dense, name
