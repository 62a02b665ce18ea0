"""What the losses of pytorch-metric-learning are, over the functions of the adapter that need no such library."""

import torch

from ssl_kernels.adapters import pytorch_metric_learning as functions
from tests.adapters.formulas import cosines, unit, without
from tests.adapters.uses import Use


class Functions:
    nt_xent = staticmethod(lambda *arguments: functions.nt_xent_of_pairs(*arguments)[0])
    sup_con = staticmethod(functions.sup_con_of_rows)
    margins = staticmethod(functions.triplet_margins)


def _struck(same, own):
    return same if own is None else same & (torch.arange(same.shape[1]) != own[:, None])


def nt_xent(x, labels, y, y_labels, temperature, own=None):
    own, y, y_labels = (torch.arange(len(x)), x, labels) if y is None else (own, y, y_labels)
    logits, same = cosines(x, y) / temperature, labels[:, None] == y_labels
    negatives = without(logits, same).logsumexp(1, keepdim=True)
    return (torch.logaddexp(logits, negatives) - logits)[_struck(same, own)]


def sup_con(x, labels, y, y_labels, temperature, own=None):
    own, y, y_labels = (torch.arange(len(x)), x, labels) if y is None else (own, y, y_labels)
    logits, same = cosines(x, y) / temperature, _struck(labels[:, None] == y_labels, own)
    allowed = _struck(torch.ones_like(same), own)
    terms = (without(logits, ~allowed).logsumexp(1, keepdim=True) - logits).masked_fill(~same, 0)
    return terms.sum(1) / same.sum(1).clamp(min=1)


def margins(x, y, triplets, margin):
    a, p, n = (unit(rows[index]) for rows, index in zip((x, y, y), triplets, strict=True))
    return torch.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + margin)


def by_labels(name):
    """A loss among its own rows, and against a memory that holds them or not."""

    def run(space, c):
        labels, temperature = c.integers(3), c.temperature
        x, memory = c.rows(), c.rows(2 * c.n)
        memory_labels, own = c.integers(3, 2 * c.n), torch.randperm(2 * c.n, generator=c.generator)[: c.n]
        loss = getattr(space, name)
        return (
            loss(x, labels, None, None, temperature),
            loss(x, labels, memory, memory_labels, temperature, own),
            loss(x, labels, memory, memory_labels, temperature, None),
        )

    return run


def triplets(space, c):
    index = [c.integers(c.n, 30), *(c.integers(2 * c.n, 30) for _ in range(2))]
    return space.margins(c.rows(), c.rows(2 * c.n), index, 0.3)


FUNCTIONS = [by_labels("nt_xent"), by_labels("sup_con"), triplets]


def _labels(c, n=None):
    """Two of the first class and one of another at least, so that there are pairs of both kinds."""
    labels = c.integers(3, n or c.n)
    labels[:3] = torch.tensor([0, 0, 1])[: len(labels)]
    return labels


def _alone(name):
    def run(space, c):
        loss = getattr(space, name)(temperature=c.temperature)
        return loss(c.rows(c.n + 2), _labels(c, c.n + 2))

    return run


def _against(name):
    def run(space, c):
        loss = getattr(space, name)(temperature=c.temperature)
        return loss(
            c.rows(), _labels(c), ref_emb=c.rows(2 * c.n + 3), ref_labels=_labels(c, 2 * c.n + 3).double()
        )

    return run


def _two_views(name):
    def run(space, c):
        loss = space.SelfSupervisedLoss(
            getattr(space, name)(temperature=c.temperature), symmetric=c.pick(True, False)
        )
        return loss(c.rows(), c.rows())

    return run


def _memory(name):
    def run(space, c):
        loss = getattr(space, name)(temperature=c.temperature)
        memory = space.CrossBatchMemory(loss, c.d, memory_size=2 * c.n + 5)
        return [memory(c.rows(c.n + 2), _labels(c, c.n + 2)) for _ in range(4)]

    return run


def _momentum_memory(space, c):
    memory = space.CrossBatchMemory(space.NTXentLoss(temperature=c.temperature), c.d, memory_size=3 * c.n + 6)
    mask = torch.arange(2 * c.n + 4) >= c.n + 2
    return [memory(c.rows(2 * c.n + 4), _labels(c, c.n + 2).repeat(2), enqueue_mask=mask) for _ in range(3)]


def _mined(space, c):
    from pytorch_metric_learning.miners import BatchHardMiner

    x, labels = c.rows(c.n + 2), _labels(c, c.n + 2)
    return space.TripletMarginLoss(margin=0.4)(x, labels, BatchHardMiner()(x, labels))


def _reduced(space, c):
    from pytorch_metric_learning.reducers import MeanReducer, SumReducer
    from pytorch_metric_learning.regularizers import LpRegularizer

    options = {"reducer": c.pick(MeanReducer, SumReducer)(), "embedding_regularizer": LpRegularizer()}
    return space.SupConLoss(c.temperature, **options)(c.rows(c.n + 2), _labels(c, c.n + 2))


_LIBRARY = "pytorch_metric_learning"
# The library's capped and underflowing float32 sums are judged in float64.
USES = [
    Use(_LIBRARY, "NTXentLoss", _alone("NTXentLoss"), formula=False),
    Use(_LIBRARY, "NTXentLoss", _against("NTXentLoss"), "against ref_emb", formula=False),
    Use(_LIBRARY, "SupConLoss", _alone("SupConLoss"), formula=False, dtype=torch.float64),
    Use(
        _LIBRARY, "SupConLoss", _against("SupConLoss"), "against ref_emb", formula=False, dtype=torch.float64
    ),
    Use(
        _LIBRARY,
        "SupConLoss",
        _reduced,
        "with a reducer and a regulariser",
        formula=False,
        dtype=torch.float64,
    ),
    Use(_LIBRARY, "TripletMarginLoss", _mined, "of BatchHardMiner", formula=False, dtype=torch.float64),
    Use(_LIBRARY, "SelfSupervisedLoss", _two_views("NTXentLoss"), "of NTXentLoss", formula=False),
    Use(
        _LIBRARY,
        "SelfSupervisedLoss",
        _two_views("SupConLoss"),
        "of SupConLoss",
        formula=False,
        dtype=torch.float64,
    ),
    Use(_LIBRARY, "CrossBatchMemory", _memory("NTXentLoss"), "of NTXentLoss", formula=False),
    Use(
        _LIBRARY,
        "CrossBatchMemory",
        _memory("SupConLoss"),
        "of SupConLoss",
        formula=False,
        dtype=torch.float64,
    ),
    Use(_LIBRARY, "CrossBatchMemory", _momentum_memory, "with enqueue_mask", formula=False),
]
