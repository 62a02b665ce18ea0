"""Calls of the CUDA launchers at the edges of what they promise, each with what must come out.

Every `check_*` takes the launchers of an operation; tests run them on each device, mutations on broken kernels.
"""

import torch

from tests.cuda import batch_hard_calls, contrastive_calls, row_pairs_calls, sigmoid_pairs_calls
from tests.cuda import test_momentum_update as momentum
from tests.cuda.edge_rows import awkward_rows, in_padded_rows, odd_address, require_halves, short_rows
from tests.cuda.edges_of_mixing import (
    check_cutmix,
    check_mixup,
    check_mixup_cross_entropy,
    check_mixup_normalize,
)
from tests.cuda.mutation import check, require
from tests.cuda.queue_push_calls import push_on, ring_on
from tests.helpers import random_rows
from tests.layouts import far_apart
from tests.support import contrastive as support
from tests.support import sigmoid_pairs as pairs
from tests.support.batch_hard import labels_of, small_integers
from tests.support.queue_push import keys_of

# One below, at and one above the blocks of rows and tiles of columns of every engine: 32, 64 and 128.
SIZES = (31, 32, 33, 63, 64, 65, 127, 128, 129)
# The same of the steps of 128 bytes of halves and of the widths at which another accumulator or kernel begins.
WIDTHS = (63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
# Those in which a row can be so short; float16 ends at 6e-8.
EVERY_DTYPE = (torch.float64, torch.float32, torch.bfloat16)
# Rows whose 128th lies past 2^31.
BLOCKS_APART = 2**24 + 64


def check_contrastive(library, sizes=SIZES, widths=WIDTHS):
    half, single = torch.float16, torch.float32
    for d in widths:
        with check(f"width {d}"):
            contrastive_calls.check_parity(library, support.random_call(5, 7, d, half))
            contrastive_calls.check_parity(library, support.random_call(5, 7, d, half), expectation=True)
    # Near 0 logits, so that one entry too many or too few is one in as many as there are.
    for n, m in zip(sizes, reversed(sizes), strict=True):
        with check(f"{n} rows, {m} columns"):
            both = support.random_call(n, m, 8, single, temperature=10.0, both_directions=True)
            contrastive_calls.check_parity(library, both, splits=2)
            square = support.random_call(n, None, 8, half, temperature=10.0)
            contrastive_calls.check_parity(library, square)
            kept = support.random_call(n, m, 8, half, temperature=10.0)
            contrastive_calls.check_parity(library, kept, expectation=True, splits=2)
    with check("blocks of one row and column"):
        both = support.random_call(129, 129, 256, half, both_directions=True)
        contrastive_calls.check_parity(library, both, blocks=(1, 1))
    with check("short rows"):
        call = support.random_call(6, 5, 8, single)
        call = call.replace(rows=short_rows(6, 8, single), columns=short_rows(5, 8, single))
        fwd, bwd, _ = contrastive_calls.run(library, call, call.upstream())
        exact = support.exact(call)
        torch.testing.assert_close(fwd.lse, exact["lse"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bwd.grad_rows.double(), exact["grad_rows"], rtol=1e-4, atol=1e6)
    with check("ids that differ above 32 bits"):
        call = support.random_call(9, 9, 8, single, temperature=10.0)
        numbers = torch.arange(9) * 2**32
        call = call.replace(row_ids=numbers, column_ids=numbers)
        contrastive_calls.check_parity(library, call)
    with check("positives that name one column"):
        call = support.random_call(40, 40, 8, half, positives=48)
        call = call.replace(positives=torch.full_like(call.positives, 3))
        contrastive_calls.check_parity(library, call)
        contrastive_calls.check_parity(
            library,
            support.random_call(12, 9, 8, single, positives=3).replace(positives=torch.full((12, 3), 2)),
            expectation=True,
        )
    check_low_temperature(library)
    with check("a large negative scale"):
        for m in (None, 7):
            call = support.random_call(6, m, 8, single, both_directions=m is not None)
            contrastive_calls.check_parity(library, call.replace(scale=torch.tensor(-1000.0)))
    with check("rows that are no vectors"):
        call = support.random_call(9, 7, 24, half)
        (rows, _), (_, columns) = awkward_rows(call.rows), awkward_rows(call.columns)
        contrastive_calls.check_parity(library, call.replace(rows=rows, columns=columns))
        call = support.random_call(9, 7, 17, half)
        rows, columns = in_padded_rows(call.rows), in_padded_rows(call.columns)
        contrastive_calls.check_parity(library, call.replace(rows=rows, columns=columns))
    with check("gradients beyond float16"):
        call = support.random_call(9, 7, 24, half)
        exact = support.exact(call)
        factor = 65504 / exact["grad_rows"].abs().median()
        upstream = [None if grad is None else grad * factor for grad in call.upstream()]
        _, bwd, _ = contrastive_calls.run(library, call, upstream)
        require_halves(bwd.grad_rows, exact["grad_rows"] * factor)
    with check("rows far apart"):
        call = support.random_call(35, 5, 24, half)
        upstream = call.upstream()
        far = call.replace(rows=far_apart(call.rows), columns=far_apart(call.columns))
        across = call.replace(rows=far_apart(call.rows, 1), columns=far_apart(call.columns, 1))
        for options in ({}, {"expectation": True}):
            near, *grads = contrastive_calls.run(library, call, upstream, **options)[:2]
            for other in (far, across):
                again, *others = contrastive_calls.run(library, other, upstream, **options)[:2]
                for ours, right in zip((*again, *others[0]), (*near, *grads[0]), strict=True):
                    if ours is not None:
                        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3)
    with check("narrow columns far apart"):
        call = support.random_call(3, 35, 24, single, column_dtype=half)
        far = call.replace(columns=far_apart(call.columns))
        (near, _), (again, _) = (contrastive_calls.contrastive_fwd(library, each) for each in (call, far))
        require(torch.equal(again.lse, near.lse), "other columns")
    with check("blocks of rows far apart"):
        call = support.random_call(
            130, 130, 264, half, both_directions=True, normalize=False, temperature=10.0
        )
        upstream = call.upstream()
        # The second block begins past 2^31; 2^32 before that lies memory that is there, of other numbers.
        other = torch.zeros_like(call.rows)
        _, rows, columns = far_apart(torch.cat([other, call.rows, call.columns]), gap=BLOCKS_APART).chunk(3)
        far = call.replace(rows=rows, columns=columns)
        _, near, _ = contrastive_calls.run(library, call, upstream, blocks=(1, 1))
        _, again, _ = contrastive_calls.run(library, far, upstream, blocks=(1, 1))
        for name in ("grad_rows", "grad_columns", "grad_scale"):
            require(torch.equal(getattr(again, name), getattr(near, name)), name)


def check_contrastive_additions(library, sizes=SIZES, widths=WIDTHS):
    everything = "bias padding limit exempt"
    for n, m in zip(sizes, reversed(sizes), strict=True):
        with check(f"{n} rows, {m} columns"):
            both = support.random_call(
                n, m, 8, torch.float32, temperature=10.0, both_directions=True, positives=2, additions=everything
            )  # fmt: skip
            contrastive_calls.check_parity(library, both, splits=2)
            square = support.random_call(n, None, 8, torch.float16, temperature=10.0, additions=everything)
            contrastive_calls.check_parity(library, square)
    for d in widths:
        with check(f"width {d}"):
            call = support.random_call(5, 7, d, torch.float16, both_directions=True, additions=everything)
            contrastive_calls.check_parity(library, call)


def check_low_temperature(library):
    """A softmax whose logits are about 8192 and exact, so that nothing but the rounding of lse is left to be wrong."""
    n, m = 3, 40
    rows, columns = torch.zeros(n, 4), torch.zeros(m, 4)
    rows[:, 0], columns[:, 0] = 1, 1 + torch.arange(m) * 2.0**-14
    call = support.Call(rows, columns, torch.tensor(2.0**13), normalize_rows=False, normalize_columns=False)
    with check("temperature of 1.2e-4"):
        fwd, _ = contrastive_calls.contrastive_fwd(library, call)
        bwd, _ = contrastive_calls.contrastive_bwd(library, call, fwd, torch.ones(n, dtype=torch.float64))
        exact = torch.softmax(torch.arange(m, dtype=torch.float64) / 2, 0)
        found = bwd.grad_columns[:, 0].double() / (n * 2**13)
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=1e-9)


def check_sigmoid_pairs(library, sizes=SIZES, widths=WIDTHS):
    half, single, random_call = torch.float16, torch.float32, pairs.random_call
    for d in widths:
        with check(f"width {d}"):
            sigmoid_pairs_calls.check_parity(library, random_call(5, 7, d, half))
    for n, m in zip(sizes, reversed(sizes), strict=True):
        with check(f"{n} rows, {m} columns"):
            call = random_call(n, m, 8, half, scale=0.5, bias=-0.5)
            sigmoid_pairs_calls.check_parity(library, call, splits=2)
    with check("short rows"):
        call = random_call(6, 5, 8, single)
        call = call.replace(rows=short_rows(6, 8, single), columns=short_rows(5, 8, single))
        sigmoid_pairs_calls.check_parity(library, call)
    with check("rows far apart"):
        call = random_call(35, 5, 24, half)
        right = sigmoid_pairs_calls.total_with_gradients(library, call)[:2]
        far = call.replace(rows=far_apart(call.rows), columns=far_apart(call.columns))
        found = sigmoid_pairs_calls.total_with_gradients(library, far)[:2]
        for ours, expected in zip((found[0], *found[1]), (right[0], *right[1]), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    with check("rows that are no vectors"):
        call = random_call(9, 7, 24, half)
        (rows, _), (_, columns) = awkward_rows(call.rows), awkward_rows(call.columns)
        sigmoid_pairs_calls.check_parity(library, call.replace(rows=rows, columns=columns))
        call = random_call(9, 7, 17, half)
        rows, columns = in_padded_rows(call.rows), in_padded_rows(call.columns)
        sigmoid_pairs_calls.check_parity(library, call.replace(rows=rows, columns=columns))
    with check("gradients beyond float16"):
        call = random_call(9, 7, 24, half)
        exact = pairs.exact(call)["grad_rows"]
        factor = 65504 / exact.abs().median()
        grads, _ = sigmoid_pairs_calls.weighted_gradients(library, call, call.cotangent * factor)
        require_halves(grads.rows, exact * factor)
    with check("long sums"):
        # Tiles that are all alike: their sum is a multiple of one's, to a double's rounding. No positive pair.
        few, tiles = 64, 67
        call = random_call(128, few * tiles, 8, single, scale=0.0, bias=-2.5, diagonal=2**40)
        one = sigmoid_pairs_calls.losses(library, call.replace(columns=call.columns[:few]), splits=1)[0]
        many = sigmoid_pairs_calls.losses(library, call, splits=1)[0]
        torch.testing.assert_close(many, tiles * one, rtol=1e-13, atol=0)
        total = sigmoid_pairs_calls.losses(library, call, total=True, splits=1)[0]
        torch.testing.assert_close(total, many.sum(), rtol=1e-13, atol=0)


def check_batch_hard(library, sizes=SIZES, widths=WIDTHS):
    single = torch.float32
    for d in widths:
        with check(f"width {d}"):
            x, labels = random_rows(7, d, torch.float16), torch.arange(7) % 3
            batch_hard_calls.check_choice(library, x, labels, True, "euclidean")
    for n in sizes:
        with check(f"{n} rows"):
            generator = torch.Generator().manual_seed(n)
            x = torch.randint(-1, 2, (n, 6), generator=generator).to(single)
            labels = labels_of(n, 3)
            labels[-1] = labels[0]  # the last column counts
            x[-1] = -2 * x[0]
            for splits in (1, 2):
                batch_hard_calls.check_indices(library, x, labels, "euclidean", splits=splits)
    with check("zeros of either sign"):
        a = 1e-30  # whose square is 0, or -0
        labels = torch.tensor([0, 0, 0, 1, 1])
        for signs in ([1, 1, -1, -1, 1], [1, -1, 1, 1, -1]):
            x = torch.zeros(5, 32)
            x[:, -1] = a * torch.tensor(signs)
            (positive, negative), _ = batch_hard_calls.batch_hard(library, x, labels, False, "cosine")
            require(positive.tolist() == [1, 0, 0, 4, 3], "the lowest positive")
            require(negative.tolist() == [3, 3, 3, 0, 0], "the lowest negative")
    with check("rows far apart"):
        x, labels = random_rows(35, 24, torch.float16), torch.arange(35) % 3
        right, _ = batch_hard_calls.batch_hard(library, x, labels, True, "euclidean")
        for other in (far_apart(x), far_apart(x, 1), *awkward_rows(x)):
            found, _ = batch_hard_calls.batch_hard(library, other, labels, True, "euclidean")
            require(all(map(torch.equal, found, right)), "other rows")
        x = in_padded_rows(x[:, :17])
        batch_hard_calls.check_choice(library, x, labels, True, "euclidean")
    with check("the first of two NaN keys that one lane sees"):
        x, labels = small_integers(64, 6, single), torch.arange(64) % 2
        x[[37, 45], 3] = torch.nan
        (positive, negative), _ = batch_hard_calls.batch_hard(library, x, labels, False, "euclidean")
        require(positive[1] == 37 and negative[0] == 37, "not the first NaN")


def check_queue_push(library, dtypes=EVERY_DTYPE):
    for count, width in ((7, 3), (8, 4), (9, 5), (7, 127), (8, 128), (9, 129)):
        with check(f"{count} keys of {width} numbers"):
            ring = ring_on(library, 20, width, torch.float32, "cpu")
            ring.push(keys_of(count, width, torch.float32), True)
            ring.check()
    for dtype in dtypes:
        with check(f"short keys of {dtype}"):
            ring = ring_on(library, 9, 8, dtype, "cpu")
            ring.push(short_rows(6, 8, dtype), True)
            ring.check()
    with check("a NaN makes a key NaN"):
        keys = keys_of(3, 8, torch.float32)
        keys[1, 5] = torch.nan
        ring = ring_on(library, 4, 8, torch.float32, "cpu")
        ring.push(keys, True)
        require(ring.storage[1].isnan().all() and not ring.storage[0].isnan().any(), "numbers in its row")
    with check("numbers beyond float16's"):
        keys = torch.tensor([[65504.0, 65519.0, 65520.0, -70000.0]])
        ring = ring_on(library, 2, 4, torch.float16, "cpu")
        ring.push(keys, False)
        require(torch.equal(ring.storage[0], keys[0].half()), "clamped")
    with check("a ring at an odd address"):
        ring = ring_on(library, 9, 8, torch.float32, "cpu", position=7)
        ring.storage = odd_address(ring.storage)
        ring.push(keys_of(6, 8, torch.float32), True)
        ring.check()
    with check("keys far apart"):
        for dim in (0, 1):
            ring = ring_on(library, 9, 8, torch.float32, "cpu", position=7)
            ring.push(far_apart(keys_of(6, 8, torch.float32), dim), True)
            ring.check()
    with check("a row past 2^31"):
        size = 2**31 + 5
        storage = far_apart(torch.zeros(3, 4))[0].as_strided((size, 2), (2, 1))
        position, filled = torch.tensor(2**31 + 3), torch.tensor(2)
        keys = keys_of(4, 2, torch.float32)
        push_on(library)(storage, keys, position, filled, False)
        places = [(2**31 + 3 + b) % size for b in range(4)]
        require(torch.equal(torch.stack([storage[place] for place in places]), keys), "other rows")


def check_row_pairs(library, dtypes=EVERY_DTYPE):
    from tests.support.row_pairs import Call

    for n, d in ((7, 127), (8, 128), (9, 129), (1, 511), (2, 512), (1, 513)):
        with check(f"{n} rows of {d} numbers"):
            call = Call(*(keys_of(n, d, torch.float32, seed=k) for k in range(3)), True, "distance")
            _row_pairs(library, call, call)
    for dtype in dtypes:
        for measure in ("product", "distance"):
            with check(f"short rows of {dtype}, {measure}"):
                x, y = short_rows(6, 8, dtype), keys_of(6, 8, dtype, seed=3)
                for call in (Call(x, y, None, True, measure), Call(y, x, None, True, measure)):
                    _row_pairs(library, call, call)
    with check("gradients beyond float16"):
        x, y = (keys_of(5, 24, torch.float16, seed=k) for k in range(2))
        _, saved = row_pairs_calls.row_pairs_fwd(library, x, y, None, False, "product")[0]
        g = torch.full((5,), 5e4, dtype=torch.float64)
        (grad, _, _), _ = row_pairs_calls.row_pairs_bwd(
            library, g, x, y, None, saved, False, "product", True, True, False
        )
        require_halves(grad, g[:, None] * y.double())
    with check("rows far apart"):
        call = Call(*(keys_of(5, 24, torch.float32, seed=k) for k in range(3)), True, "distance")
        for dim in (0, 1):
            _row_pairs(library, call.with_operands(lambda rows, dim=dim: far_apart(rows, dim)), call)
    with check("one operand at an odd address"):
        x, y, z = (keys_of(5, 24, torch.float32, seed=k) for k in range(3))
        for call in (
            Call(x, odd_address(y), None, True, "distance"),
            Call(x, y, odd_address(z), True, "distance"),
        ):
            _row_pairs(library, call, call)


def _row_pairs(library, call, judged):
    from tests.support.row_pairs import check_results

    x, y, z, flags = call.x, call.y, call.z, (call.normalize, call.measure)
    (values, saved), _ = row_pairs_calls.row_pairs_fwd(library, x, y, z, *flags)
    grads, _ = row_pairs_calls.row_pairs_bwd(
        library, call.cotangent, x, y, z, saved, *flags, True, True, z is not None
    )
    check_results([values, *(grad for grad in grads if grad is not None)], judged, "cuda")


def check_momentum_update(library):
    for count in (momentum.CHUNK - 1, momentum.CHUNK, momentum.CHUNK + 1):
        with check(f"{count} numbers"):
            momentum.check(library, [momentum.triple(count, torch.bfloat16, torch.float32, "cpu")], 0.75)
    for count in (momentum.MAX_TENSORS - 1, momentum.MAX_TENSORS, momentum.MAX_TENSORS + 1):
        with check(f"{count} tensors"):
            triples = [momentum.triple(1, torch.bfloat16, torch.float32, "cpu", seed=i) for i in range(count)]
            momentum.check(library, triples, 0.75)
    for dtype in (torch.float16, torch.bfloat16):
        with check(f"momentum of 0 and 1, {dtype}"):
            for value in (0.0, 1.0):
                master, shadow, source = momentum.triple(4500, dtype, torch.float32, "cpu", seed=2)
                expected = (source if value == 0 else master).clone()
                momentum.update(library, [(master, shadow, source)], value)
                require(torch.equal(master, expected), "not the source, or the master, bit for bit")
                require(torch.equal(shadow, expected.to(dtype)), "not its rounding")
    with check("an average beyond float16's numbers"):
        master = torch.tensor([70000.0, -1e6, 65519.0, 1.0])
        shadow, source = master.half(), torch.tensor([1.0, 2.0, 3.0, 4.0])
        exact = (master + source) / 2
        momentum.update(library, [(master, shadow, source)], 0.5)
        require(torch.equal(master, exact), "pulled down by its shadow")
        require(torch.equal(shadow, exact.half()), "shadow")
        nan = torch.tensor([torch.nan, 1.0])
        parts = [(nan, nan.half(), torch.ones(2))]
        momentum.update(library, parts, 0.5)
        require(nan[0].isnan() and parts[0][1][0].isnan() and nan[1] == 1, "NaN")


CHECKS = {
    "mixup_cross_entropy": check_mixup_cross_entropy,
    "contrastive": check_contrastive,
    "contrastive_additions": check_contrastive_additions,
    "sigmoid_pairs": check_sigmoid_pairs,
    "batch_hard": check_batch_hard,
    "queue_push": check_queue_push,
    "row_pairs": check_row_pairs,
    "momentum_update": check_momentum_update,
    "mixup": check_mixup,
    "cutmix": check_cutmix,
    "mixup_normalize": check_mixup_normalize,
}
