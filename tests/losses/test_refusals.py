"""What losses refuse: every message for bad input, raised before anything is computed."""

import math

import pytest
import torch

from ssl_kernels import losses
from tests.losses.cases import call
from tests.losses.test_losses import every_case

X = torch.ones(4, 8)
LABELS = torch.zeros(4, dtype=torch.long)
ORDER = torch.arange(4)
BAD_CALLS = [
    ("info_nce_loss", (X, X[:3]), {}, ValueError, "positive_key must have 4 rows as query has, got 3"),
    (
        "info_nce_loss",
        (X, X, X[:, :7]),
        {},
        ValueError,
        "negative_keys must have width 8 as query has, got 7",
    ),
    ("info_nce_loss", (X, X, X[None]), {}, ValueError, r"negative_keys must have shape \(N, D\)"),
    ("info_nce_loss", (X, X, X.double()), {}, TypeError, "negative_keys must be float32 as query is"),
    (
        "info_nce_loss",
        (X, X, X),
        {"negative_mode": "paired"},
        ValueError,
        r"negative_keys must have shape \(4, M, 8\) with M >= 1, got \(4, 8\)",
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"negative_mode": "all"},
        ValueError,
        'negative_mode must be "unpaired" or "paired", got \'all\'',
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"symmetric": True},
        ValueError,
        "symmetric must be False with negative_keys",
    ),
    (
        "info_nce_loss",
        (X, X),
        {"key_ids": LABELS},
        ValueError,
        "query_ids must be given with key_ids, got None",
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"query_ids": LABELS},
        ValueError,
        "key_ids must be given with query_ids and negative_keys",
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"query_ids": LABELS, "key_ids": LABELS[:3]},
        ValueError,
        r"key_ids must have shape \(4,\), got \(3,\)",
    ),
    (
        "info_nce_loss",
        (X, X),
        {"query_ids": X[:, 0]},
        TypeError,
        "query_ids must be an integer tensor, got float32",
    ),
    (
        "info_nce_loss",
        (X, X),
        {"temperature": 0.0},
        ValueError,
        "temperature must be finite and > 0, got 0.0",
    ),
    ("clip_loss", (X, X, math.inf), {}, ValueError, "logit_scale must be finite, got inf"),
    (
        "clip_loss",
        (X, X[:2], 1.0),
        {},
        ValueError,
        "text_features must have 4 rows as image_features has, got 2",
    ),
    (
        "clip_loss",
        (X, X, 1.0),
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    (
        "clip_loss",
        (X, X, 1.0),
        {"label_smoothing": "a"},
        TypeError,
        "label_smoothing must be a number, got str",
    ),
    (
        "clip_loss",
        (X, X, 1.0),
        {"label_smoothing": 0.1, "ids": LABELS},
        ValueError,
        "label_smoothing must be 0 with ids, got 0.1",
    ),
    (
        "info_nce_loss",
        (X, X, X[:, None]),
        {"negative_mode": "paired", "backend": "bogus"},
        ValueError,
        'backend must be "native", "triton", "chunked", "reference" or None, got \'bogus\'',
    ),
    ("sup_con_loss", (X, LABELS[:3]), {}, ValueError, r"labels must have shape \(4,\), got \(3,\)"),
    ("sup_con_loss", (X, X[:, 0]), {}, TypeError, "labels must be an integer tensor, got float32"),
    ("sup_con_loss", (X, X[:, :2]), {}, TypeError, "labels must be integers or bool, got float32"),
    ("sup_con_loss", (X, LABELS[:3, None]), {}, ValueError, r"labels must have shape \(4,\), got \(3, 1\)"),
    (
        "sup_con_loss",
        (X, torch.full((4, 3), 2)),
        {},
        ValueError,
        "labels of several columns must be 0 or 1, got 2",
    ),
    ("sup_con_loss", (X, None), {}, ValueError, "labels must be given without positives, got None"),
    (
        "sup_con_loss",
        (X, LABELS),
        {"positives": torch.ones(4, 4).bool()},
        ValueError,
        "labels must be None with positives",
    ),
    (
        "sup_con_loss",
        (X, None),
        {"positives": torch.ones(4, 3).bool()},
        ValueError,
        r"positives must have shape \(4, 4\), got \(4, 3\)",
    ),
    (
        "sup_con_loss",
        (X, None),
        {"positives": torch.ones(4, 4)},
        TypeError,
        "positives must be bool or integers, got float32",
    ),
    ("sup_con_loss", (X, LABELS), {"unlabelled": 0.5}, TypeError, "unlabelled must be an integer or None"),
    (
        "sup_con_loss",
        (X, torch.ones(4, 3).long()),
        {"unlabelled": -1},
        ValueError,
        "unlabelled must be None with several labels per row, got -1",
    ),
    ("sup_con_loss", (X, [0, 0, 1, 1]), {}, TypeError, "labels must be a tensor, got list"),
    ("sup_con_loss", (X, LABELS.to("meta")), {}, ValueError, "labels must be on cpu, got meta"),
    (
        "dcl_loss",
        (X[:1], X[:1]),
        {},
        ValueError,
        "z0 must have at least 2 rows, so that a negative is left, got 1",
    ),
    ("debiased_nt_xent_loss", (X[:1], X[:1]), {}, ValueError, "z0 must have at least 2 rows"),
    (
        "debiased_nt_xent_loss",
        (X, X),
        {"positive_prior": 1.0},
        ValueError,
        r"positive_prior must be in \[0, 1\), got 1.0",
    ),
    (
        "imix_loss",
        (X, X, torch.tensor([0, 1, 1, 2]), 0.5),
        {},
        ValueError,
        r"permutation must hold each of 0 to 3 once, got \[0, 1, 1, 2\]",
    ),
    ("imix_loss", (X, X, ORDER[:3], 0.5), {}, ValueError, r"permutation must have shape \(4,\), got \(3,\)"),
    ("imix_loss", (X, X, X[:, 0], 0.5), {}, TypeError, "permutation must be an integer tensor, got float32"),
    ("imix_loss", (X, X, ORDER, 1.5), {}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    (
        "imix_loss",
        (X, X, ORDER, 2 * X[:, 0]),
        {},
        ValueError,
        r"lam must be in \[0, 1\], got 2",
    ),
    ("imix_loss", (X, X, ORDER, X[:3, 0]), {}, ValueError, r"lam must have shape \(4,\), got \(3,\)"),
    ("imix_loss", (X, X, ORDER, ORDER), {}, TypeError, "lam must be a floating tensor, got int64"),
    ("triplet_margin_loss", (X, X, X[:2]), {}, ValueError, "negative must have 4 rows as anchor has, got 2"),
    ("triplet_margin_loss", (X, X, X, -0.1), {}, ValueError, "margin must be >= 0, got -0.1"),
    (
        "triplet_margin_loss",
        (X, X, X),
        {"distance": "l1"},
        ValueError,
        'distance must be "euclidean" or "cosine", got \'l1\'',
    ),
    ("byol_loss", (X, X.half()), {}, TypeError, "target must be float32 as prediction is, got float16"),
    ("byol_loss", (X, X[:2]), {}, ValueError, "target must have 4 rows as prediction has, got 2"),
    (
        "byol_loss",
        (X, X),
        {"row_weights": X[:3, 0]},
        ValueError,
        r"row_weights must have shape \(4,\), got \(3,\)",
    ),
    (
        "byol_loss",
        (X, X),
        {"row_weights": LABELS},
        TypeError,
        "row_weights must be a floating tensor, got int64",
    ),
]


@every_case
def test_every_loss_reaches_an_operation(case, nothing_runs):
    """So that `nothing_runs` can fail."""
    with pytest.raises(pytest.fail.Exception, match="the operation ran"):
        call(getattr(losses, case.loss), **case.arguments(6, 4))


@pytest.mark.parametrize("loss, arguments, options, error, message", BAD_CALLS)
def test_bad_input_is_named(loss, arguments, options, error, message, nothing_runs):
    with pytest.raises(error, match=f"^{loss}: {message}"):
        getattr(losses, loss)(*arguments, **options)


@every_case
def test_bad_options_of_every_loss_are_named(case):
    arguments = case.arguments(4, 3)
    with pytest.raises(ValueError, match=f"^{case.loss}: reduction must be .* got 'avg'"):
        case.ours(reduction="avg")(**arguments)
    if "negative_mode" not in arguments:
        with pytest.raises(ValueError, match=f"^{case.loss}: backend must be .* or None, got 'cuda'"):
            case.ours("cuda")(**arguments)
    name = next(iter(case.leaves(arguments)))
    with pytest.raises(TypeError, match=f"^{case.loss}: {name} must be float64, float32, .* got int64"):
        case.ours()(**arguments | {name: arguments[name].detach().long()})
