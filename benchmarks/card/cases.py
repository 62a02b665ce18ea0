"""The calls that `probe` times: sizes on both sides of every switch between kernels, and what users run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ssl_kernels
from benchmarks.peers import plain_siglip_loss, plain_triplet_loss
from benchmarks.plain_losses import plain_clip_loss
from ssl_kernels.nn import MoCoQueue
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

HALF, SINGLE = torch.bfloat16, torch.float32
DRY_DIVISOR = 512  # of the number of rows in a dry run


@dataclass
class Case:
    """One call on given sizes.

    Args:
        loss: Name of the loss.
        sizes: As {"B": 512, "D": 128}.
        make: `make(device)` returns (ours(backend), plain, leaves): functions that return the loss, and the tensors
            whose gradients a step takes.
        forward_operations, step_operations: Floating-point operations of ours in the forward and in the whole step, as
            docs/contrastive.md and docs/sigmoid_pairs.md count them.
        logits: Numbers in one matrix of similarities, which plain PyTorch keeps several times.
    """

    loss: str
    sizes: dict
    dtype: torch.dtype
    make: Callable
    forward_operations: float
    step_operations: float
    logits: int

    @property
    def name(self):
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        return f"{self.loss} {sizes} {str(self.dtype).removeprefix('torch.')}"


def cases(dry=False):
    """All of them, of each loss the most important first."""
    made = [nt_xent(*sizes, dry=dry) for sizes in NT_XENT]
    made += [clip(*sizes, dry=dry) for sizes in CLIP]
    made += [moco(*kinds, dry=dry) for kinds in MOCO]
    made += [siglip(16384, d, dry=dry) for d in (768, 512, 256, 1152)]
    made.append(triplet(8192, 128, dry=dry))
    return made


NT_XENT = (
    (8192, 128, HALF),
    (65536, 128, HALF),
    (1024, 128, HALF),
    (512, 128, HALF),
    (4096, 128, SINGLE),
    (4096, 128, HALF),
    (32768, 128, HALF),
    (8192, 64, HALF),
    (8192, 192, HALF),
    (8192, 256, HALF),
    (8192, 512, HALF),
)
CLIP = ((65536, 512), (16384, 512), (16384, 256), (16384, 264), (16384, 520), (16384, 768))
MOCO = (
    (HALF, HALF, False),
    (SINGLE, HALF, False),
    (SINGLE, SINGLE, False),
    (HALF, HALF, True),
    (SINGLE, HALF, True),
    (SINGLE, SINGLE, True),
)


def _rows(n, d, dtype, device, grad=True):
    return torch.randn(n, d, device=device).to(dtype).requires_grad_(grad)


def _fewer(n, dry):
    return max(8, n // DRY_DIVISOR) if dry else n


def nt_xent(b, d, dtype, dry=False):
    b = _fewer(b, dry)
    unit = 2 * (2 * b) ** 2 * d

    def make(device):
        x, y = (_rows(b, d, dtype, device) for _ in range(2))
        return (
            lambda backend: ssl_kernels.nt_xent_loss(x, y, backend=backend),
            lambda: plain_nt_xent_loss(x, y),
            (x, y),
        )

    return Case("nt_xent", {"B": b, "D": d}, dtype, make, unit, 3 * unit, (2 * b) ** 2)


def clip(n, d, dry=False):
    n = _fewer(n, dry)
    unit = 2 * n * n * d

    def make(device):
        x, y = (_rows(n, d, HALF, device) for _ in range(2))
        scale = torch.tensor(20.0, device=device)
        return (
            lambda backend: ssl_kernels.clip_loss(x, y, scale, backend=backend),
            lambda: plain_clip_loss(x, y, scale),
            (x, y),
        )

    return Case("clip", {"N": n, "D": d}, HALF, make, unit, 5 * unit, n * n)


def moco(dtype, queue_dtype, with_ids, n=256, length=65536, d=128, dry=False):
    """`with_ids`: a queue that may still be filling, whose empty rows are left out; else the rows of a full one."""
    length = _fewer(length, dry)
    unit = 2 * n * length * d

    def make(device):
        query, key = _rows(n, d, dtype, device), _rows(n, d, dtype, device, grad=False)
        queue = MoCoQueue(length, d, dtype=queue_dtype, device=device)
        queue.push_(torch.randn(length, d, device=device))
        rows = queue.storage.clone()
        negatives = queue if with_ids else rows

        def plain():
            unit_query, unit_key = F.normalize(query, dim=1), F.normalize(key, dim=1)
            positive = (unit_query * unit_key).sum(1, keepdim=True)
            logits = torch.cat((positive, unit_query @ rows.to(dtype).T), 1) / 0.07
            return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long, device=device))

        return (
            lambda backend: ssl_kernels.moco_loss(query, key, negatives, backend=backend),
            plain,
            (query,),
        )

    sizes = {"N": n, "K": length, "D": d, "queue": str(queue_dtype).removeprefix("torch."), "ids": with_ids}
    return Case("moco", sizes, dtype, make, 2 * unit, 2 * unit, n * length)


def siglip(n, d, dry=False):
    n = _fewer(n, dry)
    unit = 2 * n * n * d

    def make(device):
        x, y = (_rows(n, d, HALF, device) for _ in range(2))
        scale, bias = (torch.tensor(value, device=device) for value in (10.0, -10.0))
        return (
            lambda backend: ssl_kernels.siglip_loss(x, y, scale, bias, backend=backend),
            lambda: plain_siglip_loss(x, y, scale, bias),
            (x, y),
        )

    return Case("siglip", {"N": n, "D": d}, HALF, make, 4 * unit, 4 * unit, n * n)


def triplet(n, d, dry=False):
    n = _fewer(n, dry)
    unit = 2 * n * n * d

    def make(device):
        x = _rows(n, d, HALF, device)
        labels = torch.arange(n, device=device) // 4
        return (
            lambda backend: ssl_kernels.triplet_loss(x, labels, backend=backend),
            lambda: plain_triplet_loss(x, labels),
            (x,),
        )

    return Case("triplet", {"N": n, "D": d}, HALF, make, unit, unit, n * n)
