"""Mutations of the kernels of losses, queue and momentum update, and the checks that are to notice them.

One file, although a long one: the losses share the mutations of their walk, and what checks them stands beside them.
"""

import dataclasses

import torch

from tests.cuda import contrastive_calls, row_pairs_calls, sigmoid_pairs_calls
from tests.cuda import test_momentum_update as momentum
from tests.cuda.batch_hard_calls import check_choice, check_indices
from tests.cuda.mutation import Mutation, check
from tests.cuda.queue_push_calls import ring_on
from tests.helpers import random_rows
from tests.support import contrastive as support
from tests.support import row_pairs
from tests.support import sigmoid_pairs as pairs
from tests.support.batch_hard import labels_of
from tests.support.queue_push import keys_of

CONTRASTIVE, SIGMOID, HARD, QUEUE = "contrastive.cuh", "sigmoid_pairs.cuh", "batch_hard.cuh", "queue_push.cuh"
FORWARD, BACKWARD, EXPECTATION = "contrastive_fwd.cuh", "contrastive_bwd.cuh", "contrastive_expectation.cuh"
MOMENTUM, PAIRS = "momentum_update.cuh", "row_pairs.cuh"
WALK, ROWS, TILE, WARP = "tile_walk.cuh", "rows.cuh", "device/tile.cuh", "device/warp.cuh"
BLOCKS, LAUNCH = "coefficient_blocks.cuh", "contrastive_launch.cuh"
COPY, SOFTMAX = "device/async_copy.cuh", "device/online_softmax.cuh"
WAIT, BARRIER, COMMIT = "copy_async_wait<kStages - 2>();", "__syncthreads();", "copy_async_commit();"

# Of the walk over tiles, which every loss is to notice.
REDUCING_WALK = [
    Mutation("walk: wait for the step's copies", WALK, WAIT),
    Mutation("walk: barrier of a step", WALK, BARRIER),
    Mutation("walk: commit of a step's copies", WALK, COMMIT),
    Mutation(
        "walk: prefetch one step less", WALK, "step < kStages - 1; ++step", "step < kStages - 2; ++step"
    ),
    Mutation("walk: column mask of the terms", WALK, "valid = j < other_.count;", "valid = true;"),
    Mutation("walk: one tile more", WALK, "++tile_ < split_.end", "++tile_ <= split_.end"),
    Mutation(
        "walk: own rows that do not fit stay",
        WALK,
        "owner_slots<kHeldSteps>(chunks_) <= own_bytes() / Shape::kOwnBytes",
        "true",
    ),
    Mutation("index: tiles of the other side", WALK, "own_tiles_ + own_bytes()", "own_tiles_"),
    Mutation("walk: own rows that come again", WALK, "comes_again || load_tile_", "load_tile_"),
    Mutation(
        "walk: own rows that registers hold", WALK, "if (tile_ == split_.begin) Engine", "if (false) Engine"
    ),
    Mutation("walk: own rows of the first tile", WALK, "if (tile_ == split_.begin) Engine", "Engine"),
    Mutation("tile copy: rows of a matrix", TILE, "min(rows - row0, int64_t{kRows})", "int64_t{kRows}"),
    Mutation(
        "tile copy: row mask", TILE, "i * Share::kRowsAtOnce < inside", "0 < inside", at="outside the matrix"
    ),
    Mutation("tile copy: depth mask", TILE, ", column < columns", ", true", at="void load_tile("),
    Mutation(
        "index: rows of a tile's thread",
        TILE,
        "static_cast<int>(min(rows - row0, int64_t{kRows})) - first_row()",
        "static_cast<int>(min(rows - row0, int64_t{kRows}))",
    ),
]
SEVERAL_HELD_STEPS = [
    Mutation("index: step of the rows in registers", WALK, "c, held_[kStep],", "c, held_[0],"),
    Mutation("index: slot after those in registers", WALK, "? step - kOwnerSlots : step", "? 0 : step"),
]
PRODUCT_WALK = [
    Mutation(
        "walk: barrier of a step of G",
        WALK,
        "step();",
        "copy_async_wait<kStages - 2>(); load_next();",
        at="accumulate(Accumulator& g)",
    ),
    Mutation("walk: row mask of the product", WALK, "row < own_.count && d < width_", "d < width_"),
    Mutation("walk: depth mask of the product", WALK, "row < own_.count && d < width_", "row < own_.count"),
    Mutation("finish: row mask", ROWS, "if (row >= count) return;", at="finish_rows_kernel("),
    Mutation("half: zero rows' norms", ROWS, "rnorm.value[e] > acc_t(kZeroRowRnorm) ? acc_t(0) : ", ""),
    Mutation("half: scale taken out again", ROWS, "coefficient_scale ? acc_t(1) / *coefficient_scale : ", ""),
]
BLOCK_GRADIENTS = [
    Mutation("blocks: terms of the next tile", WALK, "kDouble ? kStages : 2", "kDouble ? kStages : 1"),
    Mutation("blocks: row mask of the copies", BLOCKS, "if (row >= count) return;"),
    Mutation("blocks: padding of the copies", BLOCKS, "d < D ? to_acc(x.at(row, d)) * rnorm[row] : acc_t(0)",
             "to_acc(x.at(row, d)) * rnorm[row]"),
    Mutation("blocks: norms of the columns", BLOCKS, "with_norms ? walk", "true ? walk"),
    Mutation("blocks: norms of the rows behind", BLOCKS, "side.operand.rnorm + first", "side.operand.rnorm"),
    Mutation("blocks: rows behind the gradient", BLOCKS, "x.data += first * x.row_stride;"),
    Mutation("index: first tile of a block", BLOCKS, "first_column / Shape::kBlockN, ceil_div", "0, ceil_div"),
    Mutation("index: rows of the other side", BLOCKS, "other_factor.data + column * other_factor.stride",
             "other_factor.data"),
    Mutation("index: rows of the own side", BLOCKS, "own_factor.data + row * own_factor.stride", "own_factor.data"),
    Mutation("index: sums of the other side", BLOCKS, "other_sum + column * width", "other_sum"),
    Mutation("blocks: columns add up", BLOCKS, "{dtype, false, column > 0,", "{dtype, false, false,"),
    Mutation("blocks: rows add up", BLOCKS, "{dtype, true, row > 0,", "{dtype, true, false,"),
]  # fmt: skip

MUTATIONS = {
    "contrastive": [
        *REDUCING_WALK,
        *SEVERAL_HELD_STEPS,
        *PRODUCT_WALK,
        *BLOCK_GRADIENTS,
        Mutation("index: first row of a block", BACKWARD, "first_row + static_cast", "static_cast"),
        Mutation("index: rows in a block", BACKWARD, "block - first_row * stride", "block"),
        Mutation("index: columns in a block", BACKWARD, "* stride - first_column, stride", "* stride, stride"),
        Mutation("widened copy: row mask", TILE, "i * Share::kRowsAtOnce < inside", "0 < inside", at="held[i] = {};"),
        Mutation("widened copy: depth mask", TILE, ", column < columns", ", true", at="void load(const narrow_t"),
        Mutation("widened copy: nothing past the walk", WALK, "if (holds_tile_) widened_", "widened_",
                 harmless="stores into a stage that no step reads any more"),
        Mutation("index: stage of a widened tile", WALK, "widened_.store(other_tiles_ + load_stage()",
                 "widened_.store(other_tiles_ + stage_"),
        Mutation("copy: commit", COPY, '"cp.async.commit_group;"', '""'),
        Mutation("copy: wait", COPY, '"cp.async.wait_group %0;"', '"// %0"'),
        Mutation("walk: tiles past the end", WALK, "if (load_tile_ < split_.end) {", "{"),
        Mutation("block sum: barrier", WARP, BARRIER, at="T block_sum("),
        Mutation("block maximum: barrier", WARP, BARRIER, at="T block_max("),
        Mutation("row mask of the norms", CONTRASTIVE, "own.rnorm && i < own.count", "own.rnorm"),
        Mutation("backward: row mask of the terms", BACKWARD, "valid = i < own.count,", "valid = true,"),
        Mutation("forward: row mask of the results",
                 FORWARD, "lane % 4 == 0 && row < own.count", "lane % 4 == 0"),
        Mutation("forward: one lane a row", FORWARD, "lane % 4 == 0 && row < own.count", "row < own.count"),
        Mutation("forward: excluded entries", FORWARD, "exclude(c, problem", "if (false) exclude(c, problem"),
        Mutation("backward: excluded entries", BACKWARD, "exclude(c, problem, walk, acc_t(0));",
                 at="make_coefficients_of_one_exponential(c, walk, rows, a);"),
        Mutation("backward: excluded entries of two exponentials", BACKWARD, "exclude(c, problem, walk, acc_t(0));",
                 at="c[m][n][e] = coefficient[m][e];"),
        Mutation("excluded: columns past the end", CONTRASTIVE, "if (j >= problem.other.count) return false;"),
        Mutation("excluded: by ids alone, on the diagonal", CONTRASTIVE, "is_whole && !meets_diagonal", "is_whole"),
        Mutation("excluded: by ids alone, past the end", CONTRASTIVE, "is_whole && !meets_diagonal",
                 "!meets_diagonal"),
        Mutation("excluded: by ids alone", CONTRASTIVE, "row_id[i] != column_id.value[e] == problem.only_equal_ids",
                 "false"),
        Mutation("excluded: whole tiles", CONTRASTIVE, "column0 + kColumns <= other.count;", "true;"),
        Mutation("ids: absent ones", WALK, "if (terms_.labels) {", "{"),
        Mutation("one exponential: temperature", CONTRASTIVE,
                 "Math<acc_t>::abs(a) <= acc_t(kMostBase2Scale)", "true"),
        Mutation("one exponential: norms", CONTRASTIVE, "problem.own.rnorm && problem.other.rnorm && ", ""),
        Mutation("one exponential: both sides' sums", BACKWARD,
                 "problem.own.centered_weight && problem.other.centered_weight && ", ""),
        Mutation("one exponential: power of a row", BACKWARD, "exp2(base2_lse - center)", "exp2(base2_lse)"),
        Mutation("sign: centered weight", BACKWARD, "exp2(center - exact)", "exp2(exact - center)"),
        Mutation("index: centered weight of a column", BACKWARD, "fma(weight.value[e % 2], row.power",
                 "fma(weight.value[0], row.power"),
        Mutation("one exponential: weight of a row", BACKWARD, "row.power, row.weight)", "row.power, acc_t(0))"),
        Mutation("one exponential: no centered weight", BACKWARD, "if (centered_weight) {", "{"),
        Mutation("both directions: power of a row's shift", FORWARD, "= term * power;", "= term;"),
        Mutation("both directions: rows summed once", FORWARD, "if (!one_exponential) sums", "sums"),
        Mutation("lane: rows of a column's powers", FORWARD, "sum[k] += powers[i / 2]", "sum[k] += powers[0]"),
        Mutation("excluded: the diagonal", CONTRASTIVE, "!problem.square && (", "("),
        Mutation("excluded: the diagonal kept", CONTRASTIVE, "problem.keep_diagonal || ", ""),
        Mutation("excluded: equal ids", CONTRASTIVE, "return !problem.own.ids || apart;", "return true;"),
        Mutation("excluded: tiles on the diagonal", CONTRASTIVE, "!on_diagonal && ", ""),
        Mutation("excluded: tiles with ids", CONTRASTIVE, "&& !own.ids ", ""),
        Mutation("excluded: tiles past the end", CONTRASTIVE, "&& is_whole) return", ") return"),
        Mutation("ids: bound", CONTRASTIVE, "side.ids && index < side.count", "side.ids"),
        Mutation("positives: source mask", CONTRASTIVE, "base + lane < sources && source < from.count", "true"),
        Mutation("positives: target from the end", CONTRASTIVE, "if (valid && target < 0) target += to.count;"),
        Mutation("positives: lower bound", CONTRASTIVE, "target >= 0 && target < targets", "target < targets"),
        Mutation("positives: upper bound", CONTRASTIVE, "target >= 0 && target < targets", "target >= 0"),
        Mutation("positives: one lane an entry", CONTRASTIVE, "if (!holds_element(row, column)) return;"),
        Mutation("preparation: row mask", ROWS, "if (row >= count) return;", at="prepare_rows_kernel("),
        Mutation("preparation: zero padding",
                 ROWS, "d < D ? x[d * column_stride] : from_acc<scalar_t>(acc_t(0))", "x[d * column_stride]"),
        Mutation("preparation: shortest norm",
                 ROWS, "norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm", "norm"),
        Mutation("merge: row mask", FORWARD, "if (row >= count) return;"),
        Mutation("terms: row mask", BACKWARD, "if (row >= count) return;"),
        Mutation("finish: no projection of tiny rows",
                 ROWS, "rnorm && factor < acc_t(1) / Math<acc_t>::kNormEps", "rnorm"),
        Mutation("both directions: barrier of the warps' sums", FORWARD, BARRIER),
        Mutation("both directions: column mask", FORWARD, " && column < other.count"),
        Mutation("both directions: one thread per column", FORWARD, "threadIdx.x < Shape::kBlockN && "),
        Mutation("both directions: rows past the end",
                 FORWARD, "inside = fragment_row(lane, i / 2, i % 2 * 2) < rows;", "inside = true;"),
        Mutation("both directions: first block of a group", FORWARD, "if (!first_of_group) "),
        Mutation("both directions: blocks of a group after the first",
                 FORWARD, "if (!first_of_group) state.merge(total.max, total.sum, a);"),
        Mutation("expectation: barrier of the maxima", EXPECTATION, BARRIER, at="kBlockM + r] = largest;"),
        Mutation("expectation: barrier of the sums", EXPECTATION, BARRIER, at="kBlockM + r] = state[i].sum;"),
        Mutation("expectation: rising maximum", EXPECTATION, "if (__any_sync(kAllLanes, shrinks))", "if (false)"),
        Mutation("expectation: of coefficients, their scale taken out again", BLOCKS, "if (i < count) values",
                 "if (false) values"),
        Mutation("expectation: of coefficients, end of the values", BLOCKS, "if (i < count) values", "values"),
        Mutation("expectation: of coefficients, columns add up", LAUNCH, "{args.dtype, false, column > 0,",
                 "{args.dtype, false, false,"),
        Mutation("index: expectation of a block's rows", LAUNCH, "expectation + row * args.D", "expectation"),
        Mutation("terms: weight of the softmax itself", BACKWARD, "grad_lse[row] : 1.0", "grad_lse[row] : 0.0"),
        Mutation("expectation: excluded entries", EXPECTATION, "exclude(c, problem", "if (false) exclude(c, problem"),
        Mutation("expectation: row mask of the sums",
                 EXPECTATION, "lane % 4 == 0 && row < own.count", "lane % 4 == 0"),
        Mutation("expectation: merge's row mask", EXPECTATION, "if (row >= count) return;"),
        Mutation("expectation: merge's fence of a warp", EXPECTATION, "__syncwarp();"),
        Mutation("expectation: nothing allowed", EXPECTATION, "state.sum == acc_t(0) ? acc_t(0) : "),
        Mutation("expectation: backward's row mask", EXPECTATION, "if (row >= N) return;"),
        Mutation("expectation: positives from the end", EXPECTATION, "if (j < 0) j += M;"),
        Mutation("softmax: nothing came yet", SOFTMAX, "largest == -Math<T>::infinity() ? T(0) : ", ""),
    ],
    "sigmoid_pairs": [
        *REDUCING_WALK,
        *SEVERAL_HELD_STEPS,
        *PRODUCT_WALK,
        Mutation("pairs: row mask", SIGMOID, "row < rows && column < columns", "column < columns"),
        Mutation("pairs: column mask", SIGMOID, "row < rows && column < columns", "row < rows"),
        Mutation("pairs: whole tiles by columns alone",
                 SIGMOID, "rows == kWarpRows && columns == kColumns", "columns == kColumns"),
        Mutation("pairs: whole tiles by rows alone",
                 SIGMOID, "rows == kWarpRows && columns == kColumns", "rows == kWarpRows"),
        Mutation("pairs: zeros outside", SIGMOID, "c[m][n][e] = acc_t(0);"),
        Mutation("pairs: diagonal out of reach", SIGMOID,
                 "to_positive > -kWarpRows && to_positive < kColumns ? static_cast<int>(to_positive) : kColumns",
                 "static_cast<int>(to_positive)"),
        Mutation("ids: mask", SIGMOID, "index < count ? ids[index] : 0", "ids[index]"),
        Mutation("ids: left out", SIGMOID, "problem.equal_are_positive || positive || !same", "true"),
        Mutation("ids: positive ones stay", SIGMOID, "problem.equal_are_positive || positive || !same",
                 "positive || !same"),
        Mutation("ids: the diagonal stays", SIGMOID, "problem.equal_are_positive || positive || !same",
                 "problem.equal_are_positive || !same"),
        Mutation("ids: positive ones", SIGMOID, "if (problem.equal_are_positive) positive = same;"),
        Mutation("index: element of the equal ids", TILE, "(i * kNTiles + n) * 2 + e;", "(i * kNTiles + n) * 2;"),
        Mutation("index: ids past 2^31", SIGMOID, "index < count ? ids[index]",
                 "index < count ? static_cast<int>(ids[index])"),
        Mutation("forward: row mask of the norms", SIGMOID, "own.rnorm && row < own.count", "own.rnorm"),
        Mutation("forward: row mask of the results",
                 SIGMOID, "lane % 4 == 0 && row < own.count", "lane % 4 == 0"),
        Mutation("forward: one lane a row", SIGMOID, "lane % 4 == 0 && row < own.count", "row < own.count",
                 harmless="the lanes of a row hold the same sum"),
        Mutation("backward: row mask of the terms", SIGMOID, "valid = i < own.count;", "valid = true;",
                 harmless="reads the workspace for rows that are not stored"),
        Mutation("blocks: row mask of the terms", SIGMOID, "valid = row < own.count;", "valid = true;",
                 harmless="reads the workspace for rows that are not stored"),
        Mutation("blocks: sums of losses", "sigmoid_pairs.cu", "losses + written", "losses"),
        Mutation("blocks: sums of coefficients", "sigmoid_pairs.cu", "biases + written", "biases"),
        *BLOCK_GRADIENTS,
        Mutation("index: first row of a block", SIGMOID, "first_row + static_cast", "static_cast"),
        Mutation("index: rows in a block", SIGMOID, "block - first_row * stride", "block"),
        Mutation("index: columns in a block", SIGMOID, "* stride - first_column, stride", "* stride, stride"),
        Mutation("backward: one lane stores the loss", SIGMOID, "if (lane == 0) losses", "losses",
                 harmless="all lanes hold the same sum"),
        Mutation("backward: one lane stores the bias' gradient", SIGMOID, "if (lane == 0) biases", "biases",
                 harmless="all lanes hold the same sum"),
        Mutation("weights: row mask", SIGMOID, "if (row < count) weight", "weight"),
        Mutation("parts: row mask", ROWS, "if (row >= count) return;", at="sum_parts_kernel("),
        Mutation("block sum: barrier", WARP, BARRIER, at="T block_sum("),
        Mutation("block maximum: barrier", WARP, BARRIER, at="T block_max("),
    ],
    "batch_hard": [
        *REDUCING_WALK,
        Mutation("columns: only threads with one", WALK, " && threadIdx.x < Shape::kBlockN"),
        Mutation("labels: wait for their copy", COPY, '"cp.async.wait_group %0;"', '"// %0"'),
        Mutation("labels: column mask",
                 WALK, "terms_.labels + j, valid);", "terms_.labels + j, true);"),
        Mutation("row mask of the norms", HARD, "rows.rnorm && row < count", "rows.rnorm",
                 harmless="reads the workspace for rows that are not stored"),
        Mutation("row mask of the labels", HARD, "row < count ? problem.labels[row] : 0", "problem.labels[row]"),
        Mutation("columns past the end", HARD, "inside = column < count;", "inside = true;"),
        Mutation("own row is no positive", HARD, "inside & same & (row != column)", "inside & same"),
        Mutation("row mask of the results", HARD, "lane % 4 == 0 && row < count", "lane % 4 == 0"),
        Mutation("one lane a row", HARD, "lane % 4 == 0 && row < count", "row < count",
                 harmless="the lanes of a row hold the same choice"),
        Mutation("merge: row mask", HARD, "if (row >= count) return;"),
        Mutation("merge: nothing in the other part", HARD, "(other_index >= 0) & "),
        Mutation("take: NaN goes first", HARD, " | before_all"),
        Mutation("merge: lowest index of equal keys", HARD, "tie ? other_index < index : "),
        Mutation("preparation: row mask", ROWS, "if (row >= count) return;", at="prepare_rows_kernel("),
    ],
    "queue_push": [
        Mutation("keys past the end", QUEUE, "if (b >= B) return;"),
        Mutation("keys that others would overwrite", QUEUE, "B > K ? B - K : 0", "0"),
        Mutation("position past the end", QUEUE, "index %= size;"),
        Mutation("position below 0", QUEUE, "index < 0 ? index + size : index", "index"),
        Mutation("shortest norm", QUEUE, "norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm", "norm"),
        Mutation("fill count below 0", QUEUE, "*filled < 0 ? 0 : *filled", "*filled"),
        Mutation("fill count past the end", QUEUE, "count < K && B < K - count ? count + B : K", "count + B"),
        Mutation("groups: unit stride", "queue_push.cu", "(args.key_strides[1] == 1 || args.D == 1) &&"),
        Mutation("groups: alignment", "queue_push.cu",
                 "reinterpret_cast<uintptr_t>(data) % sizeof(Group<T>) == 0 && "),
        Mutation("groups: stride", "queue_push.cu", " && stride % kGroup == 0"),
    ],
    "row_pairs": [
        Mutation("forward: row mask", PAIRS, "if (row >= N) return;", at="row_pairs_fwd_kernel("),
        Mutation("backward: row mask", PAIRS, "if (row >= N) return;", at="row_pairs_bwd_kernel("),
        Mutation("load: depth mask of vectors", PAIRS, "if (d < D) loaded.bits", "loaded.bits"),
        Mutation("load: depth mask of elements", PAIRS, "if (d < D) loaded.vector", "loaded.vector"),
        Mutation("store: depth mask of vectors", PAIRS, "if (d < D) *reinterpret_cast", "*reinterpret_cast"),
        Mutation("store: depth mask of elements", PAIRS, "if (d < D) row[d]", "row[d]"),
        Mutation("sum: barrier before the parts are written", PAIRS, BARRIER, at="if (team == kWarpSize) return x;"),
        Mutation("sum: barrier before the parts are read", PAIRS, BARRIER, at="scratch[threadIdx.x / kWarpSize] = x;"),
        Mutation("sum: rows of a block", PAIRS, "if (team == kWarpSize) return x;", "return x;"),
        Mutation("shortest norm", PAIRS, "norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm", "norm"),
        Mutation("vectors: width", "row_pairs.cu", "aligned = args.D % kSize == 0;", "aligned = true;"),
        Mutation("vectors: unit stride", "row_pairs.cu", "args.column_strides[k] == 1 && "),
        Mutation("vectors: alignment", "row_pairs.cu", "reinterpret_cast<uintptr_t>(args.operands[k]) % 16 == 0 &&"),
        Mutation("vectors: stride", "row_pairs.cu", "args.row_strides[k] % kSize == 0", "true"),
    ],
    "momentum_update": [
        Mutation("the tensor of a block", MOMENTUM, "batch.first_block[middle] <= block", "false"),
        Mutation("groups: whole blocks only", MOMENTUM, "count >= kChunk && "),
        Mutation("groups: alignment of masters", MOMENTUM, "in_groups(master) && "),
        Mutation("groups: alignment of shadows", MOMENTUM, "in_groups(shadow) && "),
        Mutation("groups: alignment of sources", MOMENTUM, " && in_groups(source)"),
        Mutation("singles: end of the tensor", MOMENTUM, "i < kChunk && i < count", "i < kChunk"),
        Mutation("singles: end of the block", MOMENTUM, "i < kChunk && i < count", "i < count"),
    ],
}  # fmt: skip


def check_contrastive(library):
    half, single, random_call = torch.float16, torch.float32, support.random_call
    ids_but_one = random_call(9, None, 8, single, ids=True)
    ids_but_one.row_ids.zero_()
    ids_but_one_column = random_call(9, 9, 8, single, ids=True)
    ids_but_one_column.row_ids[2:].zero_()
    ids_but_one_column.column_ids.zero_()
    zero_rows = random_call(12, None, 24, half)
    zero_rows.rows[3] = 0
    zero_rows_in_float = random_call(12, None, 24, single)
    zero_rows_in_float.rows[3] = 0
    both = random_call(65, 70, 40, half, ids=True, both_directions=True, keep_diagonal=True, positives=2)
    large = random_call(20, 33, 24, single, both_directions=True, normalize=False, temperature=1.0)
    for rows in (large.rows, large.columns):
        rows *= 10
    tiny = random_call(5, None, 8, single)
    tiny.rows[2] = 3e-13  # a norm of 8.5e-13
    for name, call, options in (
        ("square", random_call(130, None, 72, half), {}),
        ("square, float32", random_call(70, None, 72, single), {"seed": 1}),
        ("random order", random_call(130, None, 72, half), {"seed": 2, "warp_races": True}),
        ("another order", random_call(130, None, 300, half), {"seed": 3, "warp_races": True}),
        ("own rows that come again", random_call(20, 130, 400, half), {"splits": 1}),
        ("odd width", random_call(65, None, 17, half), {}),
        ("ids in both directions", both, {"splits": 2}),
        ("groups of row blocks", random_call(300, 70, 24, half, both_directions=True),
         {"seed": 1, "warp_races": True}),
        ("ids, nothing kept", random_call(66, 64, 30, single, ids=True), {}),
        ("ids, whole tiles", random_call(64, None, 64, half, ids=True), {}),
        ("whole tiles", random_call(128, None, 64, half), {}),
        ("small temperature", random_call(65, None, 24, single, temperature=0.005), {}),
        ("small temperature, both directions",
         random_call(40, 70, 24, single, temperature=0.005, both_directions=True), {}),
        ("large rows in both directions", large, {}),
        ("no column left", ids_but_one, {}),
        ("zero row, half", zero_rows, {}),
        ("zero row, float32", zero_rows_in_float, {}),
        ("tiny row", tiny, {}),
        ("expectation", random_call(130, 200, 72, half), {"splits": 3, "expectation": True}),
        ("expectation, random order", random_call(130, 200, 72, half),
         {"splits": 3, "expectation": True, "seed": 2, "warp_races": True}),
        ("expectation, no column left", ids_but_one_column, {"expectation": True}),
        ("unnormalised", random_call(20, 33, 40, half, normalize=False, temperature=2.0), {}),
        ("narrow columns", random_call(65, 150, 40, single, column_dtype=half), {"splits": 2, "expectation": True}),
        ("blocks of a square", random_call(130, None, 260, half, ids=True), {"splits": 2, "blocks": (1, 1)}),
        ("blocks of a rectangle",
         random_call(131, 135, 260, half, both_directions=True, keep_diagonal=True, ids=True), {"blocks": (1, 1)}),
        ("blocks, random order", random_call(140, 280, 130, single, both_directions=True),
         {"splits": 1, "blocks": (1, 1), "seed": 2, "warp_races": True}),
        ("blocks, another order", random_call(20, 280, 260, half),
         {"splits": 1, "blocks": (0, 0), "seed": 3, "warp_races": True}),
        ("expectation of coefficients", random_call(131, 135, 514, half), {"expectation": True, "blocks": (1, 1)}),
    ):  # fmt: skip
        with check(name):
            contrastive_calls.check_parity(library, call, **options)
    with check("narrow columns, forward alone"):
        call = random_call(65, 150, 40, single, column_dtype=half)
        fwd, _ = contrastive_calls.contrastive_fwd(library, call)
        torch.testing.assert_close(fwd.lse, support.exact(call)["lse"], rtol=1e-6, atol=1e-5)


def check_sigmoid_pairs(library):
    half, single, random_call = torch.float16, torch.float32, pairs.random_call
    zero_row = random_call(12, 20, 24, half)
    zero_row.rows[3] = 0
    zero_row.columns[4] = 0
    for name, call, options in (
        ("blocks", random_call(130, 200, 72, half), {"splits": 2}),
        ("random order", random_call(130, 150, 200, half), {"seed": 2, "warp_races": True}),
        ("float32", random_call(70, 65, 30, single, diagonal=-3), {"seed": 1, "warp_races": True}),
        ("own rows that leave their slots", random_call(20, 130, 300, half), {"splits": 1}),
        ("own rows that come again", random_call(20, 130, 400, half), {"splits": 1}),
        ("odd width", random_call(65, 33, 17, half), {}),
        ("whole tiles", random_call(128, 64, 64, half), {}),
        ("whole columns", random_call(100, 64, 64, half), {}),
        ("blocks of coefficients", random_call(131, 135, 260, half), {"seed": 3, "blocks": (1, 1)}),
        (
            "blocks of three tiles",
            random_call(60, 280, 260, half),
            {"splits": 1, "blocks": (1, 300)},
        ),
        (
            "blocks, random order",
            random_call(140, 280, 130, single),
            {"seed": 2, "splits": 1, "blocks": (1, 1), "warp_races": True},
        ),
        (
            "blocks, equal ids positive",
            random_call(131, 135, 256, half, bias=-3.0, ids="positive"),
            {"splits": 2},
        ),
        ("far diagonal", random_call(20, 24, 8, single, diagonal=2**32), {}),
        ("zero rows", zero_row, {}),
        ("unnormalised", random_call(20, 24, 8, single, normalize_rows=False, normalize_columns=False), {}),
        ("norms of the rows alone", random_call(20, 24, 8, single, normalize_columns=False), {}),
        ("equal ids left out", random_call(70, 67, 24, half, bias=-3.0, ids="left out"), {"splits": 2}),
        ("equal ids positive", random_call(70, 67, 24, single, bias=-3.0, ids="positive"), {}),
    ):
        with check(name):
            sigmoid_pairs_calls.check_parity(library, call, **options)


def check_batch_hard(library):
    half, single = torch.float16, torch.float32
    for name, x, classes, options in (
        ("blocks", random_rows(200, 72, half), 5, {"splits": 2}),
        ("random order", random_rows(140, 200, half), 5, {"seed": 2, "warp_races": True}),
        ("another order", random_rows(140, 40, single), 140, {"seed": 3, "warp_races": True, "splits": 3}),
        ("own rows that come again", random_rows(130, 300, half), 5, {}),
        ("odd width", random_rows(65, 17, half), 7, {}),
    ):
        for normalize, distance in ((True, "euclidean"), (False, "cosine")):
            with check(name):
                check_choice(library, x, labels_of(len(x), classes), normalize, distance, **options)
    equal = torch.randint(-1, 2, (210, 6), generator=torch.Generator().manual_seed(3)).to(single)
    nan = equal.clone()
    nan[[37, 80, 81, 139], 3] = torch.nan
    for name, x in ("equal keys", equal), ("NaN", nan):
        with check(name):
            check_indices(library, x, labels_of(len(x), 2), "euclidean", splits=3)


def check_queue_push(library):
    single = torch.float32
    tiny = keys_of(3, 8, single)
    tiny[1] = 3e-13
    wide = torch.zeros(6, 31, dtype=single)
    for name, size, keys, options in (
        ("few keys", 20, keys_of(7, 24, single), {}),
        ("more keys than rows", 20, keys_of(60, 24, single), {"seed": 1, "warp_races": True}),
        ("odd width", 9, keys_of(4, 5, torch.float16), {}),
        ("tiny keys", 5, tiny, {}),
        ("transposed", 9, keys_of(8, 8, single).T, {}),
        ("every other element", 9, keys_of(6, 48, single)[:, ::2], {}),
        ("inside wider rows", 9, wide[:, 4:28].copy_(keys_of(6, 24, single)), {}),
        ("at an odd address", 9, torch.zeros(6, 32)[:, 5:29].copy_(keys_of(6, 24, single)), {}),
    ):
        for normalize in (True, False):
            with check(name):
                ring = ring_on(
                    library, size, keys.shape[1], single, "cpu", position=size - 2, filled=size - 3
                )
                ring.push(keys, normalize, **options)
                ring.check()
    for position in (-3, 2**62):
        with check(f"position {position}, fill count -5"):
            ring = ring_on(library, 4, 8, single, "cpu", position=position, filled=-5)
            ring.push(keys_of(3, 8, single), False)
            ring.check()


def check_momentum_update(library):
    half, single = torch.float16, torch.float32

    def triple(count, master_offset=0, shadow_offset=0, source_offset=0):
        offsets = (master_offset, shadow_offset, source_offset)
        parts = momentum.triple(count, half, single, "cpu")
        rooms = [torch.zeros(count + 1, dtype=part.dtype) for part in parts]
        return [
            room[offset:][:count].copy_(part)
            for room, offset, part in zip(rooms, offsets, parts, strict=True)
        ]

    several = [triple(5), triple(2 * momentum.CHUNK + 7), triple(30)]
    for name, triples, options in (
        ("several tensors", several, {"seed": 1, "warp_races": True}),
        ("master at an odd address", [triple(momentum.CHUNK, 1, 0, 0)], {}),
        ("shadow at an odd address", [triple(momentum.CHUNK, 0, 1, 0)], {}),
        ("source at an odd address", [triple(momentum.CHUNK, 0, 0, 1)], {}),
        ("singles of two blocks", [triple(momentum.CHUNK + 5, 1, 0, 0)], {}),
        ("mostly the source", [triple(30)], {"momentum": 0.25}),
    ):
        with check(name):
            momentum.check(library, triples, **{"momentum": 0.99, **options})


def check_row_pairs(library):
    half, single = torch.float16, torch.float32

    def with_x(call, x):
        return dataclasses.replace(call, x=x.copy_(call.x))

    def in_rows_of(width, call):
        operands = {name: getattr(call, name) for name in "xyz"}
        wide = {
            name: torch.zeros(len(rows), width)[:, : rows.shape[1]].copy_(rows)
            for name, rows in operands.items()
        }
        return dataclasses.replace(call, **wide)

    short = row_pairs.random_call(6, 8)
    short.x[0] = 0
    ten = row_pairs.random_call(10, 24)
    for name, call, options in (
        ("vectors", row_pairs.random_call(9, 40, half), {}),
        ("elements", row_pairs.random_call(9, 37, single), {}),
        ("a block per row", row_pairs.random_call(3, 4096 + 8, half), {"seed": 1, "warp_races": True}),
        (
            "a block per row, other sums",
            row_pairs.random_call(3, 640, single),
            {"seed": 2, "warp_races": True},
        ),
        ("zero row", short, {}),
        ("every other element", with_x(ten, torch.zeros(10, 48)[:, ::2]), {}),
        ("at an odd address", with_x(ten, torch.zeros(10, 32)[:, 5:29]), {}),
        ("inside wider rows", with_x(ten, torch.zeros(10, 31)[:, 4:28]), {}),
        ("padded rows", in_rows_of(40, row_pairs.random_call(9, 37)), {}),
    ):
        x, y, z, flags = call.x, call.y, call.z, (call.normalize, call.measure)
        with check(name):
            (values, saved), _ = row_pairs_calls.row_pairs_fwd(library, x, y, z, *flags, **options)
            grads, _ = row_pairs_calls.row_pairs_bwd(
                library, call.cotangent, x, y, z, saved, *flags, True, True, True, **options
            )
            row_pairs.check_results([values, *grads], call, "cuda")


CHECKS = {
    "row_pairs": check_row_pairs,
    "momentum_update": check_momentum_update,
    "contrastive": check_contrastive,
    "sigmoid_pairs": check_sigmoid_pairs,
    "batch_hard": check_batch_hard,
    "queue_push": check_queue_push,
}
