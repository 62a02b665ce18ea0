"""Calls of every loss that a global batch can be divided for: inputs by row, encoders, learned scalars."""

from dataclasses import dataclass, field

import torch
from torch import nn

import ssl_kernels
from ssl_kernels import distributed

DIM, WIDTH = 5, 6  # of the inputs, of the embeddings


@dataclass(frozen=True)
class Case:
    """One loss with its options.

    Attributes:
        loss: Name of the function, in `ssl_kernels` and `ssl_kernels.distributed`.
        towers: How many encoders; each gets its own rows of the inputs.
        scalars: Initial values of the learned scalars, passed after the embeddings.
        by_row: Names of arguments with one value per row, from `inputs_of`.
        options: Further arguments.
        views: How many values "none" gives a row.
        frozen: Towers without a gradient.
    """

    loss: str
    towers: int
    scalars: tuple = ()
    by_row: tuple = ()
    options: dict = field(default_factory=dict)
    views: int = 1
    frozen: tuple = ()

    def __str__(self):
        options = "".join(f"-{k}={v}" for k, v in self.options.items())
        return self.loss + "".join(f"-{name}" for name in self.by_row) + options


CASES = [
    Case("nt_xent_loss", 2, (0.3,), views=2),
    Case("nt_xent_loss", 2, (0.3,), ("row_weights",), views=2),
    Case("nt_xent_loss", 2, (2.0,), options={"normalize": False}, views=2),
    Case("nt_xent_loss", 2, (0.3,), ("ids",), views=2),
    Case("dcl_loss", 2, (0.2,), views=2),
    Case("debiased_nt_xent_loss", 2, (0.5,), options={"positive_prior": 0.05}, views=2),
    Case("debiased_nt_xent_loss", 2, (0.5,), options={"positive_prior": 0.4}, views=2),
    Case("info_nce_loss", 2, (0.2,)),
    Case("info_nce_loss", 2, (0.2,), ("query_ids",), options={"symmetric": True}),
    Case("info_nce_loss", 3, (0.2,)),
    Case("info_nce_loss", 3, (0.2,), ("query_ids", "key_ids")),
    Case("info_nce_loss", 2, (0.2,), ("paired",), options={"negative_mode": "paired"}),
    Case("info_nce_loss", 2, (0.2,), frozen=(1,)),
    Case("info_nce_loss", 2, (0.2,), frozen=(0,)),
    Case("clip_loss", 2, (5.0,)),
    Case("clip_loss", 2, (5.0,), ("ids",)),
    Case("clip_loss", 2, (5.0,), ("row_weights",), options={"label_smoothing": 0.1}),
    Case("clip_loss", 2, (5.0,), frozen=(0,)),
    Case("siglip_loss", 2, (5.0, -2.0)),
    Case("siglip_loss", 2, (5.0, -2.0), ("ids",)),
    Case("siglip_loss", 2, (5.0, -2.0), frozen=(1,)),
    Case("sup_con_loss", 1, (0.2,), ("labels",)),
    Case("sup_con_loss", 1, (0.2,), ("labels", "row_weights"), options={"unlabelled": 0}),
    Case("sup_con_loss", 1, (0.2,), ("several",)),
    Case("sup_con_loss", 1, (0.2,), ("positives", "row_weights")),
    Case("moco_loss", 2, (0.2,), frozen=(1,)),
    Case("moco_loss", 2, (0.2,), ("queue",), frozen=(1,)),
    Case("moco_loss", 2, (0.2,), ("ids",), frozen=(1,)),
    Case("moco_loss", 2, (0.2,), ("ids", "queue"), frozen=(1,)),
    Case("byol_loss", 2, frozen=(1,)),
    Case("triplet_loss", 1, (0.4,), ("labels",)),
    Case("triplet_loss", 1, (), ("labels",), options={"margin": "soft"}),
    Case("triplet_loss", 1, (0.4,), ("labels",), options={"distance": "cosine"}),
]


class Model(nn.Module):
    """The encoders and the learned scalars of a case."""

    def __init__(self, case, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.case = case
        self.towers = nn.ModuleList(nn.Linear(DIM, WIDTH) for _ in range(case.towers))
        for parameter in self.towers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.scalars = nn.ParameterList(
            nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in case.scalars
        )
        self.to(dtype)
        for tower in case.frozen:
            self.towers[tower].requires_grad_(False)

    def forward(self, inputs):
        features = [tower(x) for tower, x in zip(self.towers, inputs, strict=True)]
        return features, [scalar.view(()) for scalar in self.scalars]


def inputs_of(case, rows, dtype):
    """(inputs of the towers, values by row) of a global batch."""
    generator = torch.Generator().manual_seed(5)
    x = [torch.randn(rows, DIM, generator=generator, dtype=torch.float64) for _ in range(case.towers)]
    # Neighbours are alike, so that losses tell which rows meet which.
    x = [each + torch.randn(rows, DIM, generator=generator, dtype=torch.float64) / 4 for each in x]
    values = {}
    for name in case.by_row:
        if name == "labels":
            values[name] = torch.randperm(rows, generator=generator) // 2  # more labels than a rank has rows
        elif name == "several":  # of so many labels that they need two words
            values[name] = torch.rand(rows, 70, generator=generator) < 0.01
        elif name == "positives":
            values[name] = torch.rand(rows, rows, generator=generator) < 0.4
        elif name.endswith("ids"):
            values[name] = torch.randint(0, max(2, rows // 2), (rows,), generator=generator)
        elif name == "row_weights":
            values[name] = torch.rand(case.views, rows, generator=generator, dtype=torch.float64).to(dtype)
        elif name == "paired":
            values[name] = torch.randn(rows, 3, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return [each.to(dtype) for each in x], values


def call(function, case, model, inputs, values, **options):
    """`function`, plain or distributed, of the rows `inputs` and `values`."""
    features, scalars = model(inputs)
    values = dict(values)
    arguments = list(features)
    keywords = {}
    if "paired" in values:
        arguments.append(values.pop("paired"))
    if case.loss in ("sup_con_loss", "triplet_loss"):
        arguments.append(values.pop("labels", values.pop("several", None)))
    if "queue" in case.by_row:
        arguments.append(queue_of(features[0].dtype))
        if "ids" in values:
            keywords["queue_ids"] = torch.arange(11) % 4
    names = {
        "siglip_loss": ("logit_scale", "logit_bias"),
        "clip_loss": ("logit_scale",),
        "triplet_loss": ("margin",),
    }
    keywords |= dict(zip(names.get(case.loss, ("temperature",)), scalars, strict=False))
    if "row_weights" in values:
        keywords["row_weights"] = values.pop("row_weights").flatten()
    return function(*arguments, **keywords, **values, **case.options, **options)


def queue_of(dtype):
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(11, WIDTH, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(rows, dim=1).to(dtype)


def part(values, rows):
    """The rows of one rank; values of two views have rows along the second dimension."""
    return {name: value[:, rows] if name == "row_weights" else value[rows] for name, value in values.items()}


def plain(case, rows, dtype=torch.float64, **options):
    """(loss, gradients by name) of one process on the global batch."""
    model = Model(case, dtype)
    loss = call(getattr(ssl_kernels, case.loss), case, model, *inputs_of(case, rows, dtype), **options)
    loss.sum().backward()
    return loss.detach(), gradients(model)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def on_rank(case, rank, sizes, model=None, dtype=torch.float64, **options):
    """The loss of this rank, whose rows are its part of the same global batch."""
    model = Model(case, dtype) if model is None else model
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    inputs, values = inputs_of(case, sum(sizes), dtype)
    loss = call(
        getattr(distributed, case.loss), case, model, [x[own] for x in inputs], part(values, own), **options
    )
    return loss, model
