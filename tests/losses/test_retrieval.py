"""The losses of retrieval: meanings of F.cross_entropy and sentence-transformers, margins, ids, edges, memory."""

import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F

import ssl_kernels
from ssl_kernels import losses, matryoshka, nn
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, OPERATORS, random_rows, same_bits
from tests.losses import definitions

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


def rows(n, d=6, seed=0, dtype=torch.float64):
    return random_rows(n, d, dtype, seed=seed).requires_grad_()


def same(found, expected, leaves, **close):
    """Values, and gradients of their weighted sums."""
    close = {"rtol": 1e-8, "atol": 1e-9} | close
    torch.testing.assert_close(found, expected, **close)
    weight = random_rows(max(1, found.numel()), 1, torch.float64, seed=9)[:, 0].view(found.shape)
    gradients = (
        torch.autograd.grad((weight * value).sum(), leaves, retain_graph=True) for value in (found, expected)
    )
    for ours, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth, **close)


# similarity_cross_entropy


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "smoothing, weighted, biased", itertools.product((0.0, 0.3), (False, True), (False, True))
)
def test_similarity_cross_entropy_is_that_of_torch(backend, reduction, smoothing, weighted, biased):
    query, keys = rows(9), rows(14, seed=1)
    target = torch.tensor([3, 0, -100, 13, 13, 5, -100, 1, 2])
    weight = (
        torch.rand(14, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    )
    bias = random_rows(14, 1, torch.float64, seed=3)[:, 0].requires_grad_() if biased else None
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    found = losses.similarity_cross_entropy(
        query, keys, target, scale, column_bias=bias, backend=backend, **options
    )
    logits = scale * F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    expected = F.cross_entropy(logits if bias is None else logits + bias, target, **options)
    same(found, expected, [query, keys, scale] + ([bias] if biased else []))


@every_backend
def test_several_targets_are_class_probabilities(backend):
    query, keys = rows(5), rows(8, seed=1)
    target = torch.tensor([[0, 3], [7, -100], [2, 2], [-100, -100], [1, 0]])
    shares = torch.tensor([[0.7, 0.3], [1.0, 9.0], [0.5, 0.5], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    logits = 4 * F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    probabilities = torch.zeros(5, 8, dtype=torch.float64)
    probabilities.scatter_add_(1, target.clamp_min(0), shares.masked_fill(target < 0, 0))
    expected = F.cross_entropy(logits, probabilities, reduction="none")
    options = {"target_weights": shares, "backend": backend}
    same(
        losses.similarity_cross_entropy(query, keys, target, 4.0, reduction="none", **options),
        expected,
        [query, keys],
    )
    same(
        losses.similarity_cross_entropy(query, keys, target, 4.0, **options),
        expected.sum() / 4,
        [query, keys],
    )


@every_backend
def test_padding_columns_and_rows_without_any(backend):
    query, keys = rows(4), rows(6, seed=1)
    bias = torch.tensor([0, -torch.inf, 0, 0, -torch.inf, 0], dtype=torch.float64)
    target = torch.tensor([0, 2, 5, 0])
    found = losses.similarity_cross_entropy(
        query, keys, target, 5.0, column_bias=bias, reduction="none", backend=backend
    )
    kept = keys[[0, 2, 3, 5]]
    expected = losses.similarity_cross_entropy(
        query, kept, torch.tensor([0, 1, 3, 0]), 5.0, reduction="none", backend=backend
    )
    same(found, expected, [query, keys])
    nothing = losses.similarity_cross_entropy(
        query,
        keys,
        target,
        5.0,
        column_bias=torch.full_like(bias, -torch.inf),
        reduction="none",
        backend=backend,
    )
    assert (nothing == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(nothing.sum(), (query, keys)))


# multiple_negatives_ranking_loss


@every_backend
@pytest.mark.parametrize("hard", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(
    "directions",
    [ALL, ALL[:2], (ALL[3], ALL[0])],
    ids=["all", "two", "documents"],
)
def test_ranking_with_margins_and_ids_is_its_definition(backend, hard, with_ids, directions):
    n = 9
    embeddings = [rows(n, seed=seed) for seed in range(2 + hard)]
    further = {f"hard_{k}": each for k, each in enumerate(embeddings[2:])}
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 1, 6]) if with_ids else None
    margins = [(None, "absolute"), (0.3, "absolute"), (-0.1, "absolute"), (0.05, "relative")]
    for margin, mode in margins:
        options = {"directions": directions, "ids": ids, "margin": margin, "margin_mode": mode}
        found = losses.multiple_negatives_ranking_loss(
            *embeddings, **options, reduction="none", backend=backend
        )
        expected = definitions.multiple_negatives_ranking_loss(*embeddings[:2], **options, **further)
        same(found, expected, embeddings)


@every_backend
@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_hardness_is_its_definition(backend, mode, partition):
    embeddings = [rows(7, seed=seed) for seed in range(4)]
    further = {"a": embeddings[2], "b": embeddings[3]}
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    for margin in (None, 0.2):
        options = {"hardness_mode": mode, "hardness_strength": 3.0, "directions": ALL[:2], "margin": margin}
        options |= {"partition_mode": partition, "scale": scale}
        found = losses.multiple_negatives_ranking_loss(
            *embeddings, **options, reduction="none", backend=backend
        )
        expected = definitions.multiple_negatives_ranking_loss(*embeddings[:2], **options, **further)
        same(found, expected, [*embeddings, scale])


needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers"
)


@needs_sentence_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": ALL},
        {"directions": ALL[:2], "partition_mode": "per_direction"},
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    ],
    ids=str,
)
def test_sentence_transformers_gives_the_same(hard, options):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    embeddings = [rows(9, seed=seed) for seed in range(2 + hard)]
    theirs = MultipleNegativesRankingLoss(torch.nn.Module(), **options)
    expected = theirs.compute_loss_from_embeddings(embeddings, None)
    same(losses.multiple_negatives_ranking_loss(*embeddings, **options), expected, embeddings)


# sampled_softmax_loss


@every_backend
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("hardest", [None, 1, 5, 100])
@pytest.mark.parametrize("with_ids", [False, True])
def test_sampled_softmax_is_its_definition(backend, in_batch, hardest, with_ids):
    query, item, candidates = rows(6), rows(6, seed=1), rows(9, seed=2)
    generator = torch.Generator().manual_seed(3)
    log_q = torch.rand(15, generator=generator, dtype=torch.float64).log().requires_grad_()
    weights = torch.randint(0, 4, (15,), generator=generator).double() + torch.tensor([1.0] * 6 + [0.0] * 9)
    options = {
        "log_q": log_q,
        "candidate_weights": weights,
        "in_batch": in_batch,
        "num_hard_negatives": hardest,
    }
    if with_ids:
        options |= {
            "item_ids": torch.tensor([0, 1, 2, 0, 1, 5]),
            "candidate_ids": torch.tensor([0, 1, 7, 7, 2, 2, 9, 5, 4]),
        }
    arguments = {"temperature": 0.3, **options}
    found = losses.sampled_softmax_loss(
        query, item, candidates, reduction="none", backend=backend, **arguments
    )
    expected = definitions.sampled_softmax_loss(query, item, candidates, **arguments)
    same(found, expected, [query, item, candidates, log_q])


@every_backend
def test_a_query_whose_negatives_are_all_accidental_hits_has_loss_0(backend):
    query, item = rows(4), rows(4, seed=1)
    for hardest in (None, 2):
        found = losses.sampled_softmax_loss(
            query,
            item,
            item_ids=torch.zeros(4, dtype=torch.long),
            num_hard_negatives=hardest,
            reduction="none",
            backend=backend,
        )
        assert found.abs().max() < 1e-12
        assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(found.sum(), (query, item)))


# ids, several texts, prefixes, distillation


@pytest.mark.parametrize("pushes", [(3,), (5, 4), (20,)], ids=str)
def test_a_queue_holds_the_ids_of_its_keys(pushes):
    queue, other = nn.MoCoQueue(8, 4, ids=True), nn.MoCoQueue(8, 4)
    for seed, count in enumerate(pushes):
        keys = random_rows(count, 4, seed=seed)
        queue.push_(keys, torch.arange(count) + 100 * seed)
        other.push_(keys)
        held = 0
        for place, key in enumerate(F.normalize(keys, dim=1)):
            at = (queue.keys - key).abs().amax(1) < 1e-6
            held += at.sum().item()
            assert (queue.ids[: len(queue)][at] == place + 100 * seed).all()
        assert held == min(count, 8)
    assert same_bits(queue.keys, other.keys)
    again = nn.MoCoQueue(8, 4, ids=True)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.ids, queue.ids)
    query, key = (random_rows(5, 4, seed=seed) for seed in (7, 8))
    ids = torch.tensor([0, 1, 2, 102, 50])
    found = losses.moco_loss(query, key, queue, ids=ids, reduction="none")
    of_keys = queue.ids[: len(queue)]
    expected = losses.moco_loss(query, key, queue.keys, ids=ids, queue_ids=of_keys, reduction="none")
    assert same_bits(found, expected)
    compiled = torch.compile(losses.moco_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key, queue, ids=ids, reduction="none"), expected)


def test_ids_of_a_queue_go_together():
    queue, keys, ids = nn.MoCoQueue(8, 4, ids=True), random_rows(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match="ids must be given, since the queue holds ids, got None"):
        queue.push_(keys)
    with pytest.raises(ValueError, match="ids must be None, since the queue holds none"):
        nn.MoCoQueue(8, 4).push_(keys, ids)
    with pytest.raises(ValueError, match=r"ids must have shape \(3,\), got \(2,\)"):
        queue.push_(keys, ids[:2])
    assert len(queue) == 0
    with pytest.raises(ValueError, match="moco_loss: queue must hold ids"):
        losses.moco_loss(keys, keys, nn.MoCoQueue(8, 4).push_(keys), ids=ids)
    with pytest.raises(ValueError, match="moco_loss: queue_ids must be given with ids"):
        losses.moco_loss(keys, keys, keys, ids=ids)


@pytest.mark.parametrize("of", ["function", "module"])
def test_matryoshka_is_the_sum_over_prefixes(of):
    query, key, negatives = rows(6, 8), rows(6, 8, seed=1), rows(5, 8, seed=2)
    loss = losses.info_nce_loss if of == "function" else nn.InfoNCELoss()
    nested = matryoshka(loss, [2, 5, 8], [1.0, 0.5, 2.0])
    expected = sum(
        weight * loss(query[:, :width], key[:, :width], negatives[:, :width])
        for width, weight in ((2, 1.0), (5, 0.5), (8, 2.0))
    )
    same(nested(query, key, negative_keys=negatives), expected, [query, key, negatives])


def test_matryoshka_cuts_embeddings_alone():
    query, keys = rows(3, 3), rows(5, 3, seed=1)
    ids = torch.zeros(3, dtype=torch.long)
    weights = torch.ones(3, dtype=torch.float64)
    nested = matryoshka(losses.info_nce_loss, [1, 3])
    expected = sum(
        losses.info_nce_loss(query[:, :w], query[:, :w], query_ids=ids, row_weights=weights) for w in (1, 3)
    )
    assert nested(query, query, query_ids=ids, row_weights=weights) == expected
    with pytest.raises(ValueError, match="dims must be at most the width 3 of the embeddings, got 4"):
        matryoshka(losses.info_nce_loss, [2, 4])(query, query)
    with pytest.raises(TypeError, match="no MoCoQueue"):
        matryoshka(losses.moco_loss, [2])(query, query, nn.MoCoQueue(4, 3))
    for dims, weights, error in (
        ([], None, ValueError),
        ([0], None, ValueError),
        ([1.5], None, TypeError),
        ([1], [1, 2], ValueError),
    ):
        with pytest.raises(error, match=r"^matryoshka: (dims|weights) must"):
            matryoshka(losses.info_nce_loss, dims, weights)
    assert keys.grad is None


@every_backend
def test_a_teacher_of_another_width_and_dtype(backend):
    query, keys = rows(7, 5), rows(9, 5, seed=1)
    teacher_query, teacher_keys = (random_rows(n, 11, seed=n) for n in (7, 9))
    found = losses.distillation_loss(
        query, keys, teacher_query, teacher_keys, 0.2, 0.05, reduction="none", backend=backend
    )
    expected = definitions.distillation_loss(
        query, keys, teacher_query.double(), teacher_keys.double(), 0.2, 0.05
    )
    same(found, expected, [query, keys])
    again = losses.distillation_loss(query, keys, query, keys, 0.2, reduction="none", backend=backend)
    assert (again >= 0).all() and again.max() < 1e-9


# Memory


MEMORY = {
    "ranking": lambda n: (
        lambda *x: losses.multiple_negatives_ranking_loss(*x, directions=ALL),
        [rows(n, 8, seed, torch.float32) for seed in range(3)],
    ),
    "margin": lambda n: (
        lambda *x: losses.multiple_negatives_ranking_loss(*x, margin=0.1),
        [rows(n, 8, seed, torch.float32) for seed in range(3)],
    ),
    "similarity": lambda n: (
        lambda q, k: losses.similarity_cross_entropy(
            q, k, torch.arange(n), 20.0, column_bias=torch.zeros(2 * n), label_smoothing=0.1
        ),
        [rows(n, 8, 0, torch.float32), rows(2 * n, 8, 1, torch.float32)],
    ),
    "sampled": lambda n: (
        lambda q, i, c: losses.sampled_softmax_loss(q, i, c, log_q=torch.zeros(2 * n)),
        [rows(n, 8, seed, torch.float32) for seed in range(3)],
    ),
    "distillation": lambda n: (
        lambda q, k: losses.distillation_loss(q, k, q, k),
        [rows(n, 8, seed, torch.float32) for seed in range(2)],
    ),
    "uniformity": lambda n: (losses.uniformity_loss, [rows(n, 8, 0, torch.float32)]),
}


@pytest.mark.parametrize("name", MEMORY)
def test_nothing_of_queries_times_columns_is_held(name):
    loss, leaves = MEMORY[name](3000)
    matrix = 4 * 3000 * 3000
    assert peak_memory(lambda: torch.autograd.grad(loss(*leaves), leaves)) < 0.3 * matrix


# Bad input

X, Y, T = torch.ones(4, 8), torch.ones(6, 8), torch.zeros(4, dtype=torch.long)
BAD = {
    "similarity_cross_entropy": [
        ((X, Y, T + 6), {}, ValueError, r"target must be in \[0, 6\) or be ignore_index -100, got 6"),
        ((X, Y, T - 1), {}, ValueError, "target must be in .* got -1"),
        ((X, Y, T[:3]), {}, ValueError, r"target must have shape \(4,\) or \(4, P\), got \(3,\)"),
        ((X, Y, T.float()), {}, TypeError, "target must be an integer tensor, got float32"),
        ((X, Y, T), {"column_bias": X[:, 0]}, ValueError, r"column_bias must have shape \(6,\), got \(4,\)"),
        ((X, Y, T), {"weight": T}, ValueError, r"weight must have shape \(6,\)"),
        (
            (X, Y, T),
            {"target_weights": X[:, :1]},
            ValueError,
            "target_weights must be None with a target of shape",
        ),
        ((X, Y, T), {"scale": torch.inf}, ValueError, "scale must be finite, got inf"),
        ((X, Y, T), {"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float"),
    ],
    "multiple_negatives_ranking_loss": [
        ((X, X), {"directions": "query_to_doc"}, ValueError, "directions must be a sequence of names"),
        (
            (X, X),
            {"directions": ("doc_to_query",)},
            ValueError,
            'directions must have "query_to_doc" among them',
        ),
        ((X, X), {"directions": ("query",)}, ValueError, "directions must be of query_to_doc"),
        (
            (X, X),
            {"directions": ALL, "partition_mode": "per_direction"},
            ValueError,
            "directions must be .* alone",
        ),
        ((X, X), {"partition_mode": "both"}, ValueError, 'partition_mode must be "joint"'),
        ((X, X), {"hardness_mode": "hard"}, ValueError, 'hardness_mode must be "in_batch_negatives", '),
        (
            (X, X),
            {"hardness_strength": -1.0},
            ValueError,
            "hardness_strength must be finite and >= 0, got -1.0",
        ),
        ((X, X), {"margin": "a"}, TypeError, "margin must be a number or None, got str"),
        ((X, X), {"margin_mode": "a"}, ValueError, 'margin_mode must be "absolute" or "relative"'),
        ((X, X), {"scale": 0.0}, ValueError, "scale must be finite and > 0, got 0.0"),
        ((X, Y), {}, ValueError, "positive must have 4 rows as anchor has, got 6"),
        (
            (X, X, Y),
            {"directions": ALL},
            ValueError,
            r"hard_negatives\[0\] must have 4 rows as anchor has, got 6",
        ),
        ((X, X, Y[:, :7]), {}, ValueError, r"hard_negatives\[0\] must have width 8"),
    ],
    "sampled_softmax_loss": [
        ((X, X), {"in_batch": False}, ValueError, "candidates must be given with in_batch=False"),
        ((X, X, Y), {"item_ids": T}, ValueError, "candidate_ids must be given with item_ids and candidates"),
        ((X, X), {"candidate_ids": T}, ValueError, "candidate_ids must be None without candidates"),
        ((X, X, Y), {"log_q": X[:, 0]}, ValueError, r"log_q must have shape \(10,\), got \(4,\)"),
        ((X, X), {"candidate_weights": -X[:, 0]}, ValueError, "candidate_weights must be >= 0, got -1.0"),
        ((X, X), {"num_hard_negatives": 0}, ValueError, "num_hard_negatives must be an integer >= 1 or None"),
    ],
    "mil_nce_loss": [((X, Y), {}, ValueError, r"keys must have shape \(4, P, 8\) with P >= 1, got \(6, 8\)")],
    "distillation_loss": [
        ((X, Y, X, X), {}, ValueError, "teacher_keys must have 6 rows as keys has, got 4"),
        ((X, Y, X, Y[:, :3]), {}, ValueError, "teacher_keys must have width 8 as teacher_query has, got 3"),
    ],
    "uniformity_loss": [
        ((X[:1],), {}, ValueError, "embeddings must have at least 2 rows"),
        ((X, 0.0), {}, ValueError, "t must be finite and > 0, got 0.0"),
    ],
    "koleo_loss": [((X[:1],), {}, ValueError, "embeddings must have at least 2 rows")],
    "alignment_loss": [((X, Y), {}, ValueError, "y must have 4 rows as x has, got 6")],
    "clip_loss": [
        ((X, Y, 1.0), {"image_index": T}, ValueError, r"image_index must have shape \(6,\), got \(4,\)"),
        ((Y, X, 1.0), {"image_index": T + 6}, ValueError, r"image_index must be in \[0, 6\), got 6"),
    ],
}


@pytest.mark.parametrize(
    "loss, call",
    [(loss, call) for loss, calls in BAD.items() for call in calls],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_named(loss, call):
    arguments, options, error, message = call
    with pytest.raises(error, match=f"^{loss}: {message}"):
        getattr(ssl_kernels, loss)(*arguments, **options)


@every_operator
def test_limits_that_leave_no_negative_leave_a_loss_of_0(backend):
    anchor, positive = rows(5), rows(5, seed=1)
    found = losses.multiple_negatives_ranking_loss(
        anchor, positive, margin=3.0, reduction="none", backend=backend
    )
    assert found.abs().max() < 1e-12
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(found.sum(), (anchor, positive)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_training_through_sentence_transformers_has_the_same_losses():
    for package in ("sentence_transformers", "datasets", "accelerate"):
        pytest.importorskip(package, reason=f"needs {package}")
    from benchmarks.sentence_transformers_run import compare

    (theirs, _), (ours, _) = compare(steps=50, batch_size=32)
    assert len(theirs) == 50 and max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 1e-4
