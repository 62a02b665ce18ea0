"""Every loss with every option as a case: how to make its arguments, and what it is by definition."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssl_kernels import losses
from tests.helpers import random_rows
from tests.losses import cluster_definitions, definitions

VIEWS = ("features", "student", "teacher")


def grouped(arguments):
    """Arguments with views, named features_0, features_1 and so on, in one list each."""
    made = {}
    for name, value in arguments.items():
        base = name.rstrip("0123456789").removesuffix("_")
        if base in VIEWS and base != name:
            made.setdefault(base, []).append(value)
        else:
            made[name] = value
    return made


def call(function, **arguments):
    """function(**arguments), views in lists, hard negatives by position."""
    arguments = grouped(arguments)
    further = [arguments.pop(name) for name in list(arguments) if name.startswith("hard_negatives")]
    first = [arguments.pop(name) for name in ("anchor", "positive")] if further else []
    return function(*first, *further, **arguments)


@dataclass(frozen=True)
class Case:
    """`make(n, d, seed)` gives the arguments by keyword, embeddings in float64; `options` go along."""

    name: str
    loss: str
    make: Callable
    options: tuple = ()
    scalar: str | None = "temperature"
    least_rows: int = 1
    without_gradient: tuple = ()
    formula: Callable | None = None  # the definition, if definitions.py and cluster_definitions.py have none

    def __str__(self):
        return self.name

    def arguments(self, n, d, dtype=torch.float64, *, seed=0, scalar=0.3, requires_grad=True):
        """Keyword arguments of the loss and the leaves among them that get gradients, by name."""
        made = self.make(max(n, self.least_rows), d, seed)
        arguments = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in made.items()
        }
        if self.scalar in ("logit_scale", "scale"):
            scalar = 1 / scalar
        if self.scalar:
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            arguments[self.scalar] = torch.tensor(scalar, dtype=acc)
        arguments |= dict(self.options)
        if requires_grad:
            for value in self.leaves(arguments).values():
                value.requires_grad_()
        return arguments

    def leaves(self, arguments):
        """What gets a gradient: every other floating tensor."""
        return {
            name: value
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and name not in self.without_gradient
        }

    def ours(self, backend=None, **options):
        if self.loss == "uniformity_loss":  # one value for all rows
            options.pop("reduction", None)
        return lambda **arguments: call(getattr(losses, self.loss), **arguments, backend=backend, **options)

    def definition(self, **arguments):
        """A value per row."""
        modules = [module for module in (definitions, cluster_definitions) if hasattr(module, self.loss)]
        definition = self.formula or getattr(modules[0], self.loss)
        return definition(**grouped(arguments))


def _generator(seed):
    return torch.Generator().manual_seed(seed + 99)


def _rows(n, d, seed, *names):
    """Rows of each name, those of one number alike, as views of one sample are."""
    common = random_rows(n, d, torch.float64, seed=seed)
    return {
        name: common + 0.5 * random_rows(n, d, torch.float64, seed=seed + k)
        for k, name in enumerate(names, 1)
    }


def _ids(shape, seed, values=4):
    return torch.randint(values, shape, generator=_generator(seed))


def views(n, d, seed):
    return _rows(n, d, seed, "z0", "z1")


def in_batch(n, d, seed):
    return _rows(n, d, seed, "query", "positive_key")


def in_batch_with_ids(n, d, seed):
    return in_batch(n, d, seed) | {"query_ids": _ids((n,), seed)}


def in_batch_with_ids_of_keys(n, d, seed):
    return in_batch_with_ids(n, d, seed) | {"key_ids": _ids((n,), seed + 1)}


def unpaired(n, d, seed):
    return in_batch(n, d, seed) | {"negative_keys": random_rows(2 * n + 3, d, torch.float64, seed=seed + 7)}


def unpaired_with_ids(n, d, seed):
    ids = {"query_ids": _ids((n,), seed), "key_ids": _ids((2 * n + 3,), seed + 1)}
    return unpaired(n, d, seed) | ids


def paired(n, d, seed):
    negatives = random_rows(n * 5, d, torch.float64, seed=seed + 7).view(n, 5, d)
    return in_batch(n, d, seed) | {"negative_keys": negatives}


def paired_with_ids(n, d, seed):
    return paired(n, d, seed) | {"query_ids": _ids((n,), seed), "key_ids": _ids((n, 5), seed + 1)}


def image_and_text(n, d, seed):
    return _rows(n, d, seed, "image_features", "text_features")


def image_and_text_with_ids(n, d, seed):
    return image_and_text(n, d, seed) | {"ids": _ids((n,), seed, max(2, n // 2))}


def image_and_text_with_bias(n, d, seed):
    return image_and_text(n, d, seed) | {"logit_bias": torch.tensor(-1.5, dtype=torch.float64)}


def image_and_text_with_bias_and_ids(n, d, seed):
    return image_and_text_with_ids(n, d, seed) | image_and_text_with_bias(n, d, seed)


def labelled(n, d, seed):
    """Labels of any value and number of members; the first row is alone with its."""
    labels = 10 * _ids((n,), seed, max(2, n // 4)) - 7
    labels[0] = 5
    return {"features": random_rows(n, d, torch.float64, seed=seed), "labels": labels}


def labelled_embeddings(n, d, seed):
    made = labelled(n, d, seed)
    return {"embeddings": made["features"], "labels": made["labels"]}


def mixed(n, d, seed):
    generator = _generator(seed)
    lam = torch.rand(n, generator=generator, dtype=torch.float64)
    return _rows(n, d, seed, "query", "key") | {
        "permutation": torch.randperm(n, generator=generator),
        "lam": lam,
    }


def mixed_by_one_share(n, d, seed):
    return mixed(n, d, seed) | {"lam": 0.3}


def mixed_with_queue(n, d, seed):
    return mixed(n, d, seed) | {"negative_keys": random_rows(2 * n + 3, d, torch.float64, seed=seed + 7)}


def with_queue(n, d, seed):
    queue = torch.nn.functional.normalize(random_rows(2 * n + 3, d, torch.float64, seed=seed + 7), dim=1)
    return _rows(n, d, seed, "query", "key") | {"queue": queue}


def triplets(n, d, seed):
    return _rows(n, d, seed, "anchor", "positive", "negative")


def ranked(n, d, seed):
    return _rows(n, d, seed, "anchor", "positive")


def ranked_with_ids(n, d, seed):
    return ranked(n, d, seed) | {"ids": _ids((n,), seed, max(2, n // 2))}


def ranked_with_hard_negatives(n, d, seed):
    return ranked(n, d, seed) | {"hard_negatives_0": random_rows(n, d, torch.float64, seed=seed + 7)}


def classified(n, d, seed):
    """More keys than queries, any of which may be a target."""
    target = _ids((n,), seed, 2 * n + 3)
    rows = _rows(n, d, seed, "query") | {"keys": random_rows(2 * n + 3, d, torch.float64, seed=seed + 7)}
    return rows | {"target": target}


def with_candidates(n, d, seed):
    log_q = torch.rand(3 * n + 3, generator=_generator(seed), dtype=torch.float64).add(0.01).log()
    return _rows(n, d, seed, "query", "item") | {
        "log_q": log_q,
        "candidates": random_rows(2 * n + 3, d, torch.float64, seed=seed + 7),
        "item_ids": _ids((n,), seed),
        "candidate_ids": _ids((2 * n + 3,), seed + 1),
    }


def with_narrations(n, d, seed):
    keys = random_rows(n * 3, d, torch.float64, seed=seed + 7).view(n, 3, d)
    return _rows(n, d, seed, "query") | {"keys": keys}


def with_teacher(n, d, seed):
    """More keys than queries."""
    rows = {"query": n, "keys": n + 2, "teacher_query": n, "teacher_keys": n + 2}
    return {
        name: random_rows(count, d, torch.float64, seed=seed + k)
        for k, (name, count) in enumerate(rows.items(), 1)
    }


def two_sides(n, d, seed):
    return _rows(n, d, seed, "x", "y")


def embedded(n, d, seed):
    return {"embeddings": random_rows(n, d, torch.float64, seed=seed)}


def views_with_ids(n, d, seed):
    return views(n, d, seed) | {"ids": _ids((n,), seed, max(2, n // 2))}


def with_queue_of_ids(n, d, seed):
    return with_queue(n, d, seed) | {"ids": _ids((n,), seed), "queue_ids": _ids((2 * n + 3,), seed + 1)}


def image_and_texts(n, d, seed):
    """Images with none, one or several texts."""
    texts = random_rows(n + 3, d, torch.float64, seed=seed + 7)
    return _rows(n, d, seed, "image_features") | {
        "text_features": texts,
        "image_index": _ids((n + 3,), seed, n),
    }


def image_and_texts_with_bias(n, d, seed):
    return image_and_texts(n, d, seed) | {"logit_bias": torch.tensor(-1.5, dtype=torch.float64)}


def crops(n, d, seed):
    return _rows(n, d, seed, "features_0", "features_1", "features_2") | {
        "prototypes": random_rows(n + 3, d, torch.float64, seed=seed + 7)
    }


def crops_with_queue(n, d, seed):
    return crops(n, d, seed) | {"queue": random_rows(n + 2, d, torch.float64, seed=seed + 8)}


def crops_with_teacher(n, d, seed):
    """Logits near one another: the teacher's softmax is no one-hot vector."""
    names = ("student_0", "student_1", "student_2", "teacher_0", "teacher_1")
    return _rows(n, d, seed, *names) | {
        "prototypes": random_rows(n + 3, d, torch.float64, seed=seed + 7),
        "teacher_prototypes": random_rows(n + 3, d, torch.float64, seed=seed + 8),
    }


def crops_with_center(n, d, seed):
    center = 0.3 * random_rows(n + 3, 1, torch.float64, seed=seed + 9)[:, 0]
    return crops_with_teacher(n, d, seed) | {"center": center}


def logits_with_center(n, d, seed):
    rows = crops_with_teacher(n, d, seed)
    del rows["prototypes"], rows["teacher_prototypes"]
    return rows | {"center": 0.3 * random_rows(d, 1, torch.float64, seed=seed + 9)[:, 0]}


def patches(n, d, seed):
    return _rows(n, max(d, 2), seed, "prediction", "target")


TEACHERS = ("teacher_0", "teacher_1", "teacher_prototypes", "center")


def regression(n, d, seed):
    return _rows(n, d, seed, "prediction", "target")


CASES = [
    Case("nt_xent-ids", "nt_xent_loss", views_with_ids),
    Case("nt_xent", "nt_xent_loss", views),
    Case("info_nce", "info_nce_loss", in_batch),
    Case("info_nce-raw", "info_nce_loss", in_batch, (("normalize", False),)),
    Case("info_nce-symmetric", "info_nce_loss", in_batch, (("symmetric", True),)),
    Case("info_nce-ids", "info_nce_loss", in_batch_with_ids),
    Case("info_nce-symmetric-ids", "info_nce_loss", in_batch_with_ids_of_keys, (("symmetric", True),)),
    Case("info_nce-unpaired", "info_nce_loss", unpaired),
    Case("info_nce-unpaired-raw", "info_nce_loss", unpaired, (("normalize", False),)),
    Case("info_nce-unpaired-ids", "info_nce_loss", unpaired_with_ids),
    Case("info_nce-paired", "info_nce_loss", paired, (("negative_mode", "paired"),)),
    Case("info_nce-paired-ids", "info_nce_loss", paired_with_ids, (("negative_mode", "paired"),)),
    Case("clip", "clip_loss", image_and_text, scalar="logit_scale"),
    Case("clip-texts", "clip_loss", image_and_texts, (("label_smoothing", 0.2),), scalar="logit_scale"),
    Case("clip-smoothed", "clip_loss", image_and_text, (("label_smoothing", 0.2),), scalar="logit_scale"),
    Case("clip-ids", "clip_loss", image_and_text_with_ids, scalar="logit_scale"),
    Case("sup_con", "sup_con_loss", labelled, least_rows=3),
    Case("sup_con-raw", "sup_con_loss", labelled, (("normalize", False),), least_rows=3),
    Case("dcl", "dcl_loss", views, least_rows=2),
    Case("debiased", "debiased_nt_xent_loss", views, least_rows=2),
    Case("debiased-0", "debiased_nt_xent_loss", views, (("positive_prior", 0.0),), least_rows=2),
    Case("imix", "imix_loss", mixed),
    Case("imix-one-lam", "imix_loss", mixed_by_one_share),
    Case("imix-queue", "imix_loss", mixed_with_queue),
    Case("triplet_margin", "triplet_margin_loss", triplets, scalar="margin"),
    Case(
        "triplet_margin-cosine",
        "triplet_margin_loss",
        triplets,
        (("distance", "cosine"),),
        scalar="margin",
    ),
    Case("mnrl-pairs", "multiple_negatives_ranking_loss", ranked, scalar="scale"),
    Case(
        "mnrl-both-ids",
        "multiple_negatives_ranking_loss",
        ranked_with_ids,
        (("directions", ("query_to_doc", "doc_to_query")), ("partition_mode", "per_direction")),
        scalar="scale",
    ),
    Case(
        "mnrl-hardness",
        "multiple_negatives_ranking_loss",
        ranked_with_hard_negatives,
        (("hardness_mode", "all_negatives"), ("hardness_strength", 2.0)),
        scalar="scale",
    ),
    Case(
        "mnrl",
        "multiple_negatives_ranking_loss",
        ranked_with_hard_negatives,
        (("directions", ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")),),
        scalar="scale",
    ),
    Case("similarity", "similarity_cross_entropy", classified, (("label_smoothing", 0.2),), scalar="scale"),
    Case("sampled_softmax", "sampled_softmax_loss", with_candidates),
    Case("mil_nce", "mil_nce_loss", with_narrations),
    Case(
        "distillation",
        "distillation_loss",
        with_teacher,
        (("teacher_temperature", 0.4),),
        without_gradient=("teacher_query", "teacher_keys"),
    ),
    Case("alignment", "alignment_loss", two_sides, scalar=None),
    Case("byol", "byol_loss", regression, scalar=None, without_gradient=("target",)),
    Case(
        "byol-raw",
        "byol_loss",
        regression,
        (("normalize", False),),
        scalar=None,
        without_gradient=("target",),
    ),
]
# Of the losses that have a test file of their own.
OTHER_CASES = [
    Case(
        "swav-queue",
        "swav_loss",
        crops_with_queue,
        (("epsilon", 0.2), ("normalize_prototypes", False)),
        without_gradient=("queue",),
    ),
    Case("swav", "swav_loss", crops, (("epsilon", 0.2),)),
    Case(
        "dino-sinkhorn",
        "dino_loss",
        crops_with_teacher,
        (("centering", "sinkhorn"), ("teacher_temperature", 0.2)),
        without_gradient=TEACHERS,
    ),
    Case(
        "dino-logits",
        "dino_loss",
        logits_with_center,
        (("teacher_temperature", 0.4),),
        without_gradient=TEACHERS,
    ),
    Case("dino", "dino_loss", crops_with_center, (("teacher_temperature", 0.2),), without_gradient=TEACHERS),
    Case("barlow_twins", "barlow_twins_loss", views, scalar="off_diagonal_weight", least_rows=4),
    Case("vicreg", "vicreg_loss", views, scalar="covariance", least_rows=4),
    Case(
        "mae-raw",
        "mae_loss",
        patches,
        (("normalize_target", False),),
        scalar=None,
        without_gradient=("target",),
    ),
    Case("mae", "mae_loss", patches, scalar=None, without_gradient=("target",)),
    Case("moco-ids", "moco_loss", with_queue_of_ids, without_gradient=("key", "queue")),
    Case("koleo", "koleo_loss", embedded, scalar=None, least_rows=2),
    Case("uniformity", "uniformity_loss", embedded, scalar=None, least_rows=2),
    Case(
        "uniformity-raw",
        "uniformity_loss",
        embedded,
        (("normalize", False), ("t", 0.1)),
        scalar=None,
        least_rows=2,
    ),
    Case("moco", "moco_loss", with_queue, without_gradient=("key", "queue")),
    Case("siglip", "siglip_loss", image_and_text_with_bias, scalar="logit_scale"),
    Case("siglip-ids", "siglip_loss", image_and_text_with_bias_and_ids, scalar="logit_scale"),
    Case("siglip-texts", "siglip_loss", image_and_texts_with_bias, scalar="logit_scale"),
    Case("triplet", "triplet_loss", labelled_embeddings, scalar="margin", least_rows=3),
    Case(
        "triplet-soft", "triplet_loss", labelled_embeddings, (("margin", "soft"),), scalar=None, least_rows=3
    ),
    Case(
        "triplet-semi_hard",
        "triplet_loss",
        labelled_embeddings,
        (("mining", "semi_hard"),),
        scalar="margin",
        least_rows=3,
    ),
    Case(
        "triplet-cosine",
        "triplet_loss",
        labelled_embeddings,
        (("distance", "cosine"),),
        scalar="margin",
        least_rows=3,
    ),
]


def on_backends(cases, backends):
    """(case, backend) of every loss."""
    return [(case, backend) for case in cases for backend in backends]


def value_and_gradients(function, case, arguments, weight=None):
    """[value, *gradients of the leaves] of Σ weight · function(**arguments), the leaves' by name order."""
    value = function(**arguments)
    objective = value if weight is None else (weight * value).sum()
    leaves = list(case.leaves(arguments).values())
    return [value.detach(), *torch.autograd.grad(objective, leaves)]
