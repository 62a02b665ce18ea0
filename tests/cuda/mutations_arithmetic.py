"""Mutations of signs, indices and lanes of all CUDA kernels: what no barrier, bound or race check sees."""

from tests.cuda.mutation import Mutation

CONTRASTIVE, SIGMOID, HARD, QUEUE = "contrastive.cuh", "sigmoid_pairs.cuh", "batch_hard.cuh", "queue_push.cuh"
MOMENTUM, PAIRS, MIXUP, CUTMIX = "momentum_update.cuh", "row_pairs.cuh", "mixup.cuh", "cutmix.cuh"
NORMALIZE, CROSS_ENTROPY, ORDER = "mixup_normalize.cuh", "mixup_cross_entropy.cuh", "permutation_walk.cuh"
ROWS, TILE, WARP, SOFTMAX = "rows.cuh", "device/tile.cuh", "device/warp.cuh", "device/online_softmax.cuh"

HALF_SUM = Mutation(
    "lane: sum of half a warp",
    WARP,
    "kWarpSize / 2; offset > 0",
    "kWarpSize / 4; offset > 0",
    at="T warp_sum(",
)

MUTATIONS = {
    "contrastive": [
        Mutation("sign: shift of a term", SOFTMAX, "fma(v, a, -shift)", "fma(v, a, shift)"),
        Mutation("sign: projection", ROWS, "g(d) - x_hat(d) * dot", "g(d) + x_hat(d) * dot"),
        Mutation("index: row of a fragment", TILE, "(e / 2) * 8 + lane / 4", "(e / 2) * 8 + lane % 4"),
        Mutation("lane: mask of a ballot",
                 CONTRASTIVE, "__ballot_sync(kAllLanes, target", "__ballot_sync(0xffffu, target"),
    ],
    "sigmoid_pairs": [
        Mutation("sign: of a positive pair", SIGMOID, "positive ? -z : z", "positive ? z : z", at="tile_sum[i] +="),
        Mutation("sign: decay", SIGMOID, "exp2(-Math<acc_t>::abs(u_)", "exp2(Math<acc_t>::abs(u_)"),
        Mutation("index: of the positive",
                 SIGMOID, "row0 + problem.diagonal - column0", "column0 + problem.diagonal - row0"),
        Mutation("lane: lanes of a row", SIGMOID, "offset < 4; offset *= 2) sum[i]", "offset < 2; offset *= 2) sum[i]"),
    ],
    "batch_hard": [
        Mutation("sign: key", HARD, "half_square.value[e] - c[", "half_square.value[e] + c["),
        Mutation("index: label of a column", HARD, "labels.value[e] == label[i]", "labels.value[1 - e] == label[i]"),
        Mutation("lane: mask of a shuffle", HARD, "__shfl_xor_sync(kAllLanes, hardest[i].positive.index",
                 "__shfl_xor_sync(0xffffu, hardest[i].positive.index"),
    ],
    "queue_push": [
        Mutation("sign: first key that stays", QUEUE, "B > K ? B - K : 0", "B > K ? K - B : 0"),
        Mutation("index: strides of the keys", QUEUE, "keys + b * row_stride", "keys + b * column_stride"),
        HALF_SUM,
    ],
    "row_pairs": [
        Mutation("sign: value of the second pair",
                 PAIRS, "k ? -static_cast<double>(measure)", "k ? static_cast<double>(measure)"),
        Mutation("sign: weight of the second pair", PAIRS, "k ? -g : g", "k ? g : g"),
        Mutation("sign: factor of a distance",
                 PAIRS, "distance ? -weight[k] : weight[k]", "distance ? weight[k] : weight[k]"),
        Mutation("sign: projection of x", PAIRS, "sum - along_x * x", "sum + along_x * x"),
        Mutation("sign: projection of y", PAIRS, ") - along[k] * y", ") + along[k] * y"),
        Mutation("index: what is saved", PAIRS, "saved[row * kPairs + k] = ", "saved[k * N + row] = "),
        Mutation("index: row of a thread", PAIRS, "(kThreads / team) + threadIdx.x / team",
                 "(kThreads / team) + threadIdx.x % (kThreads / team)", at="row_pairs_fwd_kernel("),
        HALF_SUM,
    ],
    "momentum_update": [
        Mutation("sign: weight from the source", MOMENTUM, "weight - 1.0f", "weight + 1.0f"),
        Mutation("sign: difference", MOMENTUM, "(to - average)", "(to + average)"),
        Mutation("index: group that is stored", MOMENTUM, "(g * kThreads + threadIdx.x) * kGroup",
                 "(threadIdx.x * kGroups + g) * kGroup", at="s[g] = load_streaming"),
    ],
    "mixup": [
        Mutation("sign: partner's share", ORDER, "acc_t(1) - lam[", "acc_t(1) + lam["),
        Mutation("sign: difference of the samples", MIXUP, "to_acc(partner.x.value[e]) - to_acc(own.x.value[e])",
                 "to_acc(own.x.value[e]) - to_acc(partner.x.value[e])"),
        Mutation("index: partial sums", MIXUP, "partial[row * count + sample]", "partial[sample * warps + row]"),
        Mutation("index: transposed sums", MIXUP, "warp_sum(sums[lane][warp])", "warp_sum(sums[warp][lane])"),
        HALF_SUM,
    ],
    "cutmix": [
        Mutation("index: rows and columns of a box", CUTMIX, "columns_[e] >= box.x0", "rows_[e] >= box.x0"),
    ],
    "mixup_normalize": [
        Mutation("sign: mean", NORMALIZE, "-channels.mean[", "channels.mean["),
        Mutation("index: channel of a feature", NORMALIZE, "(feature + e) / channels.stride", "(feature + e)"),
    ],
    "mixup_cross_entropy": [
        Mutation("sign: shift", CROSS_ENTROPY, "to_acc(logit) - shift", "to_acc(logit) + shift"),
        Mutation("sign: soft target", CROSS_ENTROPY, "correction - soft_target", "correction + soft_target"),
        Mutation("sign: own logit", CROSS_ENTROPY, "result -= row.own_weight", "result += row.own_weight"),
        Mutation("sign: smoothing", CROSS_ENTROPY, "result -= row.spread", "result += row.spread"),
        Mutation("index: own and partner's class", CROSS_ENTROPY, "if (c == row.own) soft_target += own_weight;",
                 "if (c == row.own) soft_target += partner_weight;"),
        Mutation("index: weight of the partner's class", CROSS_ENTROPY, "weight[row.partner]", "weight[row.own]"),
        Mutation("index: weights of a vector", CROSS_ENTROPY, "weight + parts.first + (base", "weight + (base"),
        Mutation("index: weights of the singles", CROSS_ENTROPY, "weight + parts.single(k)", "weight + k"),
        Mutation("lane: sum of half a warp", CROSS_ENTROPY, "kWarpSize / 2; offset > 0", "kWarpSize / 4; offset > 0"),
    ],
}  # fmt: skip
