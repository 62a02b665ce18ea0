"""Both gradients made in forward, for equal gradients of every row's lse (csrc/cpu/contrastive_gradients.cpp)."""

import pytest
import torch

from ssl_kernels import (
    _C,
    info_nce_loss,
    multiple_negatives_ranking_loss,
    sampled_softmax_loss,
    similarity_cross_entropy,
)
from ssl_kernels.memory import kept_at_most
from ssl_kernels.ops.contrastive import contrastive
from tests.helpers import random_rows, same_bits

pytestmark = pytest.mark.skipif(
    _C.build_info()["cpu_instruction_set"] not in ("avx512", "avx512_bf16"),
    reason="only kernels by AVX-512 make the gradients in forward",
)

HEADER = 16


@pytest.fixture(autouse=True)
def of_any_size():
    before = _C.make_gradients_from(0)
    yield
    _C.make_gradients_from(before)


# With ragged blocks of rows, panels and tiles.
N, M, D = 531, 521, 37


def operands(n=N, m=M, d=D, dtype=torch.float32, *, normalize=True, temperature=0.1, positives=1, seed=0):
    """rows, columns, scale and further arguments of `contrastive`."""
    generator = torch.Generator().manual_seed(seed)
    length = 1.0 if normalize else d**-0.25
    rows, columns = (length * random_rows(count, d, seed=seed + k) for k, count in enumerate((n, m)))
    options = {"normalize_rows": normalize, "normalize_columns": normalize}
    if positives:
        shape = (n,) if positives == 1 else (n, positives)
        options["positives"] = torch.randint(-m, m, shape, generator=generator)
    return [rows.to(dtype), columns.to(dtype), torch.tensor(1 / temperature)], options


def added(n, m, *which):
    """Additions and ids by name. A bias leaves out the last column, and "only" all columns of rows 3 and 4."""
    generator = torch.Generator().manual_seed(7)
    options = {}
    if "bias" in which:
        options["column_bias"] = torch.randn(m, generator=generator)
        options["column_bias"][-1] = -torch.inf
    if "limit" in which:
        options["row_limit"] = torch.randn(n, generator=generator)
        options["exempt"] = torch.rand(m, generator=generator) < 0.1
    if "ids" in which or "only" in which:
        options["row_ids"] = torch.randint(9, (n,), generator=generator)
        options["column_ids"] = torch.randint(9, (m,), generator=generator)
        options["only_equal_ids"] = "only" in which
        if "only" in which:
            options["row_ids"][3:5] = 99
        options["keep_diagonal"] = "diagonal" in which
    return options


def saved_gradients(function, *arguments, **options):
    """Bytes behind the 16 numbers of `kept` that `function` saves for its backward, and what it returns."""
    found = []

    def pack(tensor):
        if tensor.shape == (HEADER,) and tensor[0] == -1:
            found.append(tensor.untyped_storage().nbytes() - tensor.nbytes)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = function(*arguments, **options)
    return sum(found), value


def size_of(n, m, d):
    return 4 * ((n + m) * d + m)


def differentiate(inputs, options, weights, of_positives, **call):
    """lse, positives' logits and all gradients of Σ w_i (lse_i + f Σ_k s_ik), rows without a column left aside."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    bias = options.get("column_bias")
    if bias is not None:
        options = options | {"column_bias": bias.detach().requires_grad_()}
    result = contrastive(*leaves, **options, **call)
    there = result.lse != -torch.inf
    weights = weights.where(there, 0)
    total = (weights * result.lse.masked_fill(~there, 0)).sum()
    if result.positive_logits.numel():
        shares = weights if result.positive_logits.dim() == 1 else weights[:, None]
        total = total + of_positives * (shares * result.positive_logits).sum()
    wanted = leaves + ([] if bias is None else [options["column_bias"]])
    return [result.lse.detach(), result.positive_logits.detach(), *torch.autograd.grad(total, wanted)]


def check(inputs, options, weights=None, of_positives=-1.0, *, taken=True, tolerance=2e-6):
    """Against float64, and no further from it than twice what the other way leaves."""
    n = len(inputs[0])
    weights = torch.full((n,), 1 / n, dtype=torch.float64) if weights is None else weights
    kept, found = saved_gradients(
        differentiate, inputs, options, weights, of_positives, backend="native", equal_weights=True
    )
    assert kept == (size_of(n, *inputs[1].shape) if taken else 0)
    double = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    exact = differentiate([x.double() for x in inputs], double, weights, of_positives, backend="reference")
    other = differentiate(inputs, options, weights, of_positives, backend="native")
    for mine, right, theirs in zip(found, exact, other, strict=True):
        there = right.isfinite()
        assert torch.equal(mine.isfinite(), there)
        error, allowed = ((x.double() - right)[there].norm() for x in (mine, theirs))
        assert error <= 2 * allowed + tolerance * right[there].norm()
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("positives", [0, 1, 2])
@pytest.mark.parametrize("temperature", [1e-3, 0.1])
def test_native_is_right(normalize, positives, temperature):
    check(*operands(normalize=normalize, positives=positives, temperature=temperature))


@pytest.mark.parametrize(
    "which", ["bias", "limit", "ids", "ids diagonal", "only", "bias limit ids diagonal", "bias only"]
)
@pytest.mark.parametrize("positives", [1, 2])
def test_native_additions(which, positives):
    inputs, options = operands(positives=positives)
    found = check(inputs, options | added(N, M, *which.split()))
    if "only" in which:
        assert (found[0][3:5] == -torch.inf).all()


@pytest.mark.parametrize("of_positives", [0.0, 0.7])
@pytest.mark.parametrize("positives", [1, 3])
def test_native_positives_with_any_gradient(of_positives, positives):
    """A single positive's is expected to be minus that of the lse; what differs is added in backward."""
    check(*operands(positives=positives), of_positives=of_positives)


@pytest.mark.parametrize("of_positives", [-1.0, 0.7])
def test_native_rows_of_different_weight(of_positives):
    """Nothing of what forward made serves: the gradients are those of a call without the hint, bit for bit."""
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64) / N
    inputs, options = operands()
    found = check(inputs, options | added(N, M, "bias"), weights, of_positives)
    plain = differentiate(inputs, options | added(N, M, "bias"), weights, of_positives, backend="native")
    assert all(map(same_bits, found[2:], plain[2:]))
    nearly = torch.full((N,), 1 / N, dtype=torch.float64)
    nearly[-1] *= 1.001
    check(inputs, options, nearly, of_positives, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_native_half_precision(dtype):
    """Of bfloat16 with a bias, since products of others are made in bfloat16 where the processor has them."""
    inputs, options = operands(dtype=dtype)
    check(inputs, options | added(N, M, "bias"))


def test_native_columns_of_another_dtype_and_strides():
    inputs, options = operands(d=2 * D)
    inputs = [inputs[0][:, ::2], inputs[1][:, ::2].half(), inputs[2]]
    check(inputs, options)


@pytest.mark.parametrize("n, m, d", [(17, 65001, 5), (300, 3600, 130), (5000, 260, 1), (2100, 520, 64)])
def test_native_shapes(n, m, d):
    """Few rows, whose block may not be of 256; one block after the other; tiles for each of two threads."""
    check(*operands(n, m, d, temperature=0.5), taken=m >= 128 * torch.get_num_threads())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_native_any_number_of_threads(set_threads, threads):
    set_threads(threads)
    inputs, options = operands(N, 900)
    check(inputs, options | added(N, 900, "bias", "ids"))


def test_native_forward_and_backward_may_differ_in_threads(set_threads):
    inputs, options = operands()
    leaves = [x.requires_grad_() for x in inputs]
    set_threads(1)
    lse = contrastive(*leaves, **options, equal_weights=True, backend="native").lse
    expected = torch.autograd.grad(lse.mean(), leaves, retain_graph=True)
    set_threads(3)
    assert all(map(same_bits, torch.autograd.grad(lse.mean(), leaves), expected))


def test_native_gives_the_same_bits_again():
    """When repeated, when the graph is used twice, and whatever may be kept of logits."""
    inputs, options = operands()
    leaves = [x.requires_grad_() for x in inputs]

    def run():
        result = contrastive(*leaves, **options, equal_weights=True, backend="native")
        loss = (result.lse - result.positive_logits).mean()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(map(same_bits, torch.autograd.grad(loss, leaves), first))
        return [loss.detach(), *first]

    expected = run()
    assert all(map(same_bits, run(), expected))
    with kept_at_most(0):
        assert all(map(same_bits, run(), expected))


def test_native_gradients_scale_with_that_of_the_loss():
    inputs, options = operands()
    leaves = [x.requires_grad_() for x in inputs]
    result = contrastive(*leaves, **options, equal_weights=True, backend="native")
    loss = (result.lse - result.positive_logits).sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for factor in (-4.0, 0.0, 2.0**-20):
        found = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        for mine, right in zip(found, once, strict=True):
            torch.testing.assert_close(mine, factor * right, rtol=1e-5, atol=0)


def test_native_copies_of_what_is_saved_are_recomputed():
    """As offloading makes them: they have the header alone, and the gradients are those of a call without the hint."""
    inputs, options = operands()
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        lse = contrastive(*leaves, **options, equal_weights=True, backend="native").lse
    plain = contrastive(*leaves, **options, backend="native").lse
    assert all(map(same_bits, *(torch.autograd.grad(x.mean(), leaves) for x in (lse, plain))))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_native_bad_values_spread_as_ever(value, side, normalize):
    """A row's sum that is not finite leaves the call to the other way, bit for bit."""
    inputs, options = operands(normalize=normalize)
    inputs[side][20, 3] = value
    weights = torch.ones(N, dtype=torch.float64)
    kept, found = saved_gradients(
        differentiate, inputs, options, weights, -1.0, backend="native", equal_weights=True
    )
    assert kept == 0
    expected = differentiate(inputs, options, weights, -1.0, backend="native")
    assert all(map(same_bits, found, expected))
    assert any(x.isnan().any() for x in found)


def test_native_every_column_left_out():
    inputs, options = operands()
    options["column_bias"] = torch.full((M,), -torch.inf)
    found = check(inputs, options)
    assert (found[0] == -torch.inf).all() and all((x == 0).all() for x in found[2:])


def test_native_rows_of_zeros_and_of_extreme_length():
    inputs, options = operands(temperature=1.0)
    inputs[0][5] = 0
    inputs[1][7] = 0
    inputs[0][6] *= 1e-20
    inputs[1][8] *= 1e20
    check(inputs, options)


@pytest.mark.parametrize("frozen", [0, 1])
def test_native_frozen_sides_take_the_other_way(frozen):
    inputs, options = operands()
    for side, x in enumerate(inputs):
        x.requires_grad_(side != frozen)
    kept, _ = saved_gradients(contrastive, *inputs, **options, equal_weights=True, backend="native")
    assert kept == 0


def test_native_small_calls_keep_their_logits():
    """By default of fewer than 2^22 pairs; one column more makes as many."""
    _C.make_gradients_from(1 << 22)
    for m, taken in ((2047, False), (2048, True)):
        inputs, options = operands(2048, m, 3)
        for x in inputs:
            x.requires_grad_()
        kept, _ = saved_gradients(contrastive, *inputs, **options, equal_weights=True, backend="native")
        assert kept == (size_of(2048, m, 3) if taken else 0)


def losses():
    q, k, more = (random_rows(540, D, seed=seed).requires_grad_() for seed in range(3))
    log_q, ids = -torch.rand(1080), torch.arange(540) % 400
    own = torch.arange(540)
    both = torch.cat((k, more))
    return {
        "info_nce": (info_nce_loss, (q, k), {}, 540),
        "ranking": (multiple_negatives_ranking_loss, (q, k, more), {}, 1080),
        "ranking, margin": (multiple_negatives_ranking_loss, (q, k, more), {"margin": 0.1}, 1080),
        "sampled softmax": (sampled_softmax_loss, (q, k, more), {"log_q": log_q}, 1080),
        "sampled softmax, ids": (
            sampled_softmax_loss,
            (q, k, more),
            {"log_q": log_q, "item_ids": ids, "candidate_ids": ids + 5},
            1080,
        ),
        "cross-entropy": (similarity_cross_entropy, (q, both, own, 20.0), {}, 1080),
        "cross-entropy, smoothed": (
            similarity_cross_entropy,
            (q, both, own, 20.0),
            {"label_smoothing": 0.1},
            1080,
        ),
        "cross-entropy, several": (
            similarity_cross_entropy,
            (q, both, torch.stack((own, own + 540, own + 1), 1), 20.0),
            {},
            1080,
        ),
    }


@pytest.mark.parametrize("name", list(losses()))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_make_them(name, reduction):
    """Means and sums say so; values and gradients are those of float64, and losses of rows go the other way."""
    loss, arguments, options, m = losses()[name]
    kept, value = saved_gradients(loss, *arguments, **options, reduction=reduction)
    assert kept == size_of(540, m, D)
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    found = torch.autograd.grad(value, leaves)
    right = torch.autograd.grad(loss(*arguments, **options, reduction=reduction, backend="reference"), leaves)
    for mine, expected in zip(found, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    kept, value = saved_gradients(loss, *arguments, **options, reduction="none")
    assert kept == 0 and value.shape == (540,)


def test_losses_whose_rows_weigh_differently_say_nothing():
    q, k, more = (random_rows(540, D, seed=seed).requires_grad_() for seed in range(3))
    own, weights = torch.arange(540), torch.linspace(0, 1, 540)
    ignored = own.clone()
    ignored[3] = -100
    calls = [
        (multiple_negatives_ranking_loss, (q, k, more), {"row_weights": weights}),
        (multiple_negatives_ranking_loss, (q, k, more), {"directions": ("query_to_doc", "doc_to_query")}),
        (multiple_negatives_ranking_loss, (q, k, more), {"ids": own // 2}),
        (sampled_softmax_loss, (q, k, more), {"row_weights": weights}),
        (similarity_cross_entropy, (q, k, own), {"weight": weights}),
        (similarity_cross_entropy, (q, k, ignored), {}),
        (info_nce_loss, (q, k, more), {}),  # whose positives stand beside the sums
    ]
    for loss, arguments, options in calls:
        assert saved_gradients(loss, *arguments, **options)[0] == 0


def test_compiled_losses_make_them_too():
    q, k, more = (random_rows(540, D, seed=seed).requires_grad_() for seed in range(3))
    compiled = torch.compile(sampled_softmax_loss, fullgraph=True, backend="aot_eager")
    kept, value = saved_gradients(compiled, q, k, more)
    assert kept == size_of(540, 1080, D)
    expected = torch.autograd.grad(sampled_softmax_loss(q, k, more), (q, k, more))
    assert all(map(same_bits, torch.autograd.grad(value, (q, k, more)), expected))
