"""Workloads of the mixing operations on batches of B × 3 × S × S images, and of their cross-entropy on B × 1000 logits.

An operation on images has no loss: its functions return a weighted sum of some numbers of the result, which is what
implementations must agree on. In-place ones work on a copy of the images of their own, made at the first call. timm and
clovaai's CutMix stand here as the few lines that their users run, restated; torchvision is itself, with λ fixed.
"""

from functools import partial

import torch
import torch.nn.functional as F

import ssl_kernels
from benchmarks.bench_contrastive import TOLERANCES, our_implementations
from benchmarks.harness import Implementation, Workload, loss_and_gradients
from benchmarks.peers import compiled

BATCH_SIZES = (256,)
QUICK_BATCH_SIZES = (32,)
SIDE = 224
CLASSES = 1000
LAM = 0.3
PROBES = 4096
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Probe:
    """A weighted sum of some numbers of a result, float64."""

    def __init__(self, like):
        generator = torch.Generator().manual_seed(1)
        self.where = torch.randint(like.numel(), (PROBES,), generator=generator).to(like.device)
        self.weights = torch.randn(PROBES, generator=generator, dtype=torch.float64).to(like.device)

    def __call__(self, result):
        return self.weights @ result.flatten()[self.where].double()


def in_place(step, probe):
    """`step(buffer)`, which overwrites a batch of images, on a copy of its own."""
    buffers = []

    def run(images):
        if not buffers:
            buffers.append(images.clone())
        step(buffers[0])
        return probe(buffers[0])

    return run


def images_of(batch_size, side, dtype, device):
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randn(batch_size, 3, side, side, generator=generator).to(device, dtype)


def random_permutation(batch_size, device):
    return torch.randperm(batch_size, generator=torch.Generator().manual_seed(2)).to(device)


def mixup_workload(name, batch_size, side, dtype, device, permutation, baselines):
    images = images_of(batch_size, side, dtype, device)
    probe = Probe(images)

    def expected():
        wide = images.double()
        return probe(LAM * wide + (1 - LAM) * wide[permutation]), ()

    def run(backend):
        return in_place(lambda x: ssl_kernels.mixup_(x, LAM, permutation, backend=backend), probe)

    return Workload(
        loss=name,
        sizes={"B": batch_size, "S": side},
        inputs=(images,),
        implementations=[*baselines(probe), *our_implementations(ssl_kernels.mixup_, (images,), run)],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        bytes_moved=2 * images.nbytes,
    )


def mixup_random(batch_size, side, dtype, device):
    """Mixup with a random permutation, as mixup-cifar10 and its family write it: a new batch."""
    permutation = random_permutation(batch_size, device)

    def baselines(probe):
        def plain(x):
            return LAM * x + (1 - LAM) * x[permutation]

        def probed(function):  # outside of what is compiled, which would else make the probed numbers alone
            return lambda x: probe(function(x))

        return [
            Implementation("plain PyTorch", probed(plain), baseline=True),
            Implementation("torch.compile", probed(compiled(plain)), baseline=True),
        ]

    return mixup_workload("mixup_random", batch_size, side, dtype, device, permutation, baselines)


def mixup_flip(batch_size, side, dtype, device):
    """Mixup with the flipped batch in place, as timm's Mixup does it."""
    permutation = torch.arange(batch_size, device=device).flip(0)

    def baselines(probe):
        def timm_formulation(x):
            flipped = x.flip(0).mul_(1 - LAM)
            x.mul_(LAM).add_(flipped)

        return [Implementation("timm's formulation", in_place(timm_formulation, probe), baseline=True)]

    return mixup_workload("mixup_flip", batch_size, side, dtype, device, permutation, baselines)


def mixup_roll(batch_size, side, dtype, device):
    """Mixup with the batch moved on by one, as torchvision's MixUp does it."""
    permutation = torch.arange(batch_size, device=device).roll(1)

    def baselines(probe):
        transform = torchvision_mixup()
        missing = "torchvision is not installed" if transform is None else None
        labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

        def run(x):
            return probe(transform(x, labels)[0])

        return [Implementation("torchvision", run, baseline=True, missing=missing)]

    return mixup_workload("mixup_roll", batch_size, side, dtype, device, permutation, baselines)


def torchvision_mixup():
    """torchvision's MixUp that always draws LAM; None where torchvision is missing."""
    try:
        from torchvision.transforms import v2
    except ImportError:
        return None

    class Fixed:
        def sample(self, _shape):
            return torch.tensor(LAM)

    transform = v2.MixUp(num_classes=CLASSES)
    transform._dist = Fixed()
    return transform


def cutmix(batch_size, side, dtype, device):
    """One box for the whole batch, a third of the image, as clovaai's CutMix assigns it."""
    images = images_of(batch_size, side, dtype, device)
    permutation, probe = random_permutation(batch_size, device), Probe(images)
    y0, y1, x0, x1 = side // 5, side // 5 + int(0.58 * side), side // 4, side // 4 + int(0.58 * side)
    boxes = torch.tensor([[y0, y1, x0, x1]], device=device).expand(batch_size, 4)

    def assigned(x):
        x[:, :, y0:y1, x0:x1] = x[permutation, :, y0:y1, x0:x1]

    def where(x):
        inside = torch.zeros(side, side, dtype=torch.bool, device=device)
        inside[y0:y1, x0:x1] = True
        return probe(torch.where(inside, x[permutation], x))

    def expected():
        pasted = images.double()
        pasted[:, :, y0:y1, x0:x1] = images[permutation, :, y0:y1, x0:x1].double()
        return probe(pasted), ()

    def run(backend):
        return in_place(lambda x: ssl_kernels.cutmix_(x, boxes, permutation, backend=backend), probe)

    return Workload(
        loss="cutmix",
        sizes={"B": batch_size, "S": side},
        inputs=(images,),
        implementations=[
            Implementation("clovaai's assignment", in_place(assigned, probe), baseline=True),
            Implementation("torch.where", where, baseline=True),
            *our_implementations(ssl_kernels.cutmix_, (images,), run),
        ],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        bytes_moved=2 * images[:, :, y0:y1, x0:x1].numel() * images.element_size(),
    )


def mixup_normalize(batch_size, side, dtype, device):
    """8-bit images to mixed, normalised ones: torchvision's to float, normalise, MixUp."""
    generator = torch.Generator().manual_seed(batch_size)
    images = torch.randint(256, (batch_size, 3, side, side), generator=generator, dtype=torch.uint8).to(
        device
    )
    result = dtype if dtype != torch.float64 else torch.float32
    permutation, probe = torch.arange(batch_size, device=device).roll(1), Probe(images)

    def expected():
        wide = images.double() / 255
        mean, std = (torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in (MEAN, STD))
        return probe((LAM * wide + (1 - LAM) * wide[permutation] - mean) / std), ()

    def plain(x):
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
        normalized = (x / 255 - mean) / std
        return probe((LAM * normalized + (1 - LAM) * normalized[permutation]).to(result))

    def run(backend):
        def call(x):
            return probe(ssl_kernels.mixup_normalize(x, LAM, permutation, MEAN, STD, result, backend=backend))

        return call

    return Workload(
        loss="mixup_normalize",
        sizes={"B": batch_size, "S": side},
        inputs=(images,),
        implementations=[
            torchvision_chain(probe, result, batch_size, device),
            Implementation("plain PyTorch", plain, baseline=True),
            *our_implementations(ssl_kernels.mixup_normalize, (images,), run),
        ],
        expected=expected,
        tolerance=TOLERANCES[result],
        bytes_moved=images.nbytes + images.numel() * result.itemsize,
    )


def torchvision_chain(probe, dtype, batch_size, device):
    mixup = torchvision_mixup()
    if mixup is None:
        return Implementation("torchvision", None, baseline=True, missing="torchvision is not installed")
    from torchvision.transforms import v2

    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return Implementation(
        "torchvision", lambda x: probe(mixup(transform(x), labels)[0].to(dtype)), baseline=True
    )


def mixup_cross_entropy(batch_size, classes, dtype, device):
    """Sixteen times as many rows as images, since a batch of images has few: at B = 256, 4096 × 1000 logits."""
    rows = 16 * batch_size
    generator = torch.Generator().manual_seed(batch_size)
    logits = torch.randn(rows, classes, generator=generator).to(device, dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    permutation, smoothing = random_permutation(rows, device), 0.1

    def dense_target(wide):
        def one_hot(labels):
            rest = smoothing / classes
            dense = torch.full((rows, classes), rest, device=device, dtype=wide)
            return dense.scatter_(1, labels[:, None], 1 - smoothing + rest)

        return one_hot(target) * LAM + one_hot(target[permutation]) * (1 - LAM)

    def soft_target_chain(z):
        return torch.sum(-dense_target(z.dtype) * F.log_softmax(z, -1), -1).mean()

    def dense_cross_entropy(z):
        return F.cross_entropy(z, dense_target(z.dtype))

    def two_losses(z):
        loss = partial(F.cross_entropy, z, label_smoothing=smoothing)
        return LAM * loss(target) + (1 - LAM) * loss(target[permutation])

    def expected():
        return loss_and_gradients(soft_target_chain, (logits.detach().double().requires_grad_(),))

    def run(backend):
        options = {"label_smoothing": smoothing, "backend": backend}
        return lambda z: ssl_kernels.mixup_cross_entropy(z, target, permutation, LAM, **options)

    return Workload(
        loss="mixup_cross_entropy",
        sizes={"N": rows, "C": classes},
        inputs=(logits,),
        implementations=[
            Implementation("timm's formulation", soft_target_chain, baseline=True),
            Implementation("F.cross_entropy, dense", dense_cross_entropy, baseline=True),
            Implementation("two cross-entropies", two_losses, baseline=True),
            *our_implementations(ssl_kernels.mixup_cross_entropy, (logits,), run),
        ],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        bytes_moved=3 * logits.nbytes,
    )


IMAGE_OPERATIONS = (mixup_random, mixup_flip, mixup_roll, cutmix, mixup_normalize)


def workloads(options):
    """Functions that make the workloads `options` ask for; its `dim` is the side of the images."""
    sizes = sorted(options.batch_sizes or (QUICK_BATCH_SIZES if options.quick else BATCH_SIZES))
    on = (options.dtype, options.device)
    made = [
        partial(operation, size, options.dim or SIDE, *on) for operation in IMAGE_OPERATIONS for size in sizes
    ]
    return made + [partial(mixup_cross_entropy, size, CLASSES, *on) for size in sizes]
