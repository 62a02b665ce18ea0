"""`contrastive` in Triton, docs/contrastive.md is the contract: its launches. Kernels are in contrastive_fwd.py and
contrastive_bwd.py, their tiles in tiles.py."""

from typing import NamedTuple

import torch
import triton

from ssl_kernels.arguments import ContrastiveBackward, ContrastiveForward
from ssl_kernels.constants import holds_expectation
from ssl_kernels.triton import panels
from ssl_kernels.triton.common import merge_lse_kernel
from ssl_kernels.triton.contrastive_bwd import (
    contrastive_bwd_kernel,
    contrastive_coefficient_kernel,
    softmax_weight_kernel,
)
from ssl_kernels.triton.contrastive_fwd import contrastive_fwd_kernel, expectation_merge_kernel
from ssl_kernels.triton.launch import (
    aligned,
    contiguous,
    cut,
    finish_rows,
    launch_options,
    precision,
    register_limit,
    row_rnorm_of,
    split_walk,
    tile_for,
    unsupported_operands,
)
from ssl_kernels.triton.tiles import WIDEST_EXPECTATION, keeps_expectation


class Side(NamedTuple):
    """One side of the similarity matrix in backward, rows or columns: vectors and what belongs to each.

    In the order in which the kernels take them.
    """

    vectors: torch.Tensor  # (N, D)
    rnorm: torch.Tensor | None
    log2_lse: torch.Tensor | None
    weight: torch.Tensor | None  # of the softmax, the incoming gradient of lse: see softmax_weight_kernel
    ids: torch.Tensor | None
    bias: torch.Tensor | None  # of its logits in the sums of the other side
    limit: torch.Tensor | None  # of the side that is the operator's rows
    exempt: torch.Tensor | None  # uint8, of the side that is the operator's columns
    positives: torch.Tensor | None  # (N, P) int32
    grad_positives: torch.Tensor | None  # over `bound`, in scale's type


def unsupported(rows, columns=None, *_, **__):
    """Why this backend cannot run a call, or None if it can; takes the arguments of `contrastive_fwd`."""
    if columns is not None and columns.dtype != rows.dtype and not keeps_expectation(rows):
        return f"columns of another dtype than rows are at most {WIDEST_EXPECTATION[4]} wide, not {rows.shape[1]}"
    return unsupported_operands(rows, columns)


def contrastive_fwd(*args, **options):
    """`contrastive_fwd` of docs/contrastive.md."""
    call = ContrastiveForward(*args, **options)
    rows, columns, scale, positives, _, column_ids, *_ = call
    square = columns is None
    n, width = rows.shape
    m = n if square else columns.shape[0]
    has_expectation = call.wants_expectation and keeps_expectation(rows)
    rows = aligned(rows, n * m, has_expectation)
    columns = None if square else aligned(columns, n * m, has_expectation)
    d = rows.shape[1]
    row_rnorm = row_rnorm_of(rows, scale) if call.normalize_rows else None
    if square:
        columns, column_ids, column_rnorm = rows, call.row_ids, row_rnorm
    else:
        column_rnorm = row_rnorm_of(columns, scale) if call.normalize_columns else None
    if positives is not None and positives.numel() == 0:
        positive_logits, positives = _empty_float64(scale, positives.shape), None
    elif positives is not None:
        positives = positives.contiguous()
        positive_logits = _empty_float64(scale, positives.shape)
    else:
        positive_logits = _empty_float64(scale, 0)

    expectation = scale.new_empty(n, d) if has_expectation else None
    tile = tile_for("expectation" if has_expectation else "forward", rows)
    blocks, tiles = triton.cdiv(n, tile.block_n), triton.cdiv(m, tile.block_m)
    splits, tiles_per_split = split_walk(blocks, tiles)
    lse = _empty_float64(scale, n)
    row_partial = scale.new_empty(2, splits, n) if splits > 1 or expectation is not None else None
    expectation_partial = None if expectation is None else scale.new_empty(splits, n, d)
    # The column sums of each row block are merged panel by panel, in scratch that does not grow with N.
    panel = blocks
    if call.both_directions:
        panel = min(blocks, max(1, panels.SCRATCH_BYTES // (2 * m * scale.element_size())))
    column_partial = scale.new_empty(2, 1 + panel, m) if call.both_directions else None
    column_lse = _empty_float64(scale, m if call.both_directions else 0)
    for first in range(0, blocks, panel):
        panel_blocks = min(panel, blocks - first)
        contrastive_fwd_kernel[panel_blocks, splits](
            rows,
            columns,
            scale,
            row_rnorm,
            column_rnorm,
            contiguous(call.row_ids),
            contiguous(column_ids),
            contiguous(call.row_bias),
            contiguous(call.column_bias),
            contiguous(call.row_limit),
            _bytes(call.exempt),
            positives,
            positive_logits if positives is not None else None,
            lse,
            row_partial,
            column_partial,
            expectation_partial,
            n,
            m,
            d,
            positives.numel() // n if positives is not None else 0,
            *rows.stride(),
            *columns.stride(),
            first,
            tiles_per_split,
            1 + panel,
            SQUARE=square,
            KEEP_DIAGONAL=call.keep_diagonal,
            ONLY_EQUAL_IDS=call.only_equal_ids,
            PRECISION=precision(rows),
            EVEN_D=d % tile.block_d == 0,
            ONE_BLOCK_D=d <= tile.block_d,
            **launch_options(tile),
        )
        if call.both_directions:
            # Slot 0 carries the sums of the panels before.
            first_part = 1 if first == 0 else 0
            last = first + panel_blocks == blocks
            parts = panel_blocks + 1 - first_part
            _merge_lse(column_partial, column_lse if last else None, first_part, parts)
    if row_partial is not None:
        _merge_lse(row_partial, lse, 0, splits)
    if expectation is not None:
        block_n, block_d = 16, min(128, triton.next_power_of_2(d))
        expectation_merge_kernel[triton.cdiv(n, block_n), triton.cdiv(d, block_d)](
            row_partial, expectation_partial, expectation, n, d, splits, BLOCK_N=block_n, BLOCK_D=block_d
        )

    return (
        lse,
        column_lse,
        positive_logits,
        scale.new_empty(0) if row_rnorm is None else row_rnorm,
        scale.new_empty(0) if square or column_rnorm is None else column_rnorm,
        scale.new_empty(0) if expectation is None else cut(expectation, width),  # logits are recomputed
    )


def contrastive_bwd(*args, **options):
    """`contrastive_bwd` of docs/contrastive.md."""
    call = ContrastiveBackward(*args, **options)
    if holds_expectation(call.kept):
        return _bwd_from_expectation(call)
    grad_lse, grad_column_lse, grad_positive_logits, rows, columns, scale, positives, *_ = call
    square = columns is None
    width, entries = rows.shape[1], len(rows) * len(rows if square else columns)
    rows, columns = aligned(rows, entries), None if square else aligned(columns, entries)
    has_positives = positives is not None and grad_positive_logits is not None and positives.numel() > 0
    has_columns = call.both_directions and grad_column_lse is not None
    if not has_columns:
        grad_column_lse = None
    if not has_positives:
        grad_positive_logits = None
    if not has_positives and (call.row_limit is None or positives is None or positives.numel() == 0):
        positives = None
    bound = None
    if rows.dtype == torch.float16:
        bound = _gradient_bound((grad_lse, grad_column_lse, grad_positive_logits), scale)
    if positives is not None:
        m = rows.shape[0] if square else columns.shape[0]
        positives = positives.remainder(m).to(torch.int32).reshape(rows.shape[0], -1).contiguous()
    if has_positives:
        grad_positive_logits = grad_positive_logits if bound is None else grad_positive_logits / bound
        grad_positive_logits = grad_positive_logits.to(scale.dtype).reshape(positives.shape).contiguous()
    has_both_sums = grad_lse is not None and (square or grad_column_lse is not None)
    has_norms = call.normalize_rows and (square or call.normalize_columns)
    has_additions = any(each is not None for each in (call.column_bias, call.row_bias, call.row_limit))
    shared_factor = _shared_factor(rows.dtype) if has_both_sums and has_norms and not has_additions else None
    row_side = Side(
        rows,
        call.row_rnorm.contiguous() if call.normalize_rows else None,
        *_softmax_weight(call.lse, grad_lse, bound, scale, shared_factor),
        contiguous(call.row_ids),
        contiguous(call.column_bias if square else call.row_bias),
        contiguous(call.row_limit),
        _bytes(call.exempt) if square else None,
        positives,
        grad_positive_logits,
    )
    if square:
        column_side = row_side
    else:
        column_side = Side(
            columns,
            call.column_rnorm.contiguous() if call.normalize_columns else None,
            *_softmax_weight(call.column_lse, grad_column_lse, bound, scale, shared_factor),
            contiguous(call.column_ids),
            contiguous(call.column_bias),
            None,
            _bytes(call.exempt),
            None,
            None,
        )
    masks = {
        "SQUARE": square,
        "KEEP_DIAGONAL": call.keep_diagonal,
        "ONLY_EQUAL_IDS": call.only_equal_ids,
        "SHARED_FACTOR": shared_factor,
    }
    # The gradient of a side's bias comes from the walk that gives that of its vectors: (vectors, bias) wanted.
    row_grads = call.rows_need_grad, call.column_bias_needs_grad if square else call.row_bias_needs_grad
    column_grads = call.columns_need_grad and not square, call.column_bias_needs_grad and not square
    # The row dots of either side give the gradient of scale.
    rows_first = any(row_grads) or square or not any(column_grads)
    both = any(row_grads) and any(column_grads)
    sides = (row_side, row_grads), (column_side, column_grads)
    first, second = sides if rows_first else sides[::-1]

    if tile_for("backward", rows) is not None:
        *first_grads, row_dots = _bwd_fused(*first, second[0], scale, bound, masks)
        second_grads = _bwd_fused(*second, first[0], scale, bound, masks)[:2] if both else (None, None)
    else:
        first_grads, second_grads, row_dots = _bwd_panels(
            *first, *(second if both else (second[0], (False, False))), scale, bound, masks
        )

    row_results, column_results = (first_grads, second_grads) if rows_first else (second_grads, first_grads)
    by_biases = (row_results[1], None) if square else (column_results[1], row_results[1])
    return (
        *(
            rows.new_empty(0) if grad is None else cut(grad, width)
            for grad in (row_results[0], column_results[0])
        ),
        row_dots.sum() * 0.5 if square else row_dots.sum(),
        *(scale.new_empty(0) if grad is None else grad for grad in by_biases),
    )


def _bwd_from_expectation(call):
    """Gradients of rows and scale where the forward kept the expectation of the columns: no walk over columns."""
    rows, scale, positives = call.rows, call.scale, call.positives
    n = rows.shape[0]
    expectation = call.kept.contiguous()
    gradient = torch.zeros_like(expectation)
    if call.grad_lse is not None:
        gradient = call.grad_lse.to(scale.dtype)[:, None] * expectation
    if positives is not None and call.grad_positive_logits is not None and positives.numel() > 0:
        index = positives.remainder(call.columns.shape[0]).reshape(n, -1)
        weight = call.grad_positive_logits.to(scale.dtype).reshape(index.shape)
        if call.normalize_columns:
            weight = weight * call.column_rnorm[index]
        for k in range(index.shape[1]):
            gradient += weight[:, k, None] * call.columns[index[:, k]].to(scale.dtype)
    grad = torch.empty_like(rows, memory_format=torch.contiguous_format) if call.rows_need_grad else None
    row_dots = scale.new_empty(n)
    row_rnorm = call.row_rnorm.contiguous() if call.normalize_rows else None
    finish_rows(gradient[None], rows, row_rnorm, scale, None, grad, row_dots)
    nothing = (scale.new_empty(0), scale.new_empty(0))
    return rows.new_empty(0) if grad is None else grad, rows.new_empty(0), row_dots.sum(), *nothing


def _bwd_fused(side, needed, other, scale, bound, masks):
    """Gradients of one side's vectors and bias, None where not needed, and its row dots.

    In one kernel, unless the walk over the other side is split.
    """
    n, d = side.vectors.shape
    m = other.vectors.shape[0]
    tile = tile_for("backward", side.vectors)
    tiles = triton.cdiv(m, tile.block_m)
    splits, tiles_per_split = split_walk(triton.cdiv(n, tile.block_n), tiles)
    grad = torch.empty_like(side.vectors, memory_format=torch.contiguous_format) if needed[0] else None
    row_dots = scale.new_empty(n)
    partial = scale.new_empty(splits, n, d) if splits > 1 else None
    bias_partial = scale.new_empty(splits, n) if needed[1] and other.log2_lse is not None else None
    contrastive_bwd_kernel[triton.cdiv(n, tile.block_n), splits](
        *side,
        *other,
        scale,
        bound,
        grad,
        row_dots,
        partial,
        bias_partial,
        n,
        m,
        d,
        _positives_per_row(side, other),
        *side.vectors.stride(),
        *other.vectors.stride(),
        tiles_per_split,
        **masks,
        PRECISION=precision(side.vectors),
        EVEN_D=d == tile.block_d,
        **launch_options(tile),
    )
    if partial is not None:
        finish_rows(partial, side.vectors, side.rnorm, scale, bound, grad, row_dots, has_rnorm=False)
    grad_bias = scale.new_zeros(n) if needed[1] else None
    if bias_partial is not None:
        grad_bias = _bias_gradient(bias_partial, bound)
    return grad, grad_bias, row_dots


def _bias_gradient(partial, bound):
    """Gradient of a bias from its parts (parts, N), which are over `bound`."""
    total = partial.sum(0)
    return total if bound is None else total * bound


def _bwd_panels(side, needed, other, other_needed, scale, bound, masks):
    """Gradients (vectors, bias) of one side and of the other, None where not needed, and the row dots of the one."""
    n, d = side.vectors.shape
    m = other.vectors.shape[0]
    tile = tile_for("coefficient", side.vectors)
    grad, other_grad = (
        torch.empty_like(each.vectors, memory_format=torch.contiguous_format) if wanted[0] else None
        for each, wanted in ((side, needed), (other, other_needed))
    )
    grad_bias = scale.new_zeros(n) if needed[1] else None
    other_grad_bias = scale.new_zeros(m) if other_needed[1] else None

    def fill(coefficients, first):
        panel_rows = len(coefficients)
        row_blocks, column_blocks = triton.cdiv(panel_rows, tile.block_n), triton.cdiv(m, tile.block_m)
        bias_partial = other_bias_partial = None
        if needed[1] and other.log2_lse is not None:
            bias_partial = scale.new_empty(column_blocks, panel_rows)
        if other_needed[1] and side.log2_lse is not None:
            other_bias_partial = scale.new_empty(row_blocks, m)
        contrastive_coefficient_kernel[row_blocks * column_blocks,](
            *side,
            *other,
            scale,
            coefficients,
            bias_partial,
            other_bias_partial,
            n,
            m,
            d,
            _positives_per_row(side, other),
            *side.vectors.stride(),
            *other.vectors.stride(),
            coefficients.stride(0),
            first,
            panel_rows,
            **masks,
            PRECISION=precision(side.vectors),
            EVEN_D=d % tile.block_d == 0,
            ONE_BLOCK_D=d <= tile.block_d,
            **launch_options(tile),
            maxnreg=register_limit(tile),  # one tile per program: only other blocks fill its waits
        )
        if bias_partial is not None:
            grad_bias[first : first + panel_rows] = _bias_gradient(bias_partial, bound)
        if other_bias_partial is not None:
            other_grad_bias.add_(_bias_gradient(other_bias_partial, bound))

    row_dots = panels.panel_gradients(
        (side.vectors, side.rnorm), (other.vectors, other.rnorm), tile, fill, scale, bound, grad, other_grad
    )
    return (grad, grad_bias), (other_grad, other_grad_bias), row_dots


def _merge_lse(partial, lse, first_part, parts):
    _, slots, n = partial.shape
    block_n = 128
    merge_lse_kernel[triton.cdiv(n, block_n),](partial, lse, first_part, parts, slots, n, BLOCK_N=block_n)


def _softmax_weight(lse, grad_lse, bound, scale, shared_factor):
    """lse and its gradient as the tiles take them, see softmax_weight_kernel; (None, None) without one."""
    if grad_lse is None:
        return None, None
    n = lse.shape[0]
    log2_lse, weight = scale.new_empty(2, n)
    block_n = 128
    softmax_weight_kernel[triton.cdiv(n, block_n),](
        lse.contiguous(),
        grad_lse.contiguous(),
        bound,
        scale,
        log2_lse,
        weight,
        n,
        SHARED_FACTOR=shared_factor,
        BLOCK_N=block_n,
    )
    return log2_lse, weight


def _shared_factor(dtype):
    """SHARED_FACTOR of the kernels where both sides have sums of the same logits of normalised rows, or None.

    The factor keeps weights in float32's range whose powers 2^-log2_lse are as small as 2^-63; float16 has its bound
    for that. In float64 the second way of a kernel's branch would take registers that there are not.
    """
    if dtype == torch.float64:
        return None
    return 1.0 if dtype == torch.float16 else 2.0**40


def _gradient_bound(gradients, scale):
    """Largest magnitude of the incoming gradients, 0-d on the device in scale's type, never 0."""
    largest = [grad.abs().amax() for grad in gradients if grad is not None]
    if not largest:
        return None
    return torch.stack(largest).amax().clamp_min(1e-30).to(scale.dtype)


def _bytes(flags):
    return None if flags is None else flags.contiguous().view(torch.uint8)


def _empty_float64(like, *shape):
    return torch.empty(*shape, dtype=torch.float64, device=like.device)


def _positives_per_row(*sides):
    return max(0 if side.positives is None else side.positives.shape[1] for side in sides)
