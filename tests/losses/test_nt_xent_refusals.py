"""What nt_xent_loss refuses: every message for bad input, raised before anything is computed."""

import math

import pytest
import torch

import ssl_kernels
from ssl_kernels import nt_xent_loss
from tests.helpers import BACKENDS

Z = torch.ones(4, 8)
BAD_CALLS = {
    "z0 is a list": (TypeError, "z0 must be a tensor, got list", ([[1.0]], Z)),
    "z1 is None": (TypeError, "z1 must be a tensor, got NoneType", (Z, None)),
    "integers": (
        TypeError,
        "z0 must be float64, float32, float16 or bfloat16, got int64",
        (Z.long(), Z.long()),
    ),
    "complex": (TypeError, "z0 must be .*, got complex64", (Z.cfloat(), Z.cfloat())),
    "bool": (TypeError, "z0 must be .*, got bool", (Z.bool(), Z.bool())),
    "float8": (TypeError, "z0 must be .*, got float8_e4m3fn", (Z.to(torch.float8_e4m3fn), Z)),
    "dtypes differ": (TypeError, "z1 must be float32 as z0 is, got float64", (Z, Z.double())),
    "one dimension": (ValueError, r"z0 must have shape \(N, D\) .*, got \(8,\)", (Z[0], Z[0])),
    "three dimensions": (ValueError, r"z0 must have shape \(N, D\) .*, got \(1, 4, 8\)", (Z[None], Z[None])),
    "empty batch": (ValueError, r"z0 must have .* N, D >= 1, got \(0, 8\)", (Z[:0], Z[:0])),
    "no width": (ValueError, r"z0 must have .* N, D >= 1, got \(4, 0\)", (Z[:, :0], Z[:, :0])),
    "widths differ": (ValueError, "z1 must have width 8 as z0 has, got 7", (Z, Z[:, :7])),
    "batches differ": (ValueError, "z1 must have 4 rows as z0 has, got 3", (Z, Z[:3])),
    "devices differ": (ValueError, "z1 must be on cpu as z0 is, got meta", (Z, Z.to("meta"))),
    "temperature 0": (ValueError, "temperature must be finite and > 0, got 0", (Z, Z, 0)),
    "temperature negative": (ValueError, "temperature must be finite and > 0, got -0.5", (Z, Z, -0.5)),
    "temperature nan": (ValueError, "temperature must be finite and > 0, got nan", (Z, Z, math.nan)),
    "temperature inf": (ValueError, "temperature must be finite and > 0, got inf", (Z, Z, math.inf)),
    "temperature bool": (
        TypeError,
        "temperature must be a number or a tensor of one element, got bool",
        (Z, Z, True),
    ),
    "temperature str": (
        TypeError,
        "temperature must be a number or a tensor of one element, got str",
        (Z, Z, "0.5"),
    ),
    "temperature None": (
        TypeError,
        "temperature must be a number or a tensor of one element, got NoneType",
        (Z, Z, None),
    ),
    "temperature of two": (
        ValueError,
        r"temperature must be .* got shape \(2,\), float32",
        (Z, Z, torch.ones(2)),
    ),
    "temperature int tensor": (
        ValueError,
        r"temperature must be .* got shape \(\), int64",
        (Z, Z, torch.tensor(1)),
    ),
    "temperature elsewhere": (
        ValueError,
        "temperature must be on cpu, got meta",
        (Z, Z, torch.ones((), device="meta")),
    ),
}
BAD_OPTIONS = {
    "reduction": (ValueError, 'reduction must be "mean", "sum" or "none", got \'avg\'', {"reduction": "avg"}),
    "no reduction": (ValueError, "reduction must be .*, got None", {"reduction": None}),
    "backend": (ValueError, "backend must be \"native\", .* or None, got 'cuda'", {"backend": "cuda"}),
    "triton": (
        ValueError,
        'backend "triton" cannot run this call: it runs on cuda, not on cpu',
        {"backend": "triton"},
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_fixture_notices_a_call(nothing_runs, backend, reduction):
    with pytest.raises(pytest.fail.Exception, match="ran on bad input"):
        nt_xent_loss(Z, Z, reduction=reduction, backend=backend)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name, nothing_runs):
    error, message, arguments = BAD_CALLS[name]
    for call in (nt_xent_loss, lambda z0, z1, t=0.5: ssl_kernels.nn.NTXentLoss(t)(z0, z1)):
        with pytest.raises(error, match=f"^nt_xent_loss: {message}"):
            call(*arguments)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_is_named(name, nothing_runs):
    error, message, options = BAD_OPTIONS[name]
    for call in (lambda: nt_xent_loss(Z, Z, **options), lambda: ssl_kernels.nn.NTXentLoss(**options)(Z, Z)):
        with pytest.raises(error, match=f"^nt_xent_loss: {message}"):
            call()


def test_a_device_without_kernels_is_named():
    z = Z.to("meta")
    with pytest.raises(
        ValueError, match='backend "native" cannot run this call: it runs on cpu and cuda, not on meta'
    ):
        nt_xent_loss(z, z, backend="native")
