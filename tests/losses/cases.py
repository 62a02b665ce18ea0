"""Every loss with every option as a case: how to make its arguments, and what it is by definition."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssl_kernels import losses
from ssl_kernels.reference import losses as definitions
from tests.helpers import random_rows


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

    def __str__(self):
        return self.name

    def arguments(self, n, d, dtype=torch.float64, *, seed=0, scalar=0.3, requires_grad=True):
        """Keyword arguments of the loss and the leaves among them that get gradients, by name."""
        made = self.make(max(n, self.least_rows), d, seed)
        arguments = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in made.items()
        }
        if self.scalar == "logit_scale":
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
        return lambda **arguments: getattr(losses, self.loss)(**arguments, backend=backend, **options)

    def definition(self, **arguments):
        """A value a row."""
        return getattr(definitions, self.loss)(**arguments)


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


def regression(n, d, seed):
    return _rows(n, d, seed, "prediction", "target")


CASES = [
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
    Case("moco", "moco_loss", with_queue, without_gradient=("key", "queue")),
    Case("siglip", "siglip_loss", image_and_text_with_bias, scalar="logit_scale"),
    Case("triplet", "triplet_loss", labelled_embeddings, scalar="margin", least_rows=3),
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
