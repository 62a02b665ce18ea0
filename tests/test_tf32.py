"""The switches of torch for TF32: what the kernels make of them, old and new ones in any combination and order."""

import itertools

import pytest
import torch
from torch import backends as torch_backends

from ssl_kernels import backends, nt_xent_loss
from ssl_kernels.triton import contrastive, launch
from tests.gpu_emulation.fixtures import gpu

__all__ = ["gpu"]

MATMUL = torch_backends.cuda.matmul
OLD = {
    "nothing": (lambda: None, None),
    "allow_tf32 = True": (lambda: setattr(MATMUL, "allow_tf32", True), "tf32"),
    "allow_tf32 = False": (lambda: setattr(MATMUL, "allow_tf32", False), "ieee"),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
}
NEW = {  # from the most general, which the others override
    "all": (torch_backends, "fp32_precision"),
    "cuda": (torch_backends.cudnn, "fp32_precision"),
    "matmul": (MATMUL, "fp32_precision"),
}
VALUES = (None, "none", "ieee", "tf32")
PAIRS = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))


@pytest.fixture
def switches():
    """A function that puts every switch back to where it was when torch was loaded; the test ends with it."""
    before = [torch._C._get_fp32_precision_getter(*pair) for pair in PAIRS]

    def reset():
        torch.set_float32_matmul_precision("highest")
        for pair in PAIRS:
            torch._C._set_fp32_precision_setter(*pair, "none")

    yield reset
    reset()
    assert [torch._C._get_fp32_precision_getter(*pair) for pair in PAIRS] == before
    assert MATMUL.allow_tf32 is False


def settings():
    """(what to set in this order, whether it allows TF32) for every combination."""
    for (old, settled), values in itertools.product(OLD.values(), itertools.product(VALUES, repeat=3)):
        new = dict(zip(NEW, values, strict=True))
        for newer_last in (True, False):
            # The old switch and the new one of products are one; "none" leaves it to the next more general.
            last = [settled, new["matmul"]] if newer_last else [new["matmul"], settled]
            products = next((value for value in reversed(last) if value is not None), "none")
            found = next(
                (value for value in (products, new["cuda"], new["all"]) if value in ("ieee", "tf32")), ""
            )
            yield old, new, newer_last, found == "tf32"


def test_every_combination_of_switches(switches):
    rows, wide = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float64)
    allowed = 0
    for old, new, newer_last, expected in settings():
        switches()
        if newer_last:
            old()
        for name, value in new.items():
            if value is not None:
                setattr(*NEW[name], value)
        if not newer_last:
            old()
        assert launch.precision(rows) == ("tf32" if expected else "ieee"), (new, newer_last)
        assert launch.precision(wide) == launch.precision(rows.half()) == "ieee"
        if backends.extension is not None:
            assert backends.extension.allow_tf32() is expected, (new, newer_last)
        allowed += expected
    assert 0 < allowed < len(list(settings()))


SETTINGS = {
    "old": (lambda: setattr(MATMUL, "allow_tf32", True), True),
    "new, of everything": (lambda: setattr(torch_backends, "fp32_precision", "tf32"), True),
    "new, of products": (lambda: setattr(MATMUL, "fp32_precision", "tf32"), True),
    "new, exact": (lambda: setattr(MATMUL, "fp32_precision", "ieee"), False),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_in_triton_follow(setting, switches, gpu):
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    operands = (rows.to(gpu.device), None, torch.tensor(2.0, device=gpu.device), None, None, None)
    change, tf32 = SETTINGS[setting]
    change()
    with gpu.triton() as launches:
        lse, *_ = contrastive.contrastive_fwd(*operands, False, False, False, False, True, True)
    logits = (2 * rows.double() @ rows.double().T).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(lse.cpu(), logits.logsumexp(1), rtol=5e-3 if tf32 else 1e-6, atol=0)
    if gpu.emulated:
        assert any(launch.counters.mma for launch in launches) == tf32


@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_on_the_cpu_run(setting, backend, switches):
    z0, z1 = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    exact = nt_xent_loss(z0.double(), z1.double(), backend="reference")
    SETTINGS[setting][0]()
    z0.requires_grad_()
    loss = nt_xent_loss(z0, z1, backend=backend)
    loss.backward()
    # Processors with instructions for it may round the operands of torch's own products.
    torch.testing.assert_close(loss.double(), exact, rtol=5e-3, atol=0)
    assert z0.grad.isfinite().all()
