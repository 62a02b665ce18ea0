"""Which of `native` and `triton` goes first on a GPU: a table over architecture, dtype, rows and width.

Neither was timed on a GPU yet: every entry rests on what the two compile to, and says so. The first entry that fits a
call decides; `backend=` and `use_backend` go before it.
"""

from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
ANY = (0, 2**63)


class Entry(NamedTuple):
    """A region of calls and the backend to try first in it. Ranges hold their ends."""

    backend: str
    architectures: tuple  # compute capability times 10: (80, 89)
    dtypes: tuple
    rows: tuple
    width: tuple
    reason: str


CONTRASTIVE = (
    Entry(
        "native",
        ANY,
        WIDE,
        ANY,
        ANY,
        "exact float32 and float64 products are fused multiply-adds in both, and as many: 3 for NT-Xent, forward and"
        " backward; the CUDA kernel is launched without Python in between",
    ),
    Entry(
        "triton",
        (90, 119),  # not GeForce of 12.0, which have neither wgmma nor tcgen05
        HALF,
        (2048, 2**63),
        (64, 256),
        "Triton's products are wgmma (tcgen05 from sm_100 on), which feeds the tensor cores from shared memory; the"
        " mma.sync of the CUDA kernel does not reach their peak there (arXiv:2402.13499)",
    ),
    Entry(
        "native",
        (90, 129),
        HALF,
        (2048, 2**63),
        (257, 2**63),
        "3 products for NT-Xent in both, with coefficients through memory; the CUDA kernel is launched without"
        " Python in between, and what Triton's wgmma gains on tiles that are no longer kept on chip is not known",
    ),
    Entry(
        "native",
        ANY,
        HALF,
        ANY,
        ANY,
        "both are mma.sync or too small to fill the card: the CUDA kernel is launched without Python in between and"
        " splits the columns where rows are few",
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


# Embedded GPUs, which run no machine code of another architecture.
EMBEDDED = (53, 62, 72, 87, 101, 110)


def runs_on(built, architecture):
    """Whether code built for `built`, as "8.0", "9.0a" or "8.0+PTX", runs on compute capability `architecture` / 10.

    Machine code runs on the later minor versions of its major version, PTX on every later version, where the driver
    compiles it; code for features of one architecture ("a") nowhere else.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    number, _, ptx = built.partition("+")
    major, minor = map(int, number.rstrip("af").split("."))
    target = 10 * major + minor
    if target == architecture:
        return True
    if number.endswith("a"):
        return False
    same_major = architecture // 10 == major and architecture >= target
    return (same_major and architecture not in EMBEDDED) or (ptx == "PTX" and architecture >= target)
