"""The losses over `contrastive` and `row_pairs`, from the public function down to the compiled Triton kernels."""

from ssl_kernels.ops import contrastive, row_pairs
from ssl_kernels.triton import contrastive as tiles
from ssl_kernels.triton import row_pairs as pairs
from tests.losses.emulated import cases, check_loss, run_on


@cases
def test_loss_is_its_definition(gpu, case, monkeypatch):
    operators = {
        contrastive: (tiles.contrastive_fwd, tiles.contrastive_bwd),
        row_pairs: (pairs.row_pairs_fwd, pairs.row_pairs_bwd),
    }
    run_on(monkeypatch, operators)
    with gpu.triton():
        check_loss(case, gpu.device)
