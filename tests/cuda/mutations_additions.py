"""Mutations of the kernels of `contrastive` that take biases and limits, and the check that is to notice them."""

import torch

from tests.cuda.contrastive_calls import check_parity, contrastive_fwd, run
from tests.cuda.mutation import Mutation, check, require
from tests.support.contrastive import random_call

TILES, FORWARD, BACKWARD = "contrastive_additions.cuh", "contrastive_fwd.cuh", "contrastive_bwd.cuh"
CONTRASTIVE, TILE, LAUNCH = "contrastive.cuh", "device/tile.cuh", "contrastive_launch.cuh"

MUTATIONS = {
    "contrastive_additions": [
        Mutation("preparation: row mask", TILES, "inside = row < count;", "inside = true;"),
        Mutation("preparation: NaN is no limit", TILES, "value == value ? value : infinity", "value"),
        Mutation("preparation: columns not exempt", TILES, "? infinity : -infinity;", "? infinity : infinity;"),
        Mutation("preparation: exempt columns", TILES, "exempt[row] ? infinity", "exempt[row] ? -infinity"),
        Mutation("limits: strict", TILES, "s > Math", "s >= Math"),
        Mutation("limits: positives stay", TILES, "&& !(stay >> element_bit<kNTiles>(i, n, e) & 1)"),
        Mutation("limits: positives of the own side", TILES, "mark(stay.own, row, column)", "{}"),
        Mutation("limits: positives of the other side", TILES, "mark(stay.other, row, column)", "{}"),
        Mutation("limits: either side's positives in a rectangle",
                 TILES, "if (!problem.square) stay.own = stay.other = stay.own | stay.other;"),
        Mutation("limits: one lane an element", TILES, "if (holds_element(row, column)) bits", "bits"),
        Mutation("left out: no bias", TILES, "s == -Math<acc_t>::infinity() ? s : s + bias", "s + bias"),
        Mutation("ids: only equal ones", CONTRASTIVE, " != problem.only_equal_ids"),
        Mutation("forward: limits", FORWARD, "if constexpr (kAdds<Engine>) exclude_above", "if (false) exclude_above"),
        Mutation("forward: bias of rows", FORWARD, "add(of_columns, a, columns)", "add(c, a, columns)"),
        Mutation("backward: excluded entries",
                 BACKWARD, "exclude(c, problem, walk, -infinity);"),
        Mutation("backward: what is left out counts 0", BACKWARD, "s == -infinity ? acc_t(0) : "),
        Mutation("backward: rows of the bias' gradient",
                 BACKWARD, "lane % 4 == 0 && row < problem.bias_rows", "lane % 4 == 0"),
        Mutation("backward: one lane a row of it",
                 BACKWARD, "lane % 4 == 0 && row < problem.bias_rows", "row < problem.bias_rows",
                 harmless="the lanes of a row hold the same sum"),
        Mutation("backward: bias of the other term only", BACKWARD, "bias_sums.of_rows[i] += of_column;"),
        Mutation("sign: bias", TILES, "s : s + bias", "s : s - bias"),
        Mutation("index: element of a mask", TILE, "(i * kNTiles + n) * 2 + e;", "(i * kNTiles + n) * 2;"),
        Mutation("index: columns of a warp", TILES, "values + column0 + fragment_column", "values + fragment_column"),
        Mutation("index: limits of the own sums",
                 BACKWARD, "(s, additions[i].own_limit", "(s, additions[i].other_limit"),
        Mutation("index: limits of the other side's sums",
                 BACKWARD, "(s, additions[i].other_limit", "(s, additions[i].own_limit"),
        Mutation("index: warps that share a row", BACKWARD, "* Shape::kWarpsN + warp_n;", "* Shape::kWarpsN;"),
        Mutation("index: first row of a block", BACKWARD, " - problem.bias_row;", ";"),
        Mutation("blocks: the last of a row sums its bias' gradient up", LAUNCH,
                 "if (!bias_partial_ || block.first_column + block.columns < problem.other.count) return;",
                 "if (!bias_partial_) return;", harmless="the last sum is of all parts"),
        Mutation("blocks: parts of a bias' gradient", LAUNCH, "int64_t{column_block} * parts * rows", "0"),
        Mutation("lane: lanes of a row of the bias' gradient",
                 BACKWARD, "offset < 4; offset *= 2) of_rows", "offset < 2; offset *= 2) of_rows"),
    ],
}  # fmt: skip


def check_contrastive_additions(library):
    half, single = torch.float16, torch.float32
    everything = "bias padding limit exempt"
    for name, call, options in (
        ("square", random_call(130, None, 24, half, positives=2, additions=everything), {}),
        ("square, limits", random_call(70, None, 24, single, positives=2, additions="limit"), {}),
        ("equal ids", random_call(66, None, 24, single, ids=True, additions="only"), {}),
        ("both directions", random_call(65, 70, 40, half, both_directions=True, positives=2, additions=everything),
         {"splits": 2}),
        ("groups of row blocks", random_call(300, 70, 24, single, both_directions=True, additions="bias limit"),
         {"seed": 1, "warp_races": True}),
        ("blocks", random_call(130, 150, 260, half, both_directions=True, additions=everything),
         {"splits": 2, "blocks": (1, 1)}),
        ("blocks, both gradients", random_call(130, 150, 260, half, both_directions=True, additions="limit exempt"),
         {"blocks": (1, 1)}),
        ("blocks of a square", random_call(130, None, 130, single, positives=2, additions=everything),
         {"blocks": (1, 1)}),
    ):  # fmt: skip
        with check(name):
            check_parity(library, call, **options)
    check_limits(library)
    with check("nothing allowed"):
        call = random_call(9, 7, 8, half, positives=0, both_directions=True)
        call = call.replace(column_bias=torch.full((7,), -torch.inf), row_bias=torch.full((9,), -torch.inf))
        fwd, bwd, _ = run(library, call, call.upstream())
        require(torch.isneginf(fwd.lse).all() and torch.isneginf(fwd.column_lse).all(), "sums over nothing")
        require(all((grad == 0).all() for grad in bwd if grad is not None), "gradients of nothing")


def check_limits(library):
    """Of logits 0, 1, 2 and 3: what is at the limit stays, a limit of NaN is none, no bias reaches what is left out."""
    rows, columns = torch.ones(3, 4), torch.zeros(4, 4)
    columns[:, 0] = torch.arange(4)
    call = random_call(3, 4, 4, torch.float32, positives=0, normalize=False, temperature=1.0)
    bias = torch.tensor([0.0, 0.0, 0.0, torch.nan])
    limits = torch.tensor([2.0, torch.nan, -torch.inf])
    call = call.replace(rows=rows, columns=columns, row_limit=limits)
    logits = torch.arange(4.0, dtype=torch.float64)
    with check("limits"):
        fwd, _ = contrastive_fwd(library, call)
        expected = torch.stack([logits[:3].logsumexp(0), logits.logsumexp(0), logits.new_tensor(-torch.inf)])
        torch.testing.assert_close(fwd.lse, expected, rtol=1e-6, atol=1e-6)
        fwd, _ = contrastive_fwd(library, call.replace(column_bias=bias))
        torch.testing.assert_close(fwd.lse[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-6)
        require(fwd.lse[1].isnan(), "a bias of NaN reaches what stays")


CHECKS = {"contrastive_additions": check_contrastive_additions}
