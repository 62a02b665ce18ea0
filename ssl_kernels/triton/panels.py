"""Gradients of rows too wide for an accumulator: stored coefficients, multiplied by torch's own matrix product.

A kernel stores the gradient C of a panel of rows of the logits; both sides' gradients come from it, C · y and Cᵀ · x.
So an operation needs 2 units of products for one side and 3 for both, all but the first at the speed of cuBLAS. On
one stream the order of its sums does not change from call to call.
"""

import torch
import triton

from ssl_kernels.triton.launch import finish_rows

# Scratch that does not grow with the problem: what is stored of a panel of rows stays below this.
SCRATCH_BYTES = 128 << 20


def panel_gradients(side, other, tile, fill, scale, bound, grad, other_grad):
    """Writes the gradients of one side and of the other where given, and returns the row dots of the one.

    Args:
        side, other: (vectors (N, D), rnorm (N,) or None) of each.
        tile: of the kernel that `fill` launches: a panel has whole blocks of its rows.
        fill: fill(coefficients, first) stores C for the rows first + [0, len(coefficients)) in the first M columns of
            coefficients (panel rows, M rounded up to a multiple of 16), and anything in the others; rnorm_i C_ij
            rnorm_j `norms_in_panel`.
        scale, bound: as in finish_rows_kernel.
        grad, other_grad: (N, D) and (M, D), contiguous, or None.
    """
    (vectors, rnorm), (other_vectors, other_rnorm) = side, other
    n, m = len(vectors), len(other_vectors)
    with_norms = norms_in_panel(vectors.dtype)
    unit = other_vectors if with_norms else _normalized(other_vectors, other_rnorm)
    panel = panel_rows(vectors, m, tile)
    coefficients = vectors.new_empty(panel, _row_elements(m))
    row_dots = scale.new_empty(n)
    other_sum = None
    for first in range(0, n, panel):
        rows = slice(first, min(n, first + panel))
        part = coefficients[: rows.stop - first]
        fill(part, first)
        part = part[:, :m]
        own, own_rnorm = vectors[rows], None if rnorm is None else rnorm[rows]
        grad_rows = None if grad is None else grad[rows]
        product = wide_product(part, unit, scale.dtype)[None]
        finish_rows(product, own, own_rnorm, scale, bound, grad_rows, row_dots[rows], has_rnorm=with_norms)
        if other_grad is not None:
            own = own if with_norms else _normalized(own, own_rnorm)
            other_sum = wide_product(part.T, own, scale.dtype, other_sum)
    if other_grad is not None:
        finish_rows(
            other_sum[None], other_vectors, other_rnorm, scale, bound, other_grad, scale.new_empty(m),
            has_rnorm=with_norms,
        )  # fmt: skip
    return row_dots


def panel_rows(vectors, m, tile):
    """Rows (N, D) of a panel whose coefficients for m columns fit the scratch: whole blocks of a tile, or all rows."""
    bytes_per_block = _row_elements(m) * vectors.element_size() * tile.block_n
    return min(len(vectors), max(1, SCRATCH_BYTES // bytes_per_block) * tile.block_n)


def norms_in_panel(dtype):
    """Whether coefficients are stored with the norms of both sides; float16 has not the range for that."""
    return dtype != torch.float16


def wide_product(a, b, dtype, added_to=None):
    """a (N, K) · b (K, D), with sums and result in `dtype`; with `added_to` (N, D), of that dtype, added in its memory.

    float32 obeys torch's settings for TF32.
    """
    if a.dtype == dtype or a.device.type == "cpu":  # torch's CPU product has the dtype of its operands
        a, b, kwargs = a.to(dtype), b.to(dtype), {}
    else:
        kwargs = {"out_dtype": dtype}
    if added_to is None:
        return torch.mm(a, b, **kwargs)
    return torch.addmm(added_to, a, b, out=added_to, **kwargs)  # reads and writes it once


def _row_elements(m):
    return triton.cdiv(m, 16) * 16


def _normalized(vectors, rnorm):
    return vectors if rnorm is None else (vectors * rnorm[:, None]).to(vectors.dtype)
