"""Calls of the CUDA launchers at the edges of what they promise, each with what must come out.

Every `check_*` takes the launchers of an operation; tests run them on each device, mutations on broken kernels.
"""

import torch

from tests.cuda import batch_hard_calls, contrastive_calls, row_pairs_calls, sigmoid_pairs_calls
from tests.cuda import mixing_calls as mixing
from tests.cuda import test_momentum_update as momentum
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
# Norms beside 1e-12, where a row begins to be normalised rather than scaled.
SHORT = (0.97e-12, 1.03e-12)


def short_rows(count, width, dtype):
    """Rows of the norms `SHORT` in turn, in directions of their own."""
    rows = torch.nn.functional.normalize(keys_of(count, width, torch.float64), dim=1)
    lengths = torch.tensor(SHORT, dtype=torch.float64)[torch.arange(count) % 2]
    return (rows * lengths[:, None]).to(dtype)


def odd_address(tensor):
    """The same values one element into their memory."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def awkward_rows(rows):
    """The same rows where 16 bytes cannot be read at a time: for the address alone, the stride of columns alone."""
    n, d = rows.shape
    at_an_odd_address = torch.zeros(n, d + 8, dtype=rows.dtype)[:, 1 : d + 1].copy_(rows)
    return at_an_odd_address, torch.zeros(n, 2 * d, dtype=rows.dtype)[:, ::2].copy_(rows)


def in_padded_rows(rows):
    """The same rows, of an odd width, a multiple of 16 bytes apart and NaN between them."""
    n, d = rows.shape
    return torch.full((n, -(-d // 8) * 8), torch.nan, dtype=rows.dtype)[:, :d].copy_(rows)


def require_halves(found, exact):
    """Gradients beyond float16's numbers are infinite, the others are numbers."""
    beyond, within = exact.abs() > 66000, exact.abs() < 65000
    require(beyond.any() and within.any(), "nothing on one side of float16's end")
    require(torch.equal(found[beyond].double(), exact[beyond].sign() * torch.inf), "clamped")
    require(found[within].isfinite().all(), "not finite")


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


def check_mixup(library):
    # From 4097 samples on their order is made in global memory.
    samples = ((63, 3), (64, 4), (65, 5), (1023, 1), (1025, 1), (4096, 1), (4097, 1))
    for count, features in ((3, 511), (4, 512), (5, 513), *samples):
        with check(f"{count} samples of {features} numbers"):
            x, lam = keys_of(count, features, torch.float32), torch.linspace(0, 1, count)
            permutation = torch.arange(count).roll(1)
            exact = lam[:, None].double() * x + (1 - lam[:, None].double()) * x[permutation]
            for parts in (1, 2):
                out, _ = mixing.mixup(library, x, lam, permutation, parts=parts)
                torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    with check("samples far apart"):
        x, lam, permutation = keys_of(5, 24, torch.float32), torch.rand(5), torch.tensor([3, 4, 1, 2, 0])
        right, _ = mixing.mixup(library, x, lam, permutation)
        found, _ = mixing.mixup(library, far_apart(x), lam, permutation, torch.full_like(x, torch.nan))
        require(torch.equal(found, right), "out of place")
        for parts in (1, 2):
            far = far_apart(x)
            mixing.mixup(library, far, lam, permutation, far, parts=parts)
            require(torch.equal(far.contiguous(), right), "in place")
        expected = mixing.mixup_bwd(library, right, x, lam, permutation)[:2]
        found = mixing.mixup_bwd(
            library, far_apart(right), far_apart(x), lam, permutation, grad_x=far_apart(torch.zeros_like(x))
        )[:2]
        require(all(map(torch.equal, found, expected)), "gradient")
    with check("one operand at an odd address"):
        found = mixing.mixup_bwd(library, right, odd_address(x), lam, permutation)[:2]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with check("weights of 0 beside infinite numbers"):
        x = torch.tensor([[1.0, torch.inf, -torch.inf], [2.0, 3.0, 4.0]])
        out, _ = mixing.mixup(library, x, torch.tensor([0.0, 1.0]), torch.tensor([1, 0]))
        require(torch.equal(out, x[[1, 1]]), "a weight of 0 multiplied")
        lam = torch.tensor([0.5, 1.0])
        grad = mixing.mixup_bwd(library, x.flip(0), None, lam, torch.tensor([1, 0]))[0]
        require(torch.equal(grad[0], x[1] / 2), "a weight of 0 multiplied in the gradient")
    with check("halves beyond 65504, and NaN"):
        x = torch.tensor([[65504.0, -65504.0, torch.nan], [65504.0, -65504.0, 1.0]]).half()
        out, _ = mixing.mixup(library, x, torch.full((2,), 0.5), torch.tensor([1, 0]))
        require(torch.equal(out[:, :2], x[:, :2]) and out[:, 2].isnan().all(), "clamped")
        lam, swap = torch.tensor([1.0, 0.0]), torch.tensor([1, 0])
        grad = mixing.mixup_bwd(library, x[:, :2].contiguous(), None, lam, swap)[0]
        require(torch.equal(grad[0], 2 * x[0, :2]) and (grad[1] == 0).all(), "a clamped gradient")


def check_cutmix(library):
    x = keys_of(5, 35, torch.float32).view(5, 1, 5, 7)
    boxes = torch.tensor([[0, 4, 1, 6], [1, 3, 0, 7], [2, 5, 2, 3], [0, 5, 0, 7], [3, 3, 1, 2]])
    permutation = torch.tensor([3, 4, 1, 2, 0])
    for count in (15, 16, 17, 127, 128, 129, 4096, 4097):
        with check(f"{count} samples"):
            pixels = torch.arange(count * 15.0).view(count, 1, 3, 5)
            inside, order = torch.tensor([[1, 3, 0, 4]]).expand(count, 4), torch.arange(count).roll(1)
            exact = pixels.clone()
            exact[:, :, 1:, :4] = pixels[order][:, :, 1:, :4]
            out, _ = mixing.cutmix(library, pixels, inside, order)
            require(torch.equal(out, exact), "out of place")
            mixing.cutmix(library, pixels, inside, order, pixels)
            require(torch.equal(pixels, exact), "in place")
    with check("samples far apart"):
        right, _ = mixing.cutmix(library, x, boxes, permutation)
        found, _ = mixing.cutmix(library, far_apart(x), boxes, permutation, torch.zeros_like(x))
        require(torch.equal(found, right), "out of place")
        far = far_apart(x)
        mixing.cutmix(library, far, boxes, permutation, far)
        require(torch.equal(far.contiguous(), right), "in place")
        expected, _ = mixing.cutmix_bwd(library, x, boxes, permutation)
        args = (far_apart(x), boxes, permutation, torch.zeros_like(x))
        require(torch.equal(mixing.cutmix(library, *args, function="cutmix_bwd")[0], expected), "gradient")
        found, _ = mixing.cutmix(library, x, boxes, permutation, far_apart(torch.zeros_like(x)))
        require(torch.equal(found, right), "into samples far apart")
    with check("images at an odd address"):
        images = keys_of(5, 24, torch.float32).view(5, 1, 4, 6)
        for function in ("cutmix_fwd", "cutmix_bwd"):
            found, right = (
                mixing.cutmix(library, each, boxes, permutation, torch.zeros(5, 1, 4, 6), function=function)[
                    0
                ]
                for each in (odd_address(images), images)
            )
            require(torch.equal(found, right), "other images")
    with check("a gradient beyond float16"):
        grad = torch.tensor([65504.0, -40000.0, 2.0]).half().view(1, 1, 1, 3).expand(2, 1, 1, 3).contiguous()
        halves = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 3]])
        found, _ = mixing.cutmix_bwd(library, grad, halves, torch.tensor([1, 0]))
        require(torch.equal(found[0], 2 * grad[0]) and (found[1] == 0).all(), "clamped")
    with check("groups of samples"):
        many = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 33, 33).contiguous()
        whole, order = torch.tensor([[0, 33, 0, 33]]).expand(40, 4), torch.arange(40).roll(1)
        out, _ = mixing.cutmix(library, many, whole, order)
        require(torch.equal(out, many[order]), "other samples")
        grad, _ = mixing.cutmix_bwd(library, many, whole, order)
        require(torch.equal(grad, many.roll(-1, 0)), "the gradient of other samples")


def check_mixup_normalize(library):
    mean, std = torch.tensor([0.4]), torch.tensor([0.3])
    for count, features in ((3, 2047), (4, 2048), (5, 2049), (1, 15), (8, 16), (9, 17), (1023, 1), (1025, 1)):
        with check(f"{count} images of {features} numbers"):
            generator = torch.Generator().manual_seed(count)
            x = torch.randint(0, 256, (count, 1, 1, features), generator=generator).to(torch.uint8)
            lam, permutation = torch.linspace(0, 1, count), torch.arange(count).roll(1)
            share = lam.double().view(-1, 1, 1, 1)
            exact = (share * x + (1 - share) * x[permutation]) / 255
            for parts in (1, 2):
                out, _ = mixing.mixup_normalize(
                    library, x, lam, permutation, mean, std, torch.float32, parts=parts
                )
                expected = (exact - mean.double()) / std.double()
                torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    with check("samples far apart"):
        operands = (lam, permutation, mean, std, torch.float32)
        right, found = (mixing.mixup_normalize(library, images, *operands)[0] for images in (x, far_apart(x)))
        require(torch.equal(found, right), "other samples")
        x, lam, permutation = x[:120].reshape(5, 1, 4, 6), lam[:5], torch.tensor([3, 4, 1, 2, 0])
        operands = (lam, permutation, mean, std, torch.float32)
        right, _ = mixing.mixup_normalize(library, x, *operands)
        results = far_apart(torch.zeros_like(right))
        require(
            torch.equal(mixing.mixup_normalize(library, x, *operands, out=results)[0], right), "far results"
        )
    with check("images that are no vectors"):
        wider = torch.zeros(5, 27, dtype=torch.uint8)[:, :24].copy_(x.view(5, 24)).unflatten(1, (1, 4, 6))
        for images in (odd_address(x), wider):
            out = torch.zeros_like(right)
            require(
                torch.equal(mixing.mixup_normalize(library, images, *operands, out=out)[0], right),
                "other samples",
            )


def check_mixup_cross_entropy(library):
    for classes in (31, 32, 33, 127, 128, 129, 511, 512, 513, 2047, 2048, 2049):
        with check(f"{classes} classes"):
            logits, target = keys_of(3, classes, torch.float32), torch.tensor([0, classes - 1, classes // 2])
            same, ones = torch.arange(3), torch.ones(3)
            loss, lse, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, target, same, ones)
            exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
            torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
            grad, _ = mixing.mixup_cross_entropy_bwd(library, ones.double(), logits, target, same, ones, lse)
            one_hot = torch.nn.functional.one_hot(target, classes)
            torch.testing.assert_close(
                grad.double(), logits.double().softmax(1) - one_hot, rtol=1e-5, atol=1e-6
            )
    with check("rows far apart"):
        logits, target, same, ones = (
            keys_of(3, 40, torch.float32),
            torch.arange(3),
            torch.arange(3),
            torch.ones(3),
        )
        right = mixing.mixup_cross_entropy_fwd(library, logits, target, same, ones)[:2]
        found = mixing.mixup_cross_entropy_fwd(library, far_apart(logits), target, same, ones)[:2]
        require(all(map(torch.equal, found, right)), "loss")
        grads = [
            mixing.mixup_cross_entropy_bwd(library, ones.double(), rows, target, same, ones, right[1])[0]
            for rows in (logits, far_apart(logits))
        ]
        require(torch.equal(*grads), "gradient")
    with check("rows of two classes count 1"):
        share = torch.full((3,), 0.1)
        _, _, counted, _ = mixing.mixup_cross_entropy_fwd(library, logits, target, same, share)
        require((counted == 1).all(), "shares that add up to nearly 1")
    with check("gradients beyond float16"):
        logits, order, lam = keys_of(3, 9, torch.float16), torch.arange(3), torch.ones(3)
        *_, lse, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, order, order, lam)
        grads = torch.full((3,), 3e5, dtype=torch.float64)
        found, _ = mixing.mixup_cross_entropy_bwd(library, grads, logits, order, order, lam, lse)
        require_halves(found, 3e5 * (logits.double().softmax(1) - torch.eye(3, 9)))
    with check("targets of weight 0 beside infinite logits"):
        logits = keys_of(2, 5, torch.float32)
        logits[0, 3] = logits[1, 1] = -torch.inf
        target, permutation, lam = torch.tensor([1, 3]), torch.tensor([1, 0]), torch.tensor([1.0, 1.0])
        loss, _, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, target, permutation, lam)
        require(loss.isfinite().all(), "the partner's class counts")
        loss, _, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, target.flip(0), permutation, 1 - lam)
        require(loss.isfinite().all(), "the own class counts")


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
