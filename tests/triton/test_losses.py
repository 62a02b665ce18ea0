"""Every loss, from the public function down to the compiled Triton kernels."""

import pytest
import torch

from ssl_kernels.ops import batch_hard, contrastive, row_pairs, sigmoid_pairs
from ssl_kernels.triton import batch_hard as mining
from ssl_kernels.triton import contrastive as tiles
from ssl_kernels.triton import row_pairs as pairs
from ssl_kernels.triton import sigmoid_pairs as sigmoids
from tests.losses.emulated import cases, check_edge, check_loss, check_moco, edges, run_on

CONTRASTIVE = {(contrastive, "_fwd"): tiles.contrastive_fwd, (contrastive, "_bwd"): tiles.contrastive_bwd}
OPERATORS = {
    **CONTRASTIVE,
    (row_pairs, "_fwd"): pairs.row_pairs_fwd,
    (row_pairs, "_bwd"): pairs.row_pairs_bwd,
    (sigmoid_pairs, "_fwd"): sigmoids.sigmoid_pairs_fwd,
    (sigmoid_pairs, "_bwd"): sigmoids.sigmoid_pairs_bwd,
    (batch_hard, "_mine"): mining.batch_hard,
}


@cases
def test_loss_is_its_definition(gpu, case, monkeypatch):
    run_on(monkeypatch, OPERATORS)
    with gpu.triton():
        check_loss(case, gpu.device)


@edges
def test_loss_at_an_edge(gpu, edge, monkeypatch):
    run_on(monkeypatch, OPERATORS)
    with gpu.triton():
        check_edge(edge, gpu.device, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pushes", [(30,), (50, 60, 7)], ids=["half-filled", "wrapped"])
def test_moco_against_a_queue(gpu, monkeypatch, dtype, pushes):
    with gpu.triton():
        check_moco(monkeypatch, gpu.device, dtype, pushes, CONTRASTIVE)
