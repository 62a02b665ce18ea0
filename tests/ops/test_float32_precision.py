"""Products of float32 rows on the CPU where torch's settings allow less than float32: docs/numerics.md lists them."""

import pytest
import torch
from torch import backends

from ssl_kernels import _C, siglip_loss
from tests.helpers import random_rows, run_python, same_bits
from tests.support.contrastive import (
    exact,
    on_backend,
    random_call,
    relative_errors,
    results_and_gradients,
    term_sums,
)

LEVEL = _C.build_info()["cpu_instruction_set"]
KEYS = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))
SWITCHES = {
    "backends.mkldnn.matmul": lambda value: setattr(backends.mkldnn.matmul, "fp32_precision", value),
    "backends.mkldnn": lambda value: setattr(backends.mkldnn, "fp32_precision", value),
    "backends": lambda value: setattr(backends, "fp32_precision", value),
    "set_float32_matmul_precision": lambda value: torch.set_float32_matmul_precision(
        {"ieee": "highest", "tf32": "high", "bf16": "medium"}[value]
    ),
}
# The largest error in units of what a result is made of.
LARGEST_ERRORS = {"ieee": 2**-20, "tf32": 2**-13, "bf16": 2**-6}


@pytest.fixture
def allow():
    """`allow(value, switch)` sets one of torch's switches; all are as before after the test."""

    def reset():
        torch.set_float32_matmul_precision("highest")
        for key in KEYS:
            torch._C._set_fp32_precision_setter(*key, "none")

    def set_switch(value, switch="backends.mkldnn.matmul"):
        reset()
        SWITCHES[switch](value)

    before = [torch._C._get_fp32_precision_getter(*key) for key in KEYS]
    yield set_switch
    reset()
    assert [torch._C._get_fp32_precision_getter(*key) for key in KEYS] == before


def calls(dtype=torch.float32):
    """The paths of a softmax: symmetric, in two directions, and with columns that are read once."""
    yield random_call(261, None, 96, dtype)
    yield random_call(150, 190, 555, dtype, both_directions=True, ids=40)
    yield random_call(100, 290, 128, dtype)


def results(dtype=torch.float32):
    return [results_and_gradients(on_backend("native"), call) for call in calls(dtype)]


def check_errors(found, setting):
    """Against float64, by what the setting allows."""
    for results_of_call, call in zip(found, calls(), strict=True):
        errors = relative_errors(results_of_call, exact(call), term_sums(call))
        assert max(errors.values()) < LARGEST_ERRORS[setting], (setting, errors)


def same(first, second):
    return all(same_bits(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_what_each_switch_allows(allow):
    """Every switch has the effect of the narrowest, with errors that its setting allows; "ieee" is the default."""
    untouched = results()
    check_errors(untouched, "ieee")
    for setting in LARGEST_ERRORS:
        allow(setting)
        expected = results()
        check_errors(expected, setting)
        assert setting != "ieee" or same(expected, untouched)
        for switch in SWITCHES:
            allow(setting, switch)
            assert same(results(), expected), (setting, switch)


def test_less_is_taken_where_it_is_faster(allow):
    faster = {"amx": ("tf32", "bf16"), "avx512_bf16": ("bf16",)}.get(LEVEL, ())
    if LEVEL == "portable":
        pytest.skip("torch's BLAS decides at the portable level")
    untouched = results()
    for setting in ("tf32", "bf16"):
        allow(setting)
        assert same(results(), untouched) is (setting not in faster), setting


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_do_not_change(allow, dtype):
    if LEVEL == "portable":
        pytest.skip("torch's BLAS decides at the portable level")
    untouched = results(dtype)
    for setting in ("tf32", "bf16"):
        allow(setting)
        assert same(results(dtype), untouched), setting


@pytest.mark.parametrize("setting", LARGEST_ERRORS)
def test_sigmoids(allow, setting):
    rows, columns = random_rows(300, 130), random_rows(300, 130, seed=1)
    expected = siglip_loss(rows.double(), columns.double(), 10.0, -5.0, backend="reference")
    allow(setting)
    found = siglip_loss(rows, columns, 10.0, -5.0, backend="native")
    assert abs(found.item() / expected.item() - 1) < LARGEST_ERRORS[setting]


SAVE_RESULTS = """
import sys, torch
from ssl_kernels import _C
from tests.ops.test_float32_precision import results
assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
saved = {}
for setting in ("ieee", "tf32", "bf16"):
    torch.backends.mkldnn.matmul.fp32_precision = setting
    saved[setting] = results()
torch.save(saved, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", _C.build_info()["cpu_instruction_sets"])
def test_every_level_keeps_to_the_setting(tmp_path, level):
    run_python(SAVE_RESULTS, level, str(tmp_path / "results"), SSL_KERNELS_CPU=level)
    for setting, found in torch.load(tmp_path / "results").items():
        check_errors(found, setting)
