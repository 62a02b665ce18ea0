"""Workloads of the adapters: each class of another library against its adapter, built alike, on the same inputs.

Losses run forward and backward on B rows of their usual width. Mixers have no loss: their functions return a weighted
sum of some numbers of the images and targets that they make, and draw the same random numbers in every call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.bench_contrastive import TOLERANCES
from benchmarks.bench_mixing import CLASSES, SIDE, Probe, images_of
from benchmarks.harness import Implementation, Workload, loss_and_gradients
from benchmarks.peers import RESTATED, Originals
from ssl_kernels import adapters

BATCH_SIZES = (64, 256, 1024)
LARGEST_MIXED = 256
ROWS_PER_LABEL = 8
BANK = 4096
TOKENS, WORDS = 76, 1000  # of a caption, of its vocabulary
PAIR_BYTES = (
    16  # that pytorch-metric-learning's NTXentLoss takes for each pair of a positive and a negative pair
)


@dataclass(frozen=True)
class Adapted:
    """One class in one way of using it.

    Args:
        library, name: The adapter's module, and its class or function.
        make: Of (B, D), the inputs; floating ones get a gradient.
        build: Of a namespace with the library's or the adapter's names, and the workload's (B, D): what is called with
            the inputs, and returns a loss.
        dim: Width of the rows.
        way: What is special about it, or "".
        extra_bytes: Of B, what a step of the original takes.
        products: Of B, how many logits there are, times the products of as many logits by rows of width D that a step
            needs at least: three of a rectangle (two where the columns get no gradient), one and a half of a square.
    """

    library: str
    name: str
    make: Callable
    build: Callable
    dim: int = 128
    way: str = ""
    extra_bytes: Callable = lambda n: 0
    products: Callable = lambda n: 0

    def __str__(self):
        return f"{self.library}.{self.name}" + (f" {self.way}" if self.way else "")

    def __call__(self, batch_size, dim, dtype, device):
        dim = dim or self.dim
        torch.manual_seed(batch_size)
        inputs = tuple(
            x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device)
            for x in self.make(batch_size, dim)
        )

        def built(space, wide=False):
            torch.manual_seed(0)  # memory banks are drawn
            function = self.build(space, batch_size, dim)
            if isinstance(function, torch.nn.Module):
                function.to(device, torch.float64 if wide else None)
            return function

        def expected():
            wide = [x.detach().double().requires_grad_() if x.requires_grad else x for x in inputs]
            return loss_and_gradients(built(getattr(adapters, self.library), wide=True), wide)

        return Workload(
            loss=str(self),
            sizes={"B": batch_size, "D": dim},
            inputs=inputs,
            implementations=implementations(self.library, built, self.extra_bytes(batch_size)),
            expected=expected,
            tolerance=TOLERANCES[dtype],
            operations=int(2 * self.products(batch_size) * dim) or None,
        )


def implementations(library, built, extra_bytes=0):
    """The original's and the adapter's, as `built` makes them of either's namespace."""
    try:
        space = RESTATED.get(library) or Originals(library)
        theirs = Implementation("original", built(space), baseline=True, extra_bytes=extra_bytes)
    except ImportError as error:
        theirs = Implementation("original", None, baseline=True, missing=str(error))
    if library in NEEDED and theirs.missing:
        return [theirs, Implementation("ssl_kernels", None, missing=theirs.missing)]
    return [theirs, Implementation("ssl_kernels", built(getattr(adapters, library)))]


# Their adapters' classes are derived from the originals.
NEEDED = ("kornia", "pytorch_metric_learning", "sentence_transformers", "torchvision")


def rectangle(n):
    """Products of B rows and B columns that all get a gradient."""
    return 3 * n * n


def square(n):
    """Of B rows with themselves: the matrix of logits is symmetric."""
    return 1.5 * n * n


def square_of_views(n):
    return square(2 * n)


def rows(*counts):
    """A maker of normal rows, `count` times B each."""
    return lambda n, d: [torch.randn(count * n, d) for count in counts]


def unit_rows(*counts):
    return lambda n, d: [F.normalize(x, dim=1) for x in rows(*counts)(n, d)]


def labelled(n, d):
    return torch.randn(n, d), torch.randint(max(2, n // ROWS_PER_LABEL), (n,))


def scaled(*numbers):
    """Unit rows of two modalities, and learned numbers."""
    return lambda n, d: [*unit_rows(1, 1)(n, d), *map(torch.tensor, numbers)]


def constructed(name, *arguments, **options):
    """A builder of an object of the class."""
    return lambda space, n, d: getattr(space, name)(*arguments, **options)


def _info_nce_of_negatives(n, d):
    return torch.randn(n, d), torch.randn(n, d), torch.randn(BANK, d)


def _captioned(n, d):
    features = scaled(14.3)(n, d)
    return [*features[:2], torch.randn(n, TOKENS, WORDS), torch.randint(1, WORDS, (n, TOKENS)), features[2]]


def _coca(space, n, d):
    loss = space.CoCaLoss(2.0, 1.0)
    return lambda *inputs: sum(loss(*inputs))


def _two_views(name):
    return lambda space, n, d: space.SelfSupervisedLoss(getattr(space, name)())


def _memory(space, n, d):
    memory = space.CrossBatchMemory(space.NTXentLoss(), d, memory_size=1024)
    labels = torch.randint(64, (n,))
    return lambda x: memory(x, labels.to(x.device))


def _triplets(space, n, d):
    index = tuple(torch.randint(n, (4 * n,)) for _ in range(3))
    loss = space.TripletMarginLoss()
    return lambda x, labels: loss(x, labels, tuple(part.to(x.device) for part in index))


def _ranking(name):
    def build(space, n, d):
        loss = getattr(space, name)(torch.nn.Sequential(torch.nn.Identity()))
        return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)

    return build


def _cached_ranking(name):
    def build(space, n, d):
        loss = getattr(space, name)(torch.nn.Sequential(torch.nn.Identity()), mini_batch_size=32)
        return lambda *columns: loss.calculate_loss([list(column.split(32)) for column in columns])

    return build


def _function(name, reduce=None):
    def build(space, n, d):
        function = getattr(space, name)
        return function if reduce is None else lambda *inputs: reduce(function(*inputs))

    return build


def _moco(space, n, d):
    queue = F.normalize(torch.randn(d, BANK), dim=0)
    key = F.normalize(torch.randn(n, d), dim=1)
    return lambda q: space.moco_loss_func(q, key.to(q), queue.to(q))


def _prediction(name):
    """Of a target without a gradient."""

    def build(space, n, d):
        function, target = getattr(space, name), torch.randn(n, d)
        return lambda prediction: function(prediction, target.to(prediction))

    return build


def _views(count):
    """A maker of unit rows (B, count, D), as SupContrast's head gives them, and labels."""

    def make(n, d):
        rows, labels = labelled(count * n, d)
        return F.normalize(rows, dim=1).view(n, count, d), labels[::count]

    return make


def _pairs_of_pairs(rows_of):
    """Bytes of NTXentLoss for `rows_of(n)` rows, two of a class: pairs times negative pairs."""
    return lambda n: PAIR_BYTES * rows_of(n) * rows_of(n) * (rows_of(n) - 2)


LOSSES = (
    Adapted("byol_pytorch", "cosine_loss_fn", rows(1, 1), _function("cosine_loss_fn", torch.mean), 256),
    Adapted(
        "flag_embedding",
        "in_batch_neg_loss",
        unit_rows(1, 1),
        _function("in_batch_neg_loss"),
        384,
        products=rectangle,
    ),
    Adapted("info_nce", "InfoNCE", rows(1, 1), constructed("InfoNCE"), products=rectangle),
    Adapted(
        "info_nce",
        "InfoNCE",
        _info_nce_of_negatives,
        constructed("InfoNCE"),
        way="with 4096 negatives",
        products=lambda n: 3 * n * BANK,
    ),
    Adapted("infonce", "InfoNCE", rows(2), constructed("InfoNCE"), products=square_of_views),
    Adapted("infonce", "SupervisedInfoNCE", labelled, constructed("SupervisedInfoNCE"), products=square),
    Adapted("lightly", "NTXentLoss", rows(1, 1), constructed("NTXentLoss"), products=square_of_views),
    Adapted(
        "lightly",
        "NTXentLoss",
        rows(1, 1),
        lambda space, n, d: space.NTXentLoss(0.1, (BANK, d)),
        products=lambda n: 2 * n * BANK,
        way="with a bank of 4096",
    ),
    Adapted("lightly", "DCLLoss", rows(1, 1), constructed("DCLLoss"), products=square_of_views),
    Adapted("lightly", "DCLWLoss", rows(1, 1), constructed("DCLWLoss"), products=square_of_views),
    Adapted("lightly", "NegativeCosineSimilarity", rows(1, 1), constructed("NegativeCosineSimilarity")),
    Adapted("open_clip", "ClipLoss", scaled(14.3), constructed("ClipLoss"), 512, products=rectangle),
    Adapted("open_clip", "CoCaLoss", _captioned, _coca, 512, extra_bytes=lambda n: 24 * n * TOKENS * WORDS),
    Adapted(
        "open_clip", "SigLipLoss", scaled(10.0, -10.0), constructed("SigLipLoss"), 512, products=rectangle
    ),
    Adapted(
        "pytorch_metric_learning",
        "NTXentLoss",
        rows(1, 1),
        _two_views("NTXentLoss"),
        products=square_of_views,
        way="of two views",
        extra_bytes=_pairs_of_pairs(lambda n: 2 * n),
    ),
    Adapted(
        "pytorch_metric_learning",
        "NTXentLoss",
        labelled,
        constructed("NTXentLoss"),
        products=square,
        way="by labels",
        extra_bytes=lambda n: PAIR_BYTES * n * (ROWS_PER_LABEL - 1) * n * n,
    ),
    Adapted("pytorch_metric_learning", "SupConLoss", labelled, constructed("SupConLoss"), products=square),
    Adapted("pytorch_metric_learning", "TripletMarginLoss", labelled, _triplets, way="of given triplets"),
    Adapted(
        "pytorch_metric_learning",
        "CrossBatchMemory",
        rows(1),
        _memory,
        products=lambda n: 2 * n * 1024,
        way="of 1024 rows",
        extra_bytes=lambda n: PAIR_BYTES * (n * 16) * (n * 1008),
    ),
    *(
        Adapted("sentence_transformers", name, rows(1, 1), make(name), 384, products=rectangle)
        for name, make in (
            ("MultipleNegativesRankingLoss", _ranking),
            ("CachedMultipleNegativesRankingLoss", _cached_ranking),
            ("MultipleNegativesSymmetricRankingLoss", _ranking),
            ("CachedMultipleNegativesSymmetricRankingLoss", _cached_ranking),
        )
    ),
    Adapted(
        "solo_learn", "simclr_loss_func", rows(1, 1), _function("simclr_loss_func"), products=square_of_views
    ),
    Adapted(
        "solo_learn",
        "moco_loss_func",
        unit_rows(1),
        _moco,
        way="with a queue of 4096",
        products=lambda n: 2 * n * BANK,
    ),
    Adapted("solo_learn", "byol_loss_func", rows(1), _prediction("byol_loss_func")),
    Adapted("solo_learn", "simsiam_loss_func", rows(1), _prediction("simsiam_loss_func")),
    Adapted("solo_learn", "nnclr_loss_func", rows(1, 1), _function("nnclr_loss_func"), products=rectangle),
    Adapted(
        "sup_contrast",
        "SupConLoss",
        _views(1),
        constructed("SupConLoss"),
        products=square,
        way="of one view",
    ),
    Adapted(
        "sup_contrast",
        "SupConLoss",
        _views(2),
        constructed("SupConLoss"),
        products=square_of_views,
        way="of two views",
    ),
)


def mixed(library, name, options, batch_size, side, dtype, device):
    """A mixer on B × 3 × S × S images and labels of 1000 classes."""
    images = images_of(batch_size, side, dtype, device)
    labels = torch.randint(CLASSES, (batch_size,)).to(device)
    probe = Probe(images)

    def built(space):
        mix, buffers = getattr(space, name)(**options), []

        def run(x):
            torch.manual_seed(0)
            np.random.seed(0)
            if library == "timm":  # works in place, on images that go on being mixed
                if not buffers:
                    buffers.append(x.clone())
                x = buffers[0]
            mixed_images, targets = mix(x, labels)
            return probe(mixed_images) + targets.sum(dtype=torch.float64)

        return run

    return Workload(
        loss=f"{library}.{name}" + (" of CutMix" if options.get("mixup_alpha") == 0 else ""),
        sizes={"B": batch_size, "S": side},
        inputs=(images,),
        implementations=implementations(library, built),
        expected=lambda: (built(getattr(adapters, library))(images), ()),
        tolerance=TOLERANCES[dtype],
        bytes_moved=2 * images.nbytes,
    )


WITH_LABELS = {"data_keys": ["input", "class"]}
MIXERS = (
    partial(mixed, "timm", "Mixup", {"num_classes": CLASSES}),
    partial(mixed, "timm", "Mixup", {"num_classes": CLASSES, "mixup_alpha": 0, "cutmix_alpha": 1.0}),
    partial(mixed, "torchvision", "MixUp", {"num_classes": CLASSES}),
    partial(mixed, "torchvision", "CutMix", {"num_classes": CLASSES}),
    partial(mixed, "kornia", "RandomMixUpV2", WITH_LABELS),
    partial(mixed, "kornia", "RandomCutMixV2", {**WITH_LABELS, "use_correct_lambda": True}),
)


def workloads(options):
    """Functions that make the workloads `options` ask for, by class and rising size; `dim` is that of the losses."""
    on = (options.dtype, options.device)

    sizes = sorted(options.batch_sizes or BATCH_SIZES)
    losses = [partial(loss, size, options.dim, *on) for loss in LOSSES for size in sizes]
    return losses + [
        partial(mixer, size, SIDE, *on) for mixer in MIXERS for size in sizes if size <= LARGEST_MIXED
    ]
