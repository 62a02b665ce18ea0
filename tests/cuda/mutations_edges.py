"""Mutations that show at edges only: sizes beside a tile's, norms beside 1e-12, places past 2^31, exact promises."""

from tests.cuda import edges
from tests.cuda.mutation import Mutation

CONTRASTIVE, SIGMOID, HARD, QUEUE = "contrastive.cuh", "sigmoid_pairs.cuh", "batch_hard.cuh", "queue_push.cuh"
BACKWARD, EXPECTATION = "contrastive_bwd.cuh", "contrastive_expectation.cuh"
MOMENTUM, PAIRS, MIXUP, CUTMIX = "momentum_update.cuh", "row_pairs.cuh", "mixup.cuh", "cutmix.cuh"
NORMALIZE, CROSS_ENTROPY, WALK = "mixup_normalize.cuh", "mixup_cross_entropy.cuh", "permutation_walk.cuh"
ROWS, TILE, MATH, BLOCKS = "rows.cuh", "device/tile.cuh", "device/math.cuh", "coefficient_blocks.cuh"
LAUNCHER = "launcher.cuh"
EPS = "norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm"

SHORTEST_NORM = Mutation("shortest norm, 5 % longer", MATH, "kNormEps = 1e-12f", "kNormEps = 1.05e-12f")
SHORTEST_NORM_OF_FLOAT64 = Mutation("shortest norm, 5 % longer in float64", MATH, "double kNormEps = 1e-12;",
                                    "double kNormEps = 1.05e-12;")  # fmt: skip
HALF_CLAMP = Mutation("half: numbers beyond it clamped", MATH, "return __float2half_rn(x);",
                      "return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));")  # fmt: skip
TILE_ROWS = Mutation("index: rows of a tile past 2^31", TILE, "matrix + (row0 + Share::first_row()) * row_stride",
                     "matrix + static_cast<int>((row0 + Share::first_row()) * row_stride)",
                     at="void load_tile(")  # fmt: skip
TILE_STEP = Mutation("index: next rows of a tile past 2^31", TILE, "step = Share::kRowsAtOnce * row_stride;",
                     "step = static_cast<int>(Share::kRowsAtOnce * row_stride);", at="void load_tile(")  # fmt: skip
NO_VECTORS = [
    Mutation(
        "vectors: address of the rows",
        LAUNCHER,
        "return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&",
        "return",
    ),
    Mutation("vectors: stride of the columns", LAUNCHER, "strides[1] == 1 &&"),
    Mutation("vectors: width of the rows", LAUNCHER, "D % kVector == 0 &&"),
]

MUTATIONS = {
    "contrastive": [
        SHORTEST_NORM,
        HALF_CLAMP,
        TILE_ROWS,
        TILE_STEP,
        *NO_VECTORS,
        Mutation("one exponential: scales below 0", CONTRASTIVE,
                 "Math<acc_t>::abs(a) <= acc_t(kMostBase2Scale)", "a <= acc_t(kMostBase2Scale)"),
        Mutation("index: rows of a widened tile past 2^31", TILE, "matrix + (row0 + Share::first_row()) * row_stride",
                 "matrix + static_cast<int>((row0 + Share::first_row()) * row_stride)",
                 at="void load(const narrow_t"),
        Mutation("index: next rows of a widened tile past 2^31", TILE, "step = Share::kRowsAtOnce * row_stride;",
                 "step = static_cast<int>(Share::kRowsAtOnce * row_stride);", at="void load(const narrow_t"),
        Mutation("index: rows of a block past 2^31", BLOCKS, "x.data += first * x.row_stride;",
                 "x.data += static_cast<int>(first * x.row_stride);"),
        Mutation("index: own rows of a product past 2^31", BLOCKS, "own_factor.data + row * own_factor.stride",
                 "own_factor.data + static_cast<int>(row * own_factor.stride)"),
        Mutation("index: other rows of a product past 2^31", BLOCKS, "other_factor.data + column * other_factor.stride",
                 "other_factor.data + static_cast<int>(column * other_factor.stride)"),
        Mutation("excluded: from one column past the end on", CONTRASTIVE,
                 "column0 + kColumns <= other.count", "column0 + kColumns <= other.count + 1"),
        Mutation("blocks: the last of one row", BLOCKS, "row < N; row += sizes.rows", "row + 1 < N; row += sizes.rows"),
        Mutation("blocks: the last of one column", BLOCKS, "column < M; column += sizes.columns",
                 "column + 1 < M; column += sizes.columns"),
        Mutation("terms: rounding of lse", BACKWARD,
                 "* Math<double>::exp2(rounded - exact)"),
        Mutation("half: bound of many positives", ROWS, "2 * acc_t(P) * positive_bound", "2 * positive_bound"),
        Mutation("excluded: ids above 32 bits", CONTRASTIVE, "id_i != id_j != problem",
                 "static_cast<int>(id_i) != static_cast<int>(id_j) != problem"),
        Mutation("index: strided rows past 2^31", ROWS, "data[row * row_stride + d * column_stride]",
                 "data[static_cast<int>(row * row_stride + d * column_stride)]"),
        Mutation("index: rows of the preparation past 2^31", ROWS, "data + row * row_stride;",
                 "data + static_cast<int>(row * row_stride);"),
        Mutation("index: columns of the preparation past 2^31", ROWS, "d < D ? x[d * column_stride]",
                 "d < D ? x[static_cast<int>(d * column_stride)]"),
        Mutation("positives: several of one entry", TILE, "c[m][n][e] += here ? x : acc_t(0);",
                 "c[m][n][e] = here ? x : c[m][n][e];"),
        Mutation("expectation: several positives of one row", EXPECTATION,
                 "sum += static_cast<acc_t>(grad_positive_logits",
                 "sum = static_cast<acc_t>(grad_positive_logits"),
    ],
    "sigmoid_pairs": [
        SHORTEST_NORM,
        HALF_CLAMP,
        TILE_ROWS,
        TILE_STEP,
        *NO_VECTORS,
        Mutation("pairs: whole tiles but for a column", SIGMOID, "&& columns == kColumns",
                 "&& columns + 1 >= kColumns"),
        Mutation("forward: sums of tiles in float", SIGMOID, "double sum[4] = {};", "acc_t sum[4] = {};"),
        Mutation("total: sum of rows in float", ROWS, "sum += values[i];",
                 "sum = static_cast<float>(sum + values[i]);"),
    ],
    "batch_hard": [
        TILE_ROWS,
        TILE_STEP,
        *NO_VECTORS,
        Mutation("take: of NaN keys the last", HARD, "(candidate != candidate) & (key == key)",
                 "candidate != candidate"),
        Mutation("take: of equal keys the last", HARD, "kLargest ? a > b : a < b", "kLargest ? a >= b : a <= b"),
        Mutation("the last column", HARD, "inside = column < count;", "inside = column < count - 1;"),
    ],
    "queue_push": [
        SHORTEST_NORM,
        SHORTEST_NORM_OF_FLOAT64,
        Mutation("half: numbers beyond it clamped", QUEUE, "else return __float2half_rn(x);",
                 "else return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));"),
        Mutation("shortest norm instead of NaN", QUEUE, EPS, "Math<acc_t>::max(norm, Math<acc_t>::kNormEps)"),
        Mutation("groups: address of the ring", "queue_push.cu", "in_groups<storage_t>(args.storage, args.D)",
                 "args.D % kGroup == 0"),
        Mutation("index: keys past 2^31", QUEUE, "keys + b * row_stride", "keys + static_cast<int>(b * row_stride)"),
        Mutation("index: numbers of a key past 2^31", QUEUE, "to_acc(key[d * column_stride]) * factor",
                 "to_acc(key[static_cast<int>(d * column_stride)]) * factor"),
        Mutation("index: rows of the ring past 2^31", QUEUE, "wrap(wrap(*position, K) + b % K, K) * D",
                 "static_cast<int>(wrap(wrap(*position, K) + b % K, K)) * D"),
    ],
    "row_pairs": [
        SHORTEST_NORM,
        SHORTEST_NORM_OF_FLOAT64,
        HALF_CLAMP,
        Mutation("index: rows past 2^31", PAIRS, "operands.data[k] + row * operands.row_stride[k]",
                 "operands.data[k] + static_cast<int>(row * operands.row_stride[k])", at="row_pairs_fwd_kernel("),
        Mutation("index: rows past 2^31, backward", PAIRS, "operands.data[k] + row * operands.row_stride[k]",
                 "operands.data[k] + static_cast<int>(row * operands.row_stride[k])", at="row_pairs_bwd_kernel("),
        Mutation("index: columns past 2^31", PAIRS, "row[d * stride]", "row[static_cast<int>(d * stride)]"),
        Mutation("vectors: the last operand", "row_pairs.cu", "k <= args.pairs", "k < args.pairs",
                 at="bool aligned = args.D % kSize == 0;"),
    ],
    "momentum_update": [
        HALF_CLAMP,
        Mutation("momentum of 0 from the average's end", MOMENTUM,
                 "factor(weight < 0.5f ? weight : weight - 1.0f), from_source(!(weight < 0.5f))",
                 "factor(weight), from_source(false)"),
        Mutation("averages beyond float16", MOMENTUM, "== written ? master",
                 "== written && written < 65504.0f ? master"),
    ],
    "mixup": [
        HALF_CLAMP,
        Mutation("index: samples past 2^31", MIXUP, "x.data + sample * x.stride + feature",
                 "x.data + static_cast<int>(sample * x.stride) + feature", at="mixup_walk_kernel("),
        Mutation("index: samples of the gradient past 2^31", MIXUP, "batch.data + sample * batch.stride + feature",
                 "batch.data + static_cast<int>(sample * batch.stride) + feature"),
        Mutation("index: samples at the edges past 2^31", MIXUP, "x.data + sample * x.stride + feature",
                 "x.data + static_cast<int>(sample * x.stride) + feature", at="mixup_edges_kernel("),
        Mutation("index: results past 2^31", MIXUP, "out.data + step.sample() * out.stride",
                 "out.data + static_cast<int>(step.sample() * out.stride)"),
        Mutation("index: gradients past 2^31", MIXUP, "grad_x.data + step.sample() * grad_x.stride",
                 "grad_x.data + static_cast<int>(step.sample() * grad_x.stride)"),
        Mutation("gradient: address of the samples", "mixup.cu",
                 "aligned<scalar_t>(args.x, args.x_stride, common.B) &&"),
        Mutation("index: partners above 32 bits", WALK, "const int64_t partner = permutation[j];",
                 "const int partner = static_cast<int>(permutation[j]);"),
        Mutation("mixup: partner's weight of 0", MIXUP, "if (next == acc_t(0)) return own == acc_t(1) ? x : own * x;"),
    ],
    "mixup_normalize": [
        Mutation("index: samples past 2^31", NORMALIZE, "x + sample * x_stride + feature",
                 "x + static_cast<int>(sample * x_stride) + feature"),
        Mutation("index: results past 2^31", NORMALIZE, "out + step.sample() * out_stride",
                 "out + static_cast<int>(step.sample() * out_stride)"),
        Mutation("vectors: address of the images", "mixup_normalize.cu",
                 "reinterpret_cast<uintptr_t>(args.x) % kVec == 0 &&"),
        Mutation("vectors: stride of the images", "mixup_normalize.cu", "args.x_stride % kVec == 0 &&"),
    ],
    "mixup_cross_entropy": [
        HALF_CLAMP,
        Mutation("index: rows past 2^31", CROSS_ENTROPY, "problem.logits + i * problem.row_stride",
                 "problem.logits + static_cast<int>(i * problem.row_stride)",
                 at="mixup_cross_entropy_loss_kernel("),
        Mutation("index: rows past 2^31, backward", CROSS_ENTROPY, "problem.logits + i * problem.row_stride",
                 "problem.logits + static_cast<int>(i * problem.row_stride)",
                 at="mixup_cross_entropy_grad_kernel("),
        Mutation("index: classes above 32 bits", CROSS_ENTROPY, "label >= 0 && label < C",
                 "static_cast<int>(label) >= 0 && static_cast<int>(label) < C"),
        Mutation("index: partners above 32 bits", CROSS_ENTROPY, "return other >= 0 && other < N ?",
                 "other = static_cast<int>(other); return other >= 0 && other < N ?"),
        Mutation("both classes count 1", CROSS_ENTROPY, "own && other ? 1.0 : of_own + of_other", "of_own + of_other"),
        Mutation("own weight of 0", CROSS_ENTROPY, "if (row.own_weight != 0) result", "result"),
        Mutation("partner's weight of 0", CROSS_ENTROPY, "if (row.partner_weight != 0) result", "result"),
    ],
    "cutmix": [
        HALF_CLAMP,
        Mutation("index: samples past 2^31", CUTMIX, "column + sample * stride",
                 "column + static_cast<int>(sample * stride)"),
        Mutation("index: samples past 2^31, out of place", CUTMIX, "x + sample * x_stride + feature",
                 "x + static_cast<int>(sample * x_stride) + feature"),
        Mutation("index: results past 2^31, out of place", CUTMIX, "out + (first + i) * out_stride",
                 "out + static_cast<int>((first + i) * out_stride)"),
        Mutation("vectors: address of the images", "cutmix.cu", "aligned(args_.x, args_.x_stride) &&"),
        Mutation("index: partners above 32 bits", CUTMIX, "const int64_t partner = permutation[i];",
                 "const int partner = static_cast<int>(permutation[i]);"),
        Mutation("index: groups of samples", CUTMIX, "int64_t{blockIdx.x / blocks}", "int64_t{blockIdx.x % blocks}"),
        Mutation("index: blocks of features", CUTMIX, "int64_t{blockIdx.x % blocks}", "int64_t{blockIdx.x}"),
    ],
}  # fmt: skip

SOME = ((31, 63, 127, 65), (63, 513))  # sizes and widths


def with_edges(operation, check):
    """The check of an operation, then that of its edges."""
    if operation not in edges.CHECKS:
        return check
    paired = ("contrastive", "contrastive_additions", "sigmoid_pairs", "batch_hard")
    sizes = SOME if operation in paired else ()

    def both(library):
        check(library)
        edges.CHECKS[operation](library, *sizes)

    return both
