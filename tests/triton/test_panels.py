"""The panels of coefficients of the Triton backend against float64, and copies of them, broken at one place, that must
be noticed."""

import importlib

import pytest
import torch

from tests.gpu_emulation import PtxError, emulated_triton
from tests.support.contrastive import random_call
from tests.support.sigmoid_pairs import exact
from tests.support.sigmoid_pairs import random_call as random_pairs
from tests.triton.contrastive_calls import backward, check, forward
from tests.triton.mutation import load

EVERYTHING = "bias padding limit exempt"


def check_contrastive(kernels):
    """One block of rows a panel, the last of them short, and all rows in one panel."""
    double, half = torch.float64, torch.float16
    for call, scratch in (
        (
            random_call(
                70, 37, 20, double, positives=2, ids=True, both_directions=True, additions=EVERYTHING
            ),
            1,
        ),
        (random_call(70, 48, 20, double, both_directions=True, normalize=False, additions="bias"), 1 << 20),
        (random_call(35, None, 20, double, positives=2, additions=EVERYTHING), 1),
        (random_call(130, 80, 136, half, both_directions=True, data="uneven norms", additions="bias"), 1),
    ):
        kernels.panels.SCRATCH_BYTES = scratch
        check(call, kernels=kernels)
        # The other side first: a panel has columns of the operator.
        results = forward(call, kernels=kernels)
        both = backward(call, results, kernels=kernels)
        if call.square:
            continue
        other = backward(call, results, rows=False, biases=(True, False), kernels=kernels)
        expected = [both[0][:0, 0], *both[1:4], both[4][:0]]
        rtol = 1e-9 if call.rows.dtype == double else 2e-2
        for ours, right in zip(other, expected, strict=True):
            size = right.abs().max().item() if right.numel() else 1
            torch.testing.assert_close(ours, right, rtol=rtol, atol=rtol * size)
    _small_weights(kernels)
    _large_biases(kernels)


def _small_weights(kernels):
    """Gradients of a mean over many rows, below float16's smallest number, are those of a sum, scaled."""
    call = random_call(33, 40, 136, torch.float16, both_directions=True, additions="bias")
    call.rows, call.columns = call.rows / 8, call.columns / 8
    results = forward(call, kernels=kernels)
    *_, scale, by_columns, by_rows = backward(call, results, kernels=kernels)
    small = [grad * 2**-30 for grad in call.upstream()]
    *_, small_scale, small_by_columns, small_by_rows = backward(call, results, small, kernels=kernels)
    assert small_scale * 2**30 == scale != 0
    assert torch.equal(small_by_columns * 2**30, by_columns) and by_columns.abs().max() > 0
    assert torch.equal(small_by_rows * 2**30, by_rows) and by_rows.abs().max() > 0


def _large_biases(kernels):
    """Rows past the end have no exponential to overflow."""
    call = random_call(33, 40, 20, torch.float64, both_directions=True, additions="bias")
    call.column_bias[3:5], call.row_bias[5:7] = 900.0, 900.0
    check(call, kernels=kernels)


def check_sigmoid_pairs(kernels):
    double, half = torch.float64, torch.float16
    for call, scratch in (
        (random_pairs(70, 37, 20, double, scale=2.0, bias=-1.0, diagonal=3, ids="left out"), 1),
        (random_pairs(35, 20, 20, double, scale=2.0, bias=-1.0, ids="positive"), 1),
        (
            random_pairs(40, 48, 20, double, scale=0.5, bias=0.5, diagonal=-7, normalize_columns=False),
            1 << 20,
        ),
        (random_pairs(130, 80, 136, half, scale=10.0, bias=-5.0, diagonal=2), 1),
    ):
        kernels.panels.SCRATCH_BYTES = scratch
        n = len(call.rows)
        # Each row and column has a norm of its own.
        lengths = torch.logspace(-1, 1, n + len(call.columns), dtype=double)[:, None]
        if call.normalize_rows and call.normalize_columns:
            rows = (call.rows.double() * lengths[:n]).to(call.rows.dtype)
            columns = (call.columns.double() * lengths[n:]).to(call.rows.dtype)
            call = call.replace(rows=rows, columns=columns)
        ones = torch.ones(n, dtype=double)
        rtol = 1e-11 if call.rows.dtype == double else 2e-2
        # So small that float16 has lost bits of the coefficients, but none yet of the gradients.
        weights = torch.linspace(0.1, 1, n, dtype=double) * (
            2.0**-30 if call.rows.dtype == double else 2.0**-14
        )
        truth = exact(call.replace(grad_losses=ones))
        weighted = exact(call.replace(grad_losses=weights))
        operands, ids = call.operands, call.marks
        losses = kernels.sigmoid_pairs_fwd(*operands, False, True, True, True, *ids)[0]
        torch.testing.assert_close(losses, truth["losses"], rtol=1e-5 if rtol > 1e-3 else 1e-12, atol=0)
        for given, right in ((None, truth), (weights, weighted)):
            _, *right = right.values()
            for needs in ((True, True), (False, True)):
                if given is None:
                    total, *grads = kernels.sigmoid_pairs_fwd(*operands, True, True, *needs, *ids)
                    torch.testing.assert_close(
                        total, truth["losses"].sum(), rtol=max(1e-12, rtol / 1e3), atol=0
                    )
                else:
                    grads = kernels.sigmoid_pairs_bwd(given, *operands, *needs, *ids)
                expected = [g if need else g[:0, 0] for g, need in zip(right[:2], needs, strict=True)]
                for ours, exactly in zip(grads, [*expected, *right[2:]], strict=True):
                    # A row is as right as its own gradient is large.
                    size = exactly.abs().amax(-1, keepdim=True) if exactly.numel() else exactly
                    room = rtol * (size if exactly.dim() else exactly.abs())
                    assert ours.shape == exactly.shape
                    assert ((ours.double() - exactly).abs() <= room + 2.0**-25 * (rtol > 1e-3)).all()


CHECKS = {"contrastive": check_contrastive, "sigmoid_pairs": check_sigmoid_pairs}

# Where the kernels of coefficients begin, for what the kernels that walk say too.
COEFFICIENTS = "_coefficient_kernel(\n"

BOTH = [
    ("panels", "fill(part, first)", "fill(part, 0)"),
    ("panels", "own, own_rnorm = vectors[rows],", "own, own_rnorm = vectors[: len(part)],"),
    ("panels", "else rnorm[rows]", "else rnorm[: len(part)]"),
    ("panels", "else grad[rows]", "else grad[: len(part)]"),
    ("panels", "row_dots[rows]", "row_dots[: len(part)]"),
    ("panels", "scale.dtype, other_sum)", "scale.dtype)"),
    ("panels", "torch.addmm(added_to, a, b, out=added_to, **kwargs)", "torch.mm(a, b, **kwargs)"),
    ("panels", "unit = other_vectors if with_norms else", "unit = other_vectors if True else"),
    ("panels", "own = own if with_norms else", "own = own if True else"),
    ("panels", "row_dots[rows], has_rnorm=with_norms", "row_dots[rows], has_rnorm=False"),
    ("panels", "has_rnorm=with_norms", "has_rnorm=False", "other_sum[None]"),
    ("panels", "own_rnorm, scale, bound, grad_rows", "own_rnorm, scale, None, grad_rows"),
    ("panels", "scale, bound, other_grad", "scale, None, other_grad"),
    ("panels", "dtype != torch.float16", "True"),
    ("panels", "dtype != torch.float16", "False"),
]  # fmt: skip
CONTRASTIVE = [
    # The coefficients of siglip_loss are right in panels of any number of rows, only slow.
    ("panels", "max(1, SCRATCH_BYTES // bytes_per_block) * tile.block_n", "max(1, SCRATCH_BYTES // bytes_per_block)"),
    ("contrastive_bwd", "n0 = first_row + panel_row", "n0 = panel_row"),
    ("contrastive_bwd", "(tl.program_id(0) // row_blocks) * BLOCK_M", "(tl.program_id(0) % row_blocks) * BLOCK_M"),
    ("contrastive_bwd", "coefficients *= x_rnorm[:, None]", "coefficients *= 1.0"),
    ("contrastive_bwd", "coefficients *= y_rnorm[None, :]", "coefficients *= 1.0", COEFFICIENTS),
    ("contrastive_bwd", "element_ty != tl.float16", "element_ty != tl.float64"),
    ("contrastive_bwd", "coefficient_ptr.dtype.element_ty != tl.float16", "True"),
    ("contrastive_bwd", "(panel[:, None] < panel_rows) & (columns", "(panel[:, None] >= 0) & (columns"),
    ("contrastive_bwd", "(columns[None, :] < stride_c)", "(columns[None, :] <= stride_c)"),
    ("contrastive_bwd", "column_block * panel_rows + panel", "panel"),
    ("contrastive_bwd", "tl.sum(of_columns, axis=1), mask=panel < panel_rows", "tl.sum(of_columns, axis=1)"),
    ("contrastive_bwd", "of_rows = tl.where(rows[:, None] < N, of_rows, 0.0)", "of_rows = of_rows"),
    ("contrastive_bwd", "(tl.program_id(0) % row_blocks).to(tl.int64) * M + columns", "columns"),
    ("contrastive_bwd", "tl.sum(of_rows, axis=0), mask=columns < M", "tl.sum(of_rows, axis=0)"),
    ("contrastive_bwd", "row_lse is not None:", "row_lse is not None and column_lse is None:"),
    ("contrastive_bwd", "if not SQUARE:\n            row_logits =", "if SQUARE:\n            row_logits ="),
    ("contrastive_bwd", "index[None, :] == rows[:, None],", "index[None, :] == rows[:, None] + 1,"),
    ("contrastive", "grad_bias[first : first + panel_rows] =", "grad_bias[:panel_rows] ="),
    ("contrastive", "other_grad_bias.add_(", "other_grad_bias.copy_("),
    ("contrastive", "return total if bound is None else total * bound", "return total"),
]  # fmt: skip
SIGMOID = [
    ("rows = first_row + panel", "rows = panel"),
    ("column_block = tl.program_id(0) // row_blocks", "column_block = tl.program_id(0) % row_blocks"),
    ("rows.to(tl.int64)[:, None] + diagonal", "rows.to(tl.int64)[:, None] - diagonal"),
    ("tl.where(positive, -z, z)", "tl.where(positive, z, z)"),
    ("tl.where(positive, -coefficients, coefficients)", "tl.where(positive, coefficients, coefficients)"),
    ("tl.where(u >= 0.0, 1.0, decay)", "tl.where(u >= 0.0, decay, 1.0)"),
    ("row_scale *= x_rnorm", "row_scale *= 1.0"),
    ("(panel[:, None] < panel_rows) & (columns[None, :] < stride_c)", "columns[None, :] < stride_c"),
    ("< panel_rows) & (columns[None, :] < M)", "< panel_rows) & (columns[None, :] <= M)"),
    ("(columns[None, :] < stride_c)", "(columns[None, :] <= stride_c)"),
    ("(panel[:, None] < panel_rows) & (columns[None, :] < stride_c)", "(columns[None, :] < stride_c)"),
    ("sums = column_block.to(tl.int64) * panel_rows + panel", "sums = panel"),
    ("tl.store(losses_ptr + sums, losses, mask=panel < panel_rows)", "tl.store(losses_ptr + sums, losses)"),
    ("coefficients.to(tl.float64), axis=1), mask=panel < panel_rows)", "coefficients.to(tl.float64), axis=1))"),
    ("x_weight = load_vector(x_weight_ptr, rows,", "x_weight = load_vector(x_weight_ptr, panel,", COEFFICIENTS),
    ("= load_vector(y_weight_ptr, columns,", "= load_vector(y_weight_ptr, columns + 1,", COEFFICIENTS),
    ("coefficients *= x_rnorm[:, None]", "coefficients *= 1.0"),
    ("coefficients *= y_rnorm[None, :]", "coefficients *= 1.0", COEFFICIENTS),
    ("x_ids = load_vector(x_ids_ptr, rows,", "x_ids = load_vector(x_ids_ptr, panel,", COEFFICIENTS),
    ("y_ids = load_vector(y_ids_ptr, columns,", "y_ids = load_vector(y_ids_ptr, columns + 1,", COEFFICIENTS),
    ("x_ids[:, None] == y_ids[None, :]", "x_ids[:, None] != y_ids[None, :]"),
    ("x_ids[:, None] != y_ids[None, :]", "x_ids[:, None] == y_ids[None, :]"),
    ("pair_losses(u, decay, counts)", "pair_losses(u, decay, inside)", COEFFICIENTS),
    ("decay, positive, counts, x_weight, y_weight)", "decay, positive, inside, x_weight, y_weight)", COEFFICIENTS),
    ("element_ty != tl.float16", "element_ty != tl.float64"),
    ("coefficient_ptr.dtype.element_ty != tl.float16", "True"),
    ("min(panel, n - first)", "panel"),
    ("total[k] += part.sum()", "total[k] = part.sum()"),
    ("else (-diagonal, diagonal)", "else (diagonal, -diagonal)"),
    ("own_grads = grads if first == 0 else grads[::-1]", "own_grads = grads"),
    ("grad_bias if bound is None else grad_bias * bound", "grad_bias"),
    ("bound is None else grad_losses / bound", "True else grad_losses / bound"),
    ("losses.sum() if call.total else losses", "losses.sum() if not call.total else losses"),
]  # fmt: skip
MUTATIONS = [
    *((operation, *mutation) for operation in CHECKS for mutation in BOTH),
    *(("contrastive", *mutation) for mutation in CONTRASTIVE),
    *(("sigmoid_pairs", "sigmoid_pairs", *mutation) for mutation in SIGMOID),
]


@pytest.mark.parametrize("operation", CHECKS)
def test_panels_match_float64(gpu, operation, monkeypatch):
    if not gpu.emulated:
        pytest.skip("its tensors lie in memory of the host")
    kernels = importlib.import_module(f"ssl_kernels.triton.{operation}")
    monkeypatch.setattr(kernels.panels, "SCRATCH_BYTES", kernels.panels.SCRATCH_BYTES)
    with gpu.triton():
        CHECKS[operation](kernels)


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(mutation, marks=[] if mutation[3] == "n0 = panel_row" else pytest.mark.slow)
        for mutation in MUTATIONS
    ],
    ids=lambda mutation: f"{mutation[0]}: {mutation[3]}",
)
def test_mutation_is_noticed(tmp_path, monkeypatch, mutation):
    monkeypatch.syspath_prepend(tmp_path)
    broken = load(tmp_path, *mutation)
    with emulated_triton(80), pytest.raises((AssertionError, PtxError)):
        CHECKS[mutation[0]](broken)
