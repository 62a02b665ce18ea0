"""What rounding may do to a loss: gradients that nearly cancel, losses of 0, autocast, infinities, weights of 0."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels import losses, nn
from tests.helpers import BACKENDS, random_rows, same_bits
from tests.losses.cases import CASES, OTHER_CASES, on_backends, value_and_gradients

EVERY = [*CASES, *OTHER_CASES]
ONE_A_LOSS = list({case.loss: case for case in EVERY}.values())
CLASSES = 6
every_case_and_backend = pytest.mark.parametrize("case, backend", on_backends(EVERY, BACKENDS), ids=str)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def clustered(case, n, d, cosine, dtype, **options):
    """Arguments whose rows of one class have about that cosine with each other, over all operands."""
    arguments = case.arguments(n, d, requires_grad=False, **options)
    centres = F.normalize(random_rows(CLASSES, d, torch.float64, seed=5), dim=1)
    for seed, (name, leaf) in enumerate(arguments.items()):
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 2 or not leaf.is_floating_point():
            continue
        count = leaf[..., 0].numel()
        noise = F.normalize(random_rows(count, d, torch.float64, seed=seed), dim=1)
        rows = centres[torch.arange(count) % CLASSES] * cosine**0.5 + noise * (1 - cosine) ** 0.5
        length = 1 if "raw" in case.name else 3
        arguments[name] = (length * rows).view(leaf.shape).to(dtype)
    if "labels" in arguments:
        arguments["labels"] = torch.arange(len(arguments["labels"])) % CLASSES
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for name, leaf in case.leaves(arguments).items():
        arguments[name] = (leaf.to(acc) if leaf.dim() < 2 else leaf).requires_grad_()
    return arguments


def widened(case, arguments, dtype):
    leaves = case.leaves(arguments)
    return {
        name: value.detach().to(dtype).requires_grad_(name in leaves)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


@every_case_and_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.99])
def test_gradients_of_rows_alike_are_those_of_float32_rounded_once(case, backend, dtype, cosine):
    """As plain PyTorch has them on x.float(): what softmax and target leave of each other keeps its digits."""
    if case.name in ("triplet-soft", "uniformity", "uniformity-raw"):
        pytest.skip("distances from products: their rounding chooses rows, or is all that is left of them")
    arguments = clustered(case, 96, 64, cosine, dtype, scalar=0.07)
    wide = widened(case, arguments, torch.float64)
    truth = value_and_gradients(case.definition, case, wide, 1.0)[1:]
    plain = value_and_gradients(case.definition, case, widened(case, arguments, torch.float32), 1.0)[1:]
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, 1.0)[1:]
    for name, ours, theirs, exact in zip(case.leaves(arguments), found, plain, truth, strict=True):
        eps = torch.finfo(ours.dtype).eps
        errors = [(t.double() - exact).abs().max().item() for t in (ours, theirs.to(ours.dtype))]
        allowed = 5 * errors[1] + 4 * eps * exact.abs().max().item()
        if (
            exact.dim() < 2
        ):  # a sum of as many terms as there are rows, each as large as a logit over the scalar
            allowed += 4 * eps * 2 * 96 * (1 / 0.07 if name == "logit_bias" else 1 / 0.07**2)
        assert errors[0] <= allowed, (name, errors)


UNBOUNDED = ("dcl_loss", "triplet_loss", "triplet_margin_loss", "koleo_loss", "uniformity_loss")
BOUNDED = [case for case in EVERY if case.loss not in UNBOUNDED]


@pytest.mark.parametrize("case, backend", on_backends(BOUNDED, BACKENDS), ids=str)
@pytest.mark.parametrize("scalar", [0.005, 0.07, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_is_below_zero(case, backend, scalar, dtype):
    """Partners alike and everything else far away: the loss is 0, or what float64 says."""
    if "raw" in case.name:
        return
    arguments = case.arguments(40, 64, dtype, scalar=scalar, requires_grad=False)
    rows = random_rows(40, 64, dtype)
    for name, leaf in case.leaves(arguments).items():
        if leaf.shape == rows.shape:
            arguments[name] = rows.clone()
    if "labels" in arguments:
        arguments[next(iter(case.leaves(arguments)))][20:] = rows[:20]
        arguments["labels"] = torch.arange(40) % 20
    found = case.ours(backend, reduction="none")(**arguments)
    exact = case.definition(**widened(case, arguments, torch.float64)).detach()
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=2e-6 / min(scalar, 1))
    if case.loss == "sup_con_loss" and scalar == 0.005:
        assert (found[exact < 1e-30] == 0).all() and (exact < 1e-30).any()


@every_backend
def test_sup_con_rows_of_loss_0_are_0_at_a_small_temperature(backend):
    features = random_rows(64, 128).repeat_interleave(2, 0) + 1e-3 * random_rows(128, 128, seed=1)
    labels = torch.arange(128) // 2
    found = losses.sup_con_loss(features, labels, 0.01, reduction="none", backend=backend)
    assert (found == 0).all()


@pytest.mark.parametrize("case, backend", on_backends(EVERY, BACKENDS), ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit_of_a_loss_or_its_gradients(case, backend, autocast):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = case.arguments(20, 12, dtype)
        leaves = list(case.leaves(arguments).values())
        for reduction in ("mean", "none"):
            run = case.ours(backend, reduction=reduction)
            value = run(**arguments).sum()
            expected = torch.autograd.grad(value, leaves, retain_graph=True)
            with torch.autocast("cpu", autocast):
                inside = run(**arguments).sum()
                gradients = [torch.autograd.grad(each, leaves) for each in (value, inside)]
            assert same_bits(value.detach(), inside.detach())
            for found in gradients:
                assert all(same_bits(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("case, backend", on_backends(ONE_A_LOSS, BACKENDS), ids=str)
def test_weights_of_0_alone_give_a_mean_of_0_with_gradient_0(case, backend):
    if "row_weights" not in inspect.signature(getattr(losses, case.loss)).parameters:
        return  # it takes no weights
    arguments = case.arguments(12, 6)
    rows = len(case.definition(**arguments))
    weights = torch.zeros(rows, requires_grad=True)
    loss = case.ours(backend, row_weights=weights)(**arguments)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, [*case.leaves(arguments).values(), weights]):
        assert (gradient == 0).all()


# Comparisons choose their rows; sums over other rows meet an infinite one with a weight of 0.
NEAREST = ("triplet_loss", "koleo_loss", "distillation_loss", "swav_loss", "dino_loss")


@pytest.mark.parametrize(
    "case, backend", on_backends([c for c in EVERY if c.loss not in NEAREST], BACKENDS), ids=str
)
@pytest.mark.parametrize("entry", [math.inf, -math.inf, math.nan])
def test_infinite_entries_do_what_they_do_in_plain_pytorch(case, backend, entry):
    for normalize in (True, False):
        arguments = case.arguments(9, 4, requires_grad=False)
        if "normalize" in inspect.signature(getattr(losses, case.loss)).parameters:
            arguments["normalize"] = normalize
        if case.loss == "uniformity_loss" and not arguments["normalize"]:
            continue  # distances from products: NaN for an infinite one
        for name, leaf in case.leaves(arguments).items():
            if leaf.dim() < 2:
                continue
            changed = leaf.clone()
            changed.view(-1, 4)[1, 0] = entry
            call = arguments | {name: changed}
            found, expected = case.ours(backend, reduction="none")(**call), case.definition(**call)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


# Who is whose positive in SupCon


def by_definition(features, positive, temperature):
    """(N,) losses by loops over the rows."""
    z = F.normalize(features, dim=1)
    logits = z @ z.T / temperature
    each = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        mates = [j for j in others if positive[i, j]]
        lse = logits[i, others].logsumexp(0)
        each.append(sum((lse - logits[i, p] for p in mates), 0 * lse) / max(1, len(mates)))
    return torch.stack(each)


N = 33
LABELS = torch.arange(N) * 7 % 9
SETS = (torch.rand(N, 70, generator=torch.Generator().manual_seed(1)) < 0.03).scatter(
    1, LABELS[:, None] % 3 + 63, True
)
SETS[::4] = False
MASK = torch.rand(N, N, generator=torch.Generator().manual_seed(2)) < 0.2
EQUAL = LABELS[:, None] == LABELS
KINDS = {
    "int16": ({"labels": LABELS.short()}, EQUAL),
    "uint64": ({"labels": LABELS.to(torch.uint64)}, EQUAL),
    "column": ({"labels": LABELS[:, None]}, EQUAL),
    "bool": ({"labels": LABELS > 4}, (LABELS > 4)[:, None] == (LABELS > 4)),
    "unlabelled": (
        {"labels": LABELS.int() - 1, "unlabelled": -1},
        EQUAL & (LABELS != 0),
    ),
    "several": ({"labels": SETS}, (SETS[:, None] & SETS).any(2)),
    "several-integers": ({"labels": SETS[:, 60:].int()}, (SETS[:, None, 60:] & SETS[:, 60:]).any(2)),
    "mask": ({"labels": None, "positives": MASK}, MASK),
    "integer-mask": ({"labels": None, "positives": MASK.int()}, MASK),
}


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_sup_con_takes_positives_of_every_kind(backend, kind):
    options, positive = KINDS[kind]
    features = random_rows(N, 8, torch.float64).requires_grad_()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    expected = by_definition(features, positive, temperature)
    counted = (positive & ~torch.eye(N, dtype=torch.bool)).any(1)
    weight = random_rows(N, 1, torch.float64, seed=3)[:, 0]

    def loss(**more):
        return losses.sup_con_loss(features, temperature=temperature, backend=backend, **options, **more)

    for found, truth in (
        ((loss(reduction="none") * weight).sum(), (expected * weight).sum()),
        (loss(), expected[counted].mean()),
        (loss(row_weights=weight.abs()), (expected * weight.abs()).sum() / weight.abs()[counted].sum()),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
        gradients = [
            torch.autograd.grad(value, (features, temperature), retain_graph=True) for value in (found, truth)
        ]
        for ours, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("kind", ["unlabelled", "several", "mask"])
def test_positives_of_every_kind_over_several_tiles(backend, kind):
    n = 700
    labels = torch.arange(n) * 13 % 50
    mask = torch.rand(n, n, generator=torch.Generator().manual_seed(2)) < 0.05
    options, positive = {
        "unlabelled": ({"labels": labels, "unlabelled": 3}, (labels[:, None] == labels) & (labels != 3)),
        "several": ({"labels": F.one_hot(labels, 90) | F.one_hot(labels + 40, 90)}, None),
        "mask": ({"labels": None, "positives": mask}, mask),
    }[kind]
    if positive is None:
        sets = options["labels"].bool()
        positive = (sets.float() @ sets.float().T) > 0
    found, expected = (
        value_of(backend, n, given)
        for backend, given in ((backend, options), ("reference", {"labels": None, "positives": positive}))
    )
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


def value_of(backend, n, options):
    features = random_rows(n, 40, torch.float64).requires_grad_()
    loss = losses.sup_con_loss(features, backend=backend, reduction="none", **options)
    (grad,) = torch.autograd.grad((loss * random_rows(n, 1, torch.float64, seed=3)[:, 0]).sum(), features)
    return loss.detach(), grad


def test_the_users_mask_stays_as_it_is():
    mask = torch.ones(6, 6, dtype=torch.bool)
    losses.sup_con_loss(random_rows(6, 4), None, positives=mask, backend="chunked")
    assert mask.all()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)], ids=["flat", "column"])
def test_ids_are_integers_or_bool_of_either_shape(shape):
    query, key = random_rows(8, 4), random_rows(8, 4, seed=1)
    ids = torch.arange(8) % 2
    expected = losses.info_nce_loss(query, key, query_ids=ids)
    assert same_bits(losses.info_nce_loss(query, key, query_ids=ids.bool().view(shape)), expected)
    expected = losses.clip_loss(query, key, 10.0, ids=ids)
    assert same_bits(losses.clip_loss(query, key, 10.0, ids=ids.bool().view(shape)), expected)


def test_the_module_takes_every_kind_too():
    features = random_rows(N, 8)
    marked = nn.SupConLoss(0.2, unlabelled=-1)(features, LABELS - 1)
    assert same_bits(marked, losses.sup_con_loss(features, LABELS - 1, 0.2, unlabelled=-1))
    masked = nn.SupConLoss(0.2)(features, None, positives=MASK)
    assert same_bits(masked, losses.sup_con_loss(features, None, 0.2, positives=MASK))
