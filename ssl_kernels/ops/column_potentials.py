"""`column_potentials`: what Sinkhorn's iterations add to the logits of each column, in logarithms.

With logits L (N, K), an iteration scales the columns of exp(L) to equal sums and then the rows to sum 1. After any
number of them the matrix is softmax over each row of L_ij + v_j, so that v, one number for a column, is all there is to
keep:

    u_i = −log Σ_j exp(L_ij + v_j)   (0 in the first iteration),   v_j = −log Σ_i exp(L_ij + u_i)

No exponential is taken but of a number less the largest of its sum. Where the logits lie so near one another that no
scaled matrix leaves float32, exp(L) is made once, and an iteration is two products of it with a vector.
"""

import torch

from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK, without_autocast
from ssl_kernels.ops.library import library

SAFE_RANGE = 40.0  # exp(−2 · 40), the least that sums of terms are divided to, is a normal float32

library.define(
    "column_potentials(Tensor rows, Tensor? columns, Tensor? counts, int iterations, str group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake(rows, columns, counts, iterations, group):
    return rows.new_empty(rows.shape[1] if columns is None else columns.shape[0])


@torch.no_grad()
@without_autocast
def _column_potentials(rows, columns, counts, iterations, group):
    if counts is not None:
        rows = rows[counts]
    k = rows.shape[1] if columns is None else len(columns)
    blocks = rows.split(max(1, LOGITS_PER_BLOCK // k)) if len(rows) else ()
    if columns is not None and len(blocks) == 1:  # multiplied once
        blocks, columns = (rows @ columns.T,), None
    if columns is None and len(blocks) == 1 and not group and rows.device.type == "cpu":
        least, most = blocks[0].aminmax()
        if most - least <= SAFE_RANGE:  # not so if one is NaN
            return _by_scaling((blocks[0] - most).exp_(), iterations)
    potentials = rows.new_zeros(k)
    for step in range(iterations):
        sums = torch.full((k,), -torch.inf, dtype=torch.float64, device=rows.device)
        for block in blocks:
            logits = block if columns is None else block @ columns.T
            if step:
                logits = torch.log_softmax(logits + potentials, 1) - potentials
            sums = torch.logaddexp(sums, torch.logsumexp(logits, 0).double())
        if group:
            from ssl_kernels.distributed.groups import all_reduce_lse

            sums = all_reduce_lse(sums, group)
        # A column of no row, or of rows that all leave it out, stays as it is.
        potentials = (sums.amax() - sums).where(sums != -torch.inf, 0).to(rows.dtype)
    return potentials


def _by_scaling(terms, iterations):
    """log of what Sinkhorn's iterations multiply the columns of `terms` with."""
    by_column = 1 / terms.sum(0)
    for _ in range(iterations - 1):
        by_column /= by_column.amax()
        by_column = 1 / (terms.T @ (1 / (terms @ by_column)))
    return (by_column / by_column.amax()).log_()


library.impl("column_potentials", _column_potentials, "CompositeExplicitAutograd")
torch.library.register_fake("ssl_kernels::column_potentials", _fake, lib=library)


def column_potentials(rows, columns=None, *, iterations, counts=None, group=""):
    """Potentials v (K,) in the dtype of rows, of the logits rows @ columnsᵀ, or of those that rows are.

    Memory beyond the operands is a block of 16 MB: where all logits are no more, they are multiplied once, else anew in
    each iteration. Not differentiable.

    Args:
        rows: (N, T), or (N, K) logits without columns, float32 or float64.
        columns: (K, T), or None.
        iterations: At least 1.
        counts: (N,) bool, rows that take part, or None.
        group: Name of a process group whose ranks' rows take part too, or "".
    """
    return torch.ops.ssl_kernels.column_potentials(rows, columns, counts, iterations, group)
