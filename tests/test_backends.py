"""The choice of a backend, and the package where the extension or Triton is missing."""

import pytest
import torch

import ssl_kernels
from ssl_kernels import backends, backends_for, nt_xent_loss, use_backend
from tests.helpers import random_rows, run_python

Z = random_rows(4, 8)


def chosen(**options):
    return backends.choose_backend("contrastive", options.get("backend"), "test", Z)


def test_order_of_preference():
    assert backends.BACKENDS == ("native", "triton", "chunked", "reference")
    assert chosen() == "native"


def test_use_backend_as_a_context_manager():
    with use_backend("chunked"):
        assert chosen() == "chunked"
        with use_backend("reference"):
            assert chosen() == "reference"
            with use_backend(None):
                assert chosen() == "native"
        assert chosen() == "chunked"
    assert chosen() == "native"


def test_use_backend_as_a_setter():
    try:
        use_backend("reference")
        assert chosen() == "reference"
        use_backend(None)
        assert chosen() == "native"
    finally:
        use_backend(None)


def test_backend_is_restored_after_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "native"


def test_argument_goes_before_use_backend():
    with use_backend("reference"):
        assert chosen(backend="chunked") == "chunked"


def test_forced_backend_really_runs(monkeypatch):
    def fail(*_):
        raise AssertionError("chunked ran")

    monkeypatch.setitem(ssl_kernels.ops.contrastive._fwd, "chunked", fail)
    nt_xent_loss(Z, Z)
    with use_backend("chunked"), pytest.raises(AssertionError, match="chunked ran"):
        nt_xent_loss(Z, Z)
    with pytest.raises(AssertionError, match="chunked ran"):
        nt_xent_loss(Z, Z, backend="chunked")


def test_forced_backend_that_cannot_run_says_why():
    with use_backend("triton"):
        with pytest.raises(
            ValueError, match=r'^nt_xent_loss: backend "triton" cannot run this call: it runs on cuda'
        ):
            nt_xent_loss(Z, Z)
        nt_xent_loss(Z, Z, backend="native")


@pytest.mark.parametrize("name", ["cuda", "", 1, "Native"])
def test_unknown_name_is_refused_and_changes_nothing(name):
    with pytest.raises(
        ValueError, match=r"^use_backend: name must be one of native, triton, chunked, reference or None"
    ):
        use_backend(name)
    assert chosen() == "native"


@pytest.mark.parametrize("op", ["contrastive", nt_xent_loss])
def test_backends_for_explains(op):
    found = backends_for(op, Z, Z, 0.5)
    assert list(found) == list(backends.BACKENDS)
    assert found["triton"] == "it runs on cuda, not on cpu"
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]
    meta = backends_for(op, Z.to("meta"), Z.to("meta"))
    assert meta["native"] == "it runs on cpu and cuda, not on meta"
    assert meta["chunked"] is None


@pytest.mark.parametrize("op", ["nt_xent", print])
def test_backends_for_an_unknown_operation(op):
    with pytest.raises(ValueError, match=r"^backends_for: op must be one of .*contrastive.* or a loss, got"):
        backends_for(op, Z)


WITHOUT = """
import sys
import torch
sys.modules[{module!r}] = None  # as if it were not there
import ssl_kernels
z0, z1 = torch.randn(2, 40, 8, requires_grad=True).unbind(0)
losses = [ssl_kernels.nt_xent_loss(z0, z1, backend=name) for name in (None, "chunked", "reference")]
torch.testing.assert_close(losses[0], losses[1])
torch.testing.assert_close(losses[0], losses[2])
sum(losses).backward()
reasons = ssl_kernels.backends_for("contrastive", z0)
print(reasons[{backend!r}])
try:
    ssl_kernels.nt_xent_loss(z0, z1, backend={backend!r})
except ValueError as error:
    print(error)
"""


def test_works_without_the_extension():
    output = run_python(WITHOUT.format(module="ssl_kernels._C", backend="native")).splitlines()
    assert output[0].startswith("the extension ssl_kernels._C is not built or does not load (")
    assert output[1] == f'nt_xent_loss: backend "native" cannot run this call: {output[0]}'


def test_works_without_triton():
    """On the CPU the device is why Triton cannot run; nothing imports it."""
    output = run_python(WITHOUT.format(module="triton", backend="triton")).splitlines()
    assert output[1] == f'nt_xent_loss: backend "triton" cannot run this call: {output[0]}'


def test_importing_the_package_imports_no_optional_package():
    code = """
import sys
import torch
before = set(sys.modules)
import ssl_kernels
print(sorted(name for name in set(sys.modules) - before if "." not in name))
"""
    assert run_python(code).strip() == "['ssl_kernels']"


def test_extension_tells_what_was_built():
    info = backends.extension.build_info()
    assert info["torch"] == torch.__version__
    assert (
        info["cpu_instruction_set"] in info["cpu_instruction_sets"]
        and info["cpu_instruction_sets"][-1] == "portable"
    )
