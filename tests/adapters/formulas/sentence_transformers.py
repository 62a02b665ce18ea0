"""Uses of sentence-transformers' losses. The function under them is tested without it in tests/losses."""

import torch

from tests.adapters.uses import Use

DIRECTIONS = (
    (("query_to_doc",), "joint"),
    (("query_to_doc", "doc_to_query"), "per_direction"),
    (("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"), "joint"),
    (("query_to_doc", "query_to_query"), "joint"),
)


class Model(torch.nn.Sequential):
    """Stands for a SentenceTransformer: features are embeddings already."""

    def __init__(self):
        super().__init__(torch.nn.Identity())

    def forward(self, features, **_):
        return {"sentence_embedding": features["rows"]}


def _options(c):
    directions, mode = c.pick(*DIRECTIONS)
    hardness = c.pick(None, "in_batch_negatives", "hard_negatives", "all_negatives")
    return {"scale": 1 / c.temperature, "directions": directions, "partition_mode": mode} | {
        "hardness_mode": hardness,
        "hardness_strength": 3.0,
    }


def _plain(space, c):
    loss = space.MultipleNegativesRankingLoss(Model(), **_options(c))
    return loss([{"rows": c.rows()} for _ in range(c.pick(2, 3, 4))], None)


def _of_dots(space, c):
    from sentence_transformers.util import dot_score

    loss = space.MultipleNegativesRankingLoss(Model(), scale=2.0, similarity_fct=dot_score)
    return loss([{"rows": c.unit_rows()} for _ in range(3)], None)


def _cached(space, c):
    loss = space.CachedMultipleNegativesRankingLoss(Model(), mini_batch_size=5, **_options(c))
    return loss.calculate_loss([list(c.rows().split(5)) for _ in range(c.pick(2, 3))])


def _symmetric(space, c):
    loss = space.MultipleNegativesSymmetricRankingLoss(Model(), 1 / c.temperature)
    return loss([{"rows": c.rows()} for _ in range(2)], None)


def _cached_symmetric(space, c):
    loss = space.CachedMultipleNegativesSymmetricRankingLoss(Model(), 1 / c.temperature)
    return loss.calculate_loss([list(c.rows().split(5)) for _ in range(2)])


USES = [
    Use("sentence_transformers", "MultipleNegativesRankingLoss", _plain, formula=False),
    Use("sentence_transformers", "MultipleNegativesRankingLoss", _of_dots, "of dot products", formula=False),
    Use("sentence_transformers", "CachedMultipleNegativesRankingLoss", _cached, formula=False),
    Use("sentence_transformers", "MultipleNegativesSymmetricRankingLoss", _symmetric, formula=False),
    Use(
        "sentence_transformers",
        "CachedMultipleNegativesSymmetricRankingLoss",
        _cached_symmetric,
        formula=False,
    ),
]
