"""Which of `native` and `triton` goes first on a GPU: a table over architecture, dtype, rows and width.

Neither was timed on a GPU yet: every entry rests on what the two compile to, and says so. The first entry that fits a
call decides; `backend=` and `use_backend` go before it.

A step in Triton costs about 200 µs of the host's time (six launches, forward and backward of NT-Xent, measured without
a card), so that an eager step gains by it only where it saves the card more. Inside a CUDA graph the host does nothing:
there `use_backend("triton")` may pay from 2048 rows on, chosen for the warm-up as well (docs/gpu.md).
"""

from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
FLOAT64 = (torch.float64,)
ANY = (0, 2**63)


class Entry(NamedTuple):
    """A region of calls and the backend to try first in it. Ranges hold their ends."""

    backend: str
    architectures: tuple  # compute capability times 10: (80, 89)
    dtypes: tuple
    rows: tuple
    width: tuple
    reason: str


def _float64_by_tensor_cores(architecture):
    return Entry(
        "triton",
        (architecture, architecture),
        FLOAT64,
        (4096, 2**63),  # 3 products at D = 128 and peak: 0.6 ms saved on an A100, 0.2 ms on an H100
        ANY,
        "Triton's float64 products are tensor-core instructions (DMMA), the CUDA kernel's are multiply-adds, of which"
        " this card does half as many a second by its data sheet; with fewer rows Triton's host time is more than that"
        " saves",
    )


CONTRASTIVE = (
    Entry(
        "native",
        ANY,
        FLOAT32,
        ANY,
        ANY,
        "exact float32 products are fused multiply-adds in both, and as many: 3 for NT-Xent, forward and backward;"
        " where torch allows TF32 both are tensor-core instructions, but the CUDA kernel rounds the operands and Triton"
        " cuts them off, which leaves logits 5 to 8 times as far off; the CUDA kernel is launched without Python in"
        " between",
    ),
    _float64_by_tensor_cores(80),
    _float64_by_tensor_cores(90),
    Entry(
        "native",
        ANY,
        FLOAT64,
        ANY,
        ANY,
        "few rows, or a card whose tensor cores do float64 no faster than multiply-adds or not at all: the CUDA kernel"
        " is launched without Python in between",
    ),
    Entry(
        "triton",
        (90, 119),  # not GeForce of 12.0, which have neither wgmma nor tcgen05
        HALF,
        (16384, 2**63),
        (64, 255),
        "Triton's products are wgmma (tcgen05 from sm_100 on), which feeds the tensor cores from shared memory; the"
        " mma.sync of the CUDA kernel reaches 63 % of their peak at most there (arXiv:2402.13499), which outweighs"
        " Triton's host time only with so many rows; from a width of 256 on either backend leaves gradients to cuBLAS,"
        " and Triton's panels have fewer rows, so that it adds to the sums of the columns more often",
    ),
    Entry(
        "native",
        ANY,
        HALF,
        ANY,
        ANY,
        "both are mma.sync, or the rows too few to make up for Triton's host time: the CUDA kernel is launched without"
        " Python in between and splits the columns where rows are few",
    ),
)


def prefer(table, rows, architecture, views=1):
    """The entry of `table` that fits rows (N, D) on a GPU of compute capability `architecture` / 10; None without.

    `views` tensors of that shape are one above the other: (views · N, D).
    """
    n, d = rows.shape
    for entry in table:
        ranges = ((entry.architectures, architecture), (entry.rows, views * n), (entry.width, d))
        if rows.dtype in entry.dtypes and all(low <= value <= high for (low, high), value in ranges):
            return entry
    return None


def architecture_of(device):
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
