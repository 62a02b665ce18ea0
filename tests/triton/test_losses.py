"""The losses over `contrastive`, from the public function down to the compiled Triton kernels."""

from ssl_kernels.triton import contrastive as kernels
from tests.losses.emulated import cases, check_loss, run_on


@cases
def test_loss_is_its_definition(gpu, case, monkeypatch):
    run_on(monkeypatch, kernels.contrastive_fwd, kernels.contrastive_bwd)
    with gpu.triton():
        check_loss(case, gpu.device)
