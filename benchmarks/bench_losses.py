"""Workloads of the other losses over `contrastive`, and of those that are plain algebra."""

import argparse
from dataclasses import dataclass, field
from functools import partial

import torch

import ssl_kernels
from benchmarks import bench_contrastive, plain_losses
from benchmarks.bench_contrastive import TOLERANCES, our_implementations
from benchmarks.harness import Implementation, Workload, loss_and_gradients
from benchmarks.machine import free_memory
from benchmarks.peers import MATRICES_OF_LOGITS, compiled

BATCH_SIZES = (64, 256, 1024, 4096)
QUICK_BATCH_SIZES = (64, 1024)
NEGATIVES = 16384  # of InfoNCE's queries, each with a gradient
WIDE = 512
ROWS_PER_LABEL = 16
CROPS, PROTOTYPES = 4, 3000
PIXELS = 768  # of a patch, 16 x 16 of three colours


@dataclass(frozen=True)
class Loss:
    """One loss's workloads.

    Args:
        name: Of the workload; `function`_loss is ours and plain_`function`_loss the baseline.
        make: From (n, d), the inputs: embeddings float32, which are cast, and others.
        units: How many products of n columns the step needs at least, of 2 · n · columns · d operations each.
        columns: How many columns n rows meet, None where there are no logits.
        dim: Instead of the usual width.
        without_gradient: How many of the last embeddings get none.
    """

    name: str
    function: str
    make: object
    units: float | None = None
    columns: object = field(default=lambda n: n)
    dim: int | None = None
    without_gradient: int = 0

    def __call__(self, batch_size, dim, dtype, device):
        torch.manual_seed(batch_size)
        dim = self.dim or dim
        wide = dtype if dtype == torch.float64 else torch.float32
        made = self.make(batch_size, dim)
        inputs = [self._placed(x, dtype, wide, device) for x in made]
        embeddings = [x for x in inputs if x.is_floating_point()]
        for x in embeddings[: len(embeddings) - self.without_gradient]:
            x.requires_grad_()
        logits = batch_size * self.columns(batch_size) if self.units else 0
        ours = getattr(ssl_kernels, f"{self.function}_loss")
        plain = getattr(plain_losses, f"plain_{self.function}_loss")

        def expected():
            wide_inputs = [
                x.detach().to(wide if x.is_floating_point() else x.dtype).requires_grad_(x.requires_grad)
                for x in inputs
            ]
            fits = not logits or MATRICES_OF_LOGITS * logits * wide.itemsize < free_memory(device)
            return loss_and_gradients(plain if fits else partial(ours, backend="chunked"), wide_inputs)

        extra_bytes = MATRICES_OF_LOGITS * logits * dtype.itemsize
        peers = [
            Implementation("plain PyTorch", plain, baseline=True, extra_bytes=extra_bytes),
            Implementation("torch.compile", compiled(plain), baseline=True, extra_bytes=extra_bytes),
        ]
        if self.units:
            own = our_implementations(ours, inputs, lambda backend: partial(ours, backend=backend))
        else:
            own = [Implementation("ssl_kernels", ours)]
        return Workload(
            loss=self.name,
            sizes={"N": batch_size, "D": dim},
            inputs=tuple(inputs),
            implementations=[*peers, *own],
            expected=expected,
            tolerance=TOLERANCES[dtype],
            operations=int(2 * self.units * logits * dim) if self.units else None,
        )

    @staticmethod
    def _placed(x, dtype, wide, device):
        if not x.is_floating_point():
            return x.to(device)
        return x.to(device, dtype if x.dim() >= 2 else wide)


def _rows(count):
    return lambda n, d: [torch.randn(n, d) for _ in range(count)]


def _labelled(n, d):
    return torch.randn(n, d), torch.randint(max(2, n // ROWS_PER_LABEL), (n,))


def _image_and_text(n, d):
    return [*_rows(2)(n, d), torch.tensor(14.3)]


def _mixed(n, d):
    return [*_rows(2)(n, d), torch.randperm(n), torch.rand(n)]


def _queries_and_negatives(n, d):
    return [*_rows(2)(n, d), torch.randn(NEGATIVES, d)]


def _crops_and_prototypes(n, d):
    return torch.randn(CROPS, n, d), torch.randn(PROTOTYPES, d)


def _logits_of_crops(n, d):
    return torch.randn(CROPS, n, PROTOTYPES), torch.randn(2, n, PROTOTYPES)


# Units: a rectangle needs one product forward and two back, a square, whose triangle is enough, half and one.
LOSSES = (
    Loss("clip", "clip", _image_and_text, units=3),
    Loss("clip_wide", "clip", _image_and_text, units=3, dim=WIDE),
    Loss("sup_con", "sup_con", _labelled, units=1.5),
    Loss("dcl", "dcl", _rows(2), units=6),  # 2N rows: four times 1.5
    Loss("info_nce", "info_nce", _queries_and_negatives, units=3, columns=lambda n: NEGATIVES),
    Loss("imix", "imix", _mixed, units=3, without_gradient=1),
    Loss("triplet_margin", "triplet_margin", _rows(3)),
    Loss("byol", "byol", _rows(2), without_gradient=1),
    Loss("swav", "swav", _crops_and_prototypes),
    Loss("dino_logits", "dino", _logits_of_crops, without_gradient=1),
    Loss("barlow_twins", "barlow_twins", _rows(2), dim=WIDE),
    Loss("vicreg", "vicreg", _rows(2), dim=WIDE),
    Loss("mae", "mae", _rows(2), dim=PIXELS, without_gradient=1),
)


def workloads(options):
    """Functions that make the workloads `options` ask for, by rising size."""
    sizes = options.batch_sizes or (QUICK_BATCH_SIZES if options.quick else BATCH_SIZES)
    asked = argparse.Namespace(**{**vars(options), "batch_sizes": sizes})
    return bench_contrastive.workloads(asked, losses=LOSSES)
