"""Reduced losses of softmaxes over columns that are one node of autograd on the CPU (csrc/ops/contrastive_loss.cpp),
against their definitions in float64: positives by index, two with their shares, more columns than rows, biases,
positives beside the sums, and sums of a sample that are one."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_kernels import losses
from ssl_kernels.losses._softmax import views_loss
from tests.helpers import BACKENDS, random_rows, same_bits
from tests.losses import definitions
from tests.losses.test_one_node import agree, every_reduction

ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
NODE = "ContrastiveLoss"


def rows(n, d=5, seed=0, dtype=torch.float64):
    return random_rows(n, d, dtype, seed=seed)


def numbers(n, seed, dtype=torch.float64):
    return rows(n, 1, seed, dtype)[:, 0].clone()


def with_targets(n, columns):
    target = torch.randint(columns, (n,), generator=torch.Generator().manual_seed(n))
    return {"query": rows(n), "keys": rows(columns, seed=1), "target": target}


def with_bias(n, columns):
    bias = numbers(columns, 3)
    bias[with_targets(n, columns)["target"][0] - 1] = -torch.inf
    return with_targets(n, columns) | {"column_bias": bias}


def sampled(n, candidates, with_ids=False, **more):
    query, item, others = (rows(count, seed=seed) for seed, count in enumerate((n, n, candidates)))
    inputs = {"query": query, "item": item, "candidates": others if candidates else None}
    if with_ids:
        more = {"item_ids": torch.arange(n) // 2, "candidate_ids": torch.arange(candidates) % 3, **more}
    return inputs | more


def pairs(n, *more, **options):
    names = ("anchor", "positive", *(f"hard_negatives{k}" for k in range(len(more))))
    return {
        name: rows(count, seed=seed)
        for seed, (name, count) in enumerate(zip(names, (n, n, *more), strict=True))
    } | options


def ranking(anchor, positive, reduction="mean", **options):
    hard = [options.pop(name) for name in sorted(options) if name.startswith("hard_negatives")]
    return losses.multiple_negatives_ranking_loss(anchor, positive, *hard, reduction=reduction, **options)


def clips(n, each, **options):
    return {"query": rows(n), "keys": rows(n * each, seed=1).view(n, each, -1), **options}


def negatives(n, count, **options):
    query, key, others = (rows(k, seed=seed) for seed, k in enumerate((n, n, count)))
    return {"query": query, "positive_key": key, "negative_keys": others, **options}


def mixed(n):
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return {
        "query": rows(n),
        "key": rows(n, seed=1),
        "permutation": permutation,
        "lam": numbers(n, 2).sigmoid(),
    }


IDS = {"query_ids": torch.arange(7) % 3, "key_ids": torch.arange(4)}
# Ours, the definition, the name of the scale, inputs.
CASES = {
    "targets": (losses.similarity_cross_entropy, "similarity_cross_entropy", "scale", with_targets(7, 11)),
    "targets-few-keys": (losses.similarity_cross_entropy, "similarity_cross_entropy", "scale", with_targets(9, 4)),
    "targets-one": (losses.similarity_cross_entropy, "similarity_cross_entropy", "scale", with_targets(1, 1)),
    "targets-raw": (
        losses.similarity_cross_entropy,
        "similarity_cross_entropy",
        "scale",
        with_targets(7, 11) | {"normalize": False},
    ),
    "targets-bias": (losses.similarity_cross_entropy, "similarity_cross_entropy", "scale", with_bias(7, 11)),
    "targets-blocks": (losses.similarity_cross_entropy, "similarity_cross_entropy", "scale", with_bias(300, 520)),
    "sampled": (losses.sampled_softmax_loss, "sampled_softmax_loss", "temperature", sampled(6, 5)),
    "sampled-ids": (losses.sampled_softmax_loss, "sampled_softmax_loss", "temperature", sampled(6, 5, True)),
    "sampled-log-q": (
        losses.sampled_softmax_loss,
        "sampled_softmax_loss",
        "temperature",
        sampled(6, 5, True, log_q=numbers(11, 4)),
    ),
    "sampled-in-batch": (losses.sampled_softmax_loss, "sampled_softmax_loss", "temperature", sampled(6, 0)),
    "ranking": (ranking, "multiple_negatives_ranking_loss", "scale", pairs(6, 9)),
    "ranking-raw": (
        ranking,
        "multiple_negatives_ranking_loss",
        "scale",
        pairs(6, 6, 6, normalize=False),
    ),
    "all-directions": (ranking, "multiple_negatives_ranking_loss", "scale", pairs(6, directions=ALL)),
    "all-directions-one": (ranking, "multiple_negatives_ranking_loss", "scale", pairs(1, directions=ALL)),
    "all-directions-blocks": (ranking, "multiple_negatives_ranking_loss", "scale", pairs(150, directions=ALL)),
    "clips": (losses.mil_nce_loss, "mil_nce_loss", "temperature", clips(6, 3)),
    "clips-one-each": (losses.mil_nce_loss, "mil_nce_loss", "temperature", clips(6, 1)),
    "clips-one-way": (losses.mil_nce_loss, "mil_nce_loss", "temperature", clips(6, 3, symmetric=False)),
    "clips-blocks": (losses.mil_nce_loss, "mil_nce_loss", "temperature", clips(150, 2, normalize=False)),
    "mixed": (losses.imix_loss, "imix_loss", "temperature", mixed(7)),
    "negatives": (losses.info_nce_loss, "info_nce_loss", "temperature", negatives(7, 4)),
    "negatives-ids": (losses.info_nce_loss, "info_nce_loss", "temperature", negatives(7, 4, **IDS)),
}  # fmt: skip


def leaves_of(inputs):
    """The floating inputs, each with a gradient of its own."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return inputs | leaves, list(leaves.values())


def expected_of(definition, inputs, reduction, **scale):
    return getattr(getattr(definitions, definition)(**inputs, **scale), reduction)()


@pytest.mark.parametrize("name", CASES)
@every_reduction
def test_is_the_definition(name, reduction):
    ours, definition, scaling, inputs = CASES[name]
    inputs, leaves = leaves_of(inputs)
    scale = torch.tensor(3.0 if scaling == "scale" else 0.4, dtype=torch.float64, requires_grad=True)
    found = ours(**inputs, **{scaling: scale}, reduction=reduction)
    assert NODE in found.grad_fn.name()
    agree(found, expected_of(definition, inputs, reduction, **{scaling: scale}), [*leaves, scale])
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs, **{scaling: scale}, reduction=reduction), found.detach())


@pytest.mark.parametrize("name", CASES)
def test_of_each_input_alone(name):
    """The others are frozen, so that other kernels may be chosen, and a number is the scale."""
    ours, definition, scaling, inputs = CASES[name]
    scale = {scaling: 3.0 if scaling == "scale" else 0.4}
    for alone, value in inputs.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        leaf = value.clone().requires_grad_()
        given = inputs | {alone: leaf}
        found = ours(**given, **scale)
        agree(found, expected_of(definition, given, "mean", **scale), [leaf])
        (grad,) = torch.autograd.grad(ours(**given, **scale), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(grad.square().sum(), leaf)


class Passing(TorchDispatchMode):
    """Sees every operator and does nothing."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_a_dispatch_mode_sees_the_kernel_of_the_backward(name):
    ours, definition, scaling, inputs = CASES[name]
    inputs, leaves = leaves_of(inputs)
    scale = torch.tensor(3.0 if scaling == "scale" else 0.4, dtype=torch.float64, requires_grad=True)
    found = ours(**inputs, **{scaling: scale})
    with Passing() as mode:
        grads = torch.autograd.grad(found, [*leaves, scale])
    assert "ssl_kernels::contrastive_bwd.native" in mode.seen
    expected = expected_of(definition, inputs, "mean", **{scaling: scale})
    for one, truth in zip(grads, torch.autograd.grad(expected, [*leaves, scale]), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-9, atol=1e-9)
    with Passing(), torch.no_grad():
        torch.testing.assert_close(ours(**inputs, **{scaling: scale}), expected.detach())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_rows_are_as_exact_as_with_none(name, dtype):
    """As the mean of what "none" gives, whose losses are composed."""
    ours, _, scaling, inputs = CASES[name]
    inputs = {
        name: value.to(dtype if value.dim() > 1 else torch.float32)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    inputs, leaves = leaves_of(inputs)
    scale = {scaling: 3.0 if scaling == "scale" else 0.4}
    found, expected = ours(**inputs, **scale), ours(**inputs, **scale, reduction="none").mean()
    assert found.dtype == torch.float32 and NODE in found.grad_fn.name()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_and_dual_tensors_are_refused(name):
    ours, _, scaling, inputs = CASES[name]
    given, leaves = leaves_of(inputs)
    scale = torch.tensor(3.0 if scaling == "scale" else 0.4, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(ours(**given, **{scaling: scale}), [*leaves, scale], create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(grad.square().sum(), leaves, retain_graph=True)
    plain, tangent = leaves[-1].detach(), torch.ones_like(leaves[-1])
    place = next(name for name, value in given.items() if value is leaves[-1])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        ours(
            **inputs | {place: torch.autograd.forward_ad.make_dual(plain, tangent)},
            **{scaling: scale.detach()},
        )


@every_reduction
def test_one_share_of_all_rows_gets_the_sum_of_their_gradients(reduction):
    inputs, leaves = leaves_of(mixed(7) | {"lam": torch.tensor(0.3, dtype=torch.float64)})
    found = losses.imix_loss(**inputs, temperature=0.4, reduction=reduction)
    assert NODE in found.grad_fn.name()
    expected = definitions.imix_loss(**inputs | {"lam": inputs["lam"].expand(7)}, temperature=0.4)
    agree(found, getattr(expected, reduction)(), leaves)


def test_rows_without_a_column_have_loss_0():
    inputs, leaves = leaves_of(with_targets(4, 6) | {"column_bias": torch.full((6,), -torch.inf).double()})
    found = losses.similarity_cross_entropy(**inputs)
    assert found == 0
    for grad in torch.autograd.grad(found, leaves):
        assert (grad == 0).all()


def test_a_left_out_target_has_an_infinite_loss():
    inputs, _ = leaves_of(with_targets(3, 6) | {"column_bias": numbers(6, 1)})
    inputs["target"] = torch.tensor([2, 2, 4])
    bias = inputs["column_bias"].detach().clone()
    bias[2] = -torch.inf
    inputs["column_bias"] = bias.requires_grad_()
    found = losses.similarity_cross_entropy(**inputs)
    assert found == torch.inf
    expected = losses.similarity_cross_entropy(**inputs, backend="reference")
    agree(found, expected, [inputs["query"], inputs["keys"]])


def test_alone_in_their_batch():
    """Nothing to tell a clip from: loss and gradient 0, as the loss of one query with its key among no negatives."""
    for each in (1, 3):
        inputs, leaves = leaves_of(clips(1, each))
        found = losses.mil_nce_loss(**inputs)
        assert found == 0
        for grad in torch.autograd.grad(found, leaves):
            assert (grad == 0).all()
    ids = torch.zeros(5, dtype=torch.int64)
    inputs, leaves = leaves_of(negatives(5, 5, query_ids=ids, key_ids=ids))
    found = losses.info_nce_loss(**inputs)
    assert found == 0
    for grad in torch.autograd.grad(found, leaves):
        assert (grad == 0).all()


@pytest.mark.parametrize(
    "name", ["targets-bias", "sampled-log-q", "ranking", "all-directions", "clips", "negatives"]
)
@pytest.mark.parametrize("factor", [1e-3, 40.0, 3000.0])
def test_losses_near_0_and_steep_ones(name, factor):
    """What is far below 1 keeps its digits where its positives stand beside the sums; in float32."""
    ours, definition, scaling, inputs = CASES[name]
    scale = {scaling: factor if scaling == "scale" else 1 / factor}
    narrow = {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    wide = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in narrow.items()
    }
    (narrow, leaves), (wide, exact) = leaves_of(narrow), leaves_of(wide)
    found, expected = ours(**narrow, **scale), expected_of(definition, wide, "mean", **scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    for one, truth in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, exact), strict=True
    ):
        torch.testing.assert_close(one.double(), truth, rtol=1e-3, atol=1e-5 * max(1.0, factor))


def test_a_tiny_loss_keeps_its_digits():
    """Positives at cosine 1, all else at −1: each loss is 2 exp(−40), below what a difference of sums can tell."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    keys = x.detach()[:, None].clone().requires_grad_()
    found = losses.mil_nce_loss(x, keys, 0.05)
    torch.testing.assert_close(found.double(), torch.tensor(2 * torch.e**-40.0).double(), rtol=1e-4, atol=0)
    opposite = -x[:1].detach()
    ids = {
        "query_ids": torch.tensor([1, 2]),
        "key_ids": torch.tensor([2]),
    }  # the second query has no negative
    found = losses.info_nce_loss(x, x.detach(), opposite, 0.05, reduction="sum", **ids)
    torch.testing.assert_close(found.double(), torch.tensor(torch.e**-40.0).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", ["moco_loss", "info_nce_loss"])
@pytest.mark.parametrize("with_ids", [False, True])
@every_reduction
def test_a_queue_may_change_before_the_backward(loss, with_ids, reduction):
    """Negatives without a gradient, the queue's of any length: backward reads the queries alone."""
    query, key, queue = rows(7).requires_grad_(), rows(7, seed=1), rows(9, seed=2)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    ids = {}
    if with_ids:
        ids = dict(zip(("ids", "queue_ids"), (torch.arange(7) % 3, torch.arange(9) % 4), strict=True))
        if loss == "info_nce_loss":
            ids = dict(zip(("query_ids", "key_ids"), ids.values(), strict=True))
    expected = getattr(definitions, loss)(query, key, queue.clone(), temperature=temperature, **ids)
    found = getattr(losses, loss)(query, key, queue, temperature, reduction=reduction, **ids)
    assert NODE in found.grad_fn.name()
    queue.mul_(-2)
    for index in ids.values():
        index.zero_()
    agree(found, getattr(expected, reduction)(), [query, temperature])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name", ["targets", "sampled", "ranking", "all-directions", "clips", "clips-one-way", "negatives"]
)
def test_what_is_not_finite_is_nan(name, value):
    """And so is every gradient that a NaN reaches, of the others' too."""
    ours, _, scaling, inputs = CASES[name]
    for broken in inputs:
        if not isinstance(inputs[broken], torch.Tensor) or not inputs[broken].is_floating_point():
            continue
        rows = inputs[broken].clone()
        rows.view(-1)[1] = value
        spread = []
        for backend in (None, "reference"):
            given, leaves = leaves_of(inputs | {broken: rows})
            found = ours(**given, **{scaling: 0.5}, backend=backend)
            assert found.isnan(), broken
            spread.append([grad.isnan() for grad in torch.autograd.grad(found, leaves)])
        assert value == torch.inf or all(map(torch.equal, *spread)), broken


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["info_nce_loss", "moco_loss", "debiased_nt_xent_loss"])
@every_reduction
def test_an_infinite_logit_of_a_positive_is_nan(backend, loss, reduction):
    """As the softmax over it would have it; the sums beside it are finite."""
    query, key, others = rows(3).abs(), rows(3, seed=1).abs(), rows(4, seed=2)
    key[1, 2] = torch.inf
    more = () if loss == "debiased_nt_xent_loss" else (others,)
    options = {"normalize": False, "reduction": reduction, "backend": backend}
    assert getattr(losses, loss)(query.requires_grad_(), key, *more, **options).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_positives_out_of_range_are_told_before_the_kernel(backend):
    inputs = with_targets(7, 11)
    inputs["target"][3] = 11
    with pytest.raises(ValueError, match=r"target must be in \[0, 11\) or be ignore_index -100, got 11"):
        losses.similarity_cross_entropy(**inputs, backend=backend)


@pytest.mark.parametrize("n, d", [(2, 3), (6, 5), (130, 64), (514, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leaves_partner_out", [False, True])
@every_reduction
def test_rows_that_hold_both_views_are_as_two_tensors(n, d, dtype, leaves_partner_out, reduction):
    """Bit for bit, with their gradients, and through the dispatcher too."""
    if leaves_partner_out and n == 2:
        pytest.skip("no row is left")
    inputs = rows(n, 2 * d, dtype=dtype)[:, ::2]
    found = []
    for split, mode in ((False, None), (True, None), (False, Passing()), (True, Passing())):
        x, temperature = inputs.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        options = {"leaves_partner_out": leaves_partner_out, "normalize": True, "backend": "native"}
        views = x.chunk(2) if split else (x, None)
        scale = (1 / temperature).to(torch.float64 if dtype == torch.float64 else torch.float32)
        with mode or contextlib.nullcontext():
            loss = views_loss(*views, scale, reduction, None, caller="loss", **options)
            assert NODE in loss.grad_fn.name()
            loss.backward()
        found.append((loss.detach(), x.grad, temperature.grad))
        with torch.no_grad():
            assert same_bits(views_loss(*views, scale, reduction, None, caller="loss", **options), loss)
    for joined, apart in zip(found[::2], found[1::2], strict=True):
        assert all(map(same_bits, joined, apart))
    for one, other in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


WRONG = {
    "as many rows": {"others": rows(2)},
    "go with others on cpu": {"others": None, "classes": torch.zeros(3, dtype=torch.int64), "joint": True},
    "pairs in one direction": {"both_directions": True, "column_bias": numbers(3, 1)},
    "numbers must be float64": {"numbers": numbers(3, 1).float()},
    "positives must be int64 of shape": {"positives": torch.zeros(3)},
    "joint sums": {"joint": True, "row_ids": torch.arange(3), "column_ids": torch.arange(3)},
    "column_bias must have shape": {"column_bias": numbers(4, 1)},
    "positive_prior must be": {"positive_prior": 0.5},
    "others or classes must be given": {"classes": torch.zeros(3, dtype=torch.int64)},
    "or rows that are views": {
        "others": None,
        "are_views": True,
        "classes": torch.zeros(3, dtype=torch.int64),
    },
    "be equally many": {"others": None, "are_views": True},
    "go one way": {"rows": rows(4), "others": None, "are_views": True, "both_directions": True},
    "with others": {"rows": rows(4), "others": None, "are_views": True, "joint": True},
    "classes_apart goes with classes": {"classes_apart": True},
    "that are int64": {
        "others": None,
        "classes": torch.zeros(3, 2, dtype=torch.int64),
        "classes_apart": True,
    },
    "2-d and alike": {"rows": rows(4)[None], "others": None, "are_views": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_the_operator_refuses_what_it_would_read_out_of_bounds(message):
    call = {
        "rows": rows(3), "others": rows(3, seed=1), "scale": None, "constant": 1.0, "classes": None, "row_ids": None,
        "column_ids": None, "positives": None, "numbers": None, "column_bias": None, "positive_prior": None,
        "are_views": False, "leaves_partner_out": False, "both_directions": False, "joint": False,
        "classes_apart": False, "normalize": True, "normalize_others": True, "divisor": 0.0,
    }  # fmt: skip
    run = torch.ops.ssl_kernels.contrastive_loss.native
    assert run(**call)[1] == 3
    with pytest.raises(RuntimeError, match=message):
        run(**call | WRONG[message])
