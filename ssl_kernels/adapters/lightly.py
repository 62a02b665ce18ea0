"""lightly's contrastive losses and memory bank (lightly 1.6). Losses come back as float32 (float64 for float64)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssl_kernels.adapters._gather import gather_constant, gather_rows, rank, world_size
from ssl_kernels.adapters._shared import (
    Closed,
    LibraryMethod,
    is_plain_cross_entropy,
    mean,
    minus_mean_cosine,
    original,
    scale_of,
)
from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import DTYPES
from ssl_kernels.losses import dcl_loss, nt_xent_loss
from ssl_kernels.losses._shared import (
    as_operand,
    checked_rows,
    loss_beside,
    reduce,
    rows_for_several,
    stacked,
    widest_under_autocast,
)
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.row_pairs import row_pairs

__all__ = ["DCLLoss", "DCLWLoss", "MemoryBankModule", "NTXentLoss", "NegativeCosineSimilarity"]
ORIGINALS = {
    "NTXentLoss": "lightly.loss.ntx_ent_loss",
    "DCLLoss": "lightly.loss.dcl_loss",
    "DCLWLoss": "lightly.loss.dcl_loss",
    "NegativeCosineSimilarity": "lightly.loss.negative_cosine_similarity",
    "MemoryBankModule": "lightly.models.modules.memory_bank",
}
HOME = "lightly.loss"  # where `patch` looks for losses without an adapter
DIFFERENCES = {
    "NTXentLoss": "the bank keeps rows that wrap (`strict=True` loses them); a `cross_entropy` of another kind runs"
    " lightly's own code, with a warning",
    "DCLLoss": "one sample raises (lightly: −inf)",
    "DCLWLoss": "gathered: weights from all processes' rows (`strict=True`: from each one's own)",
    "NegativeCosineSimilarity": "rows shorter than 1e-8 keep their direction (`strict=True`: fade to 0)",
    "MemoryBankModule": "rows that wrap are kept (`strict=True` loses them)",
}


class MemoryBankModule(nn.Module):
    """`lightly.models.modules.memory_bank.MemoryBankModule`: a ring of rows, random unit rows at first.

    Unlike lightly's, the ring wraps: rows that do not fit before its end go to its beginning, and of a batch longer
    than the ring the last rows stay. lightly drops them; `strict=True` does so too.

    Args:
        size: (K, D), or 0 for none.
        gather_distributed: Store the rows of all processes.
        feature_dim_first: Hand the bank out as (D, K).
        strict: Drop the rows that lightly drops.

    Raises:
        ValueError: A size of another form, as in lightly.
    """

    strict = False  # of an object that was pickled as lightly's

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__()
        shape = (size,) if isinstance(size, int) else tuple(size)
        if any(extent < 0 for extent in shape):
            raise ValueError(f"MemoryBankModule: size must not be negative, got {size}")
        if shape != (0,) and (isinstance(size, int) or len(shape) != 2):
            raise ValueError(f"MemoryBankModule: size must be (rows, width) or 0, got {size}")
        self.size = shape
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.strict = strict
        self.register_buffer("bank", torch.empty(shape), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)
        if len(shape) == 2:
            self._init_memory_bank(shape)

    def forward(self, output: torch.Tensor, labels: torch.Tensor | None = None, update: bool = False) -> Any:
        """(output, the bank before this call), or (output, None) without a bank; `update` stores output's rows."""
        if self.size[0] == 0:
            return output, None
        bank = self.bank.clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    @torch.no_grad()
    def _init_memory_bank(self, size):
        self.bank = F.normalize(torch.randn(size).type_as(self.bank), dim=-1)
        self.bank_ptr = torch.zeros_like(self.bank_ptr)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch):
        if self.gather_distributed:
            batch = gather_constant(batch)
        rows, size = batch.detach(), self.size[0]
        if self.strict:
            rows = rows[: size - int(self.bank_ptr)]
        skipped = max(0, len(rows) - size)
        slots = torch.arange(skipped, len(rows), device=self.bank.device).add_(self.bank_ptr).remainder_(size)
        self.bank.index_copy_(0, slots, rows[skipped:].to(self.bank))
        self.bank_ptr.add_(len(rows)).remainder_(size)


def _check_gather(name, gather_distributed):
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError(f"{name}: gather_distributed must be False where torch.distributed is not built")


class NTXentLoss(nn.Module):
    """`lightly.loss.NTXentLoss`: `nt_xent_loss`, or with a memory bank InfoNCE of out0 against the bank.

    The bank's rows that lightly loses where its ring ends are kept (`MemoryBankModule`). As in lightly the
    negatives are the bank before the batch, which is stored if out0 requires a gradient, and out1 gets its own.
    Another `cross_entropy` than the mean, sum or list of the rows' losses, or another `memory_bank` than of its class,
    runs lightly's own code, with a warning.

    Args:
        temperature: > 0.
        memory_bank_size: (K, D), or 0 for none.
        gather_distributed: The views of all processes are the negatives; the mean of the processes' losses is the
            loss of one, and so is DDP's averaged gradient. With a bank: they are stored.
        strict: Lose the rows of the bank that lightly loses.

    Raises:
        ValueError: temperature is within 1e-8 of 0; at the call, it is < 0, which lightly computes with.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, strict=strict)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"NTXentLoss: |temperature| must be at least 1e-8, got {temperature}")
        _check_gather("NTXentLoss", gather_distributed)

    def forward(self, out0: torch.Tensor, out1: torch.Tensor) -> torch.Tensor:
        """The mean loss of (B, D) embeddings of two views."""
        memory_bank, cross_entropy = self.memory_bank, self.cross_entropy
        if type(memory_bank) is not MemoryBankModule or not _only_reduces(cross_entropy):
            why = "NTXentLoss: a cross_entropy or memory_bank of another kind"
            return original("lightly.loss.ntx_ent_loss", "NTXentLoss", why).forward(self, out0, out1)
        reduction = cross_entropy.reduction
        if memory_bank.size[0]:
            return self._against_bank(out0, out1, reduction)
        if self.gather_distributed and world_size() > 1:
            return _gathered_nt_xent(out0, out1, self.temperature, reduction)
        return nt_xent_loss(out0, out1, self.temperature, reduction=reduction)

    def _against_bank(self, out0, out1, reduction):
        bank = self.memory_bank.bank.to(out0.device)
        update = torch.is_grad_enabled() and out0.requires_grad
        if update and choose_backend("contrastive", None, "NTXentLoss", out0, bank) not in (
            "native",
            "chunked",
        ):
            bank = bank.clone()  # backward reads it again
        loss = _beside_bank(out0, out1, bank, self.temperature, reduction)
        if update:
            self.memory_bank._dequeue_and_enqueue(F.normalize(out1.detach(), dim=1))
        return loss


def _only_reduces(cross_entropy):
    plain = is_plain_cross_entropy(cross_entropy) and cross_entropy.ignore_index < 0
    return plain and cross_entropy.weight is None and cross_entropy.label_smoothing == 0


def _beside_bank(out0, out1, bank, temperature, reduction):
    """InfoNCE of out0's rows, whose negatives are the bank's rows as they are."""
    out0, out1, bank = checked_rows("NTXentLoss", 2, out0=out0, out1=out1, memory_bank=bank)
    scale = scale_of("NTXentLoss", temperature, out0)
    out0, out1 = (rows_for_several(rows, None, "NTXentLoss") for rows in (out0, out1))
    products = row_pairs(out0, out1, normalize=True, measure="product", caller="NTXentLoss")
    bank = bank.to(out0.dtype)
    lse = contrastive(out0, bank, scale, normalize_columns=False, caller="NTXentLoss").lse
    return loss_beside(products, scale, lse, reduction, out0, backend=None, caller="NTXentLoss")


def _gathered_nt_xent(out0, out1, temperature, reduction):
    views = stacked(*checked_rows("NTXentLoss", 2, out0=out0, out1=out1))
    n = len(views)  # 2B
    own = torch.arange(n, device=views.device) + rank() * n
    lse, _, positive = contrastive(
        views,
        gather_rows(views),
        scale_of("NTXentLoss", temperature, views),
        positives=own.roll(n // 2),
        row_ids=own,
        column_ids=torch.arange(n * world_size(), device=views.device),
        caller="NTXentLoss",
    )
    return reduce(lse - positive, reduction, views)


def negative_mises_fisher_weights(out0, out1, sigma=0.5):
    """Weights of `DCLWLoss` for unit rows, (B,): 2 − B · softmax(<out0_i, out1_i> / sigma), without a gradient."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * F.softmax(similarity, dim=0)


class DCLLoss(Closed, nn.Module):
    """`lightly.loss.DCLLoss`: `dcl_loss`, with a weight for each positive.

    B = 1, for which lightly's is −inf, raises ValueError.

    Args:
        temperature: > 0.
        weight_fn: Called with the unit rows (out0, out1) and (out1, out0); its (B,) weights scale the positives.
        gather_distributed: The views of all processes are the negatives.
    """

    _loss = LibraryMethod()

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        weight_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_gather(type(self).__name__, gather_distributed)

    def forward(self, out0: torch.Tensor, out1: torch.Tensor) -> torch.Tensor:
        """The mean loss of (B, D) embeddings of two views."""
        if self.gather_distributed and world_size() > 1:
            loss = _gathered_dcl(out0, out1, self.temperature)
        else:
            loss = dcl_loss(out0, out1, self.temperature)
        if not self.weight_fn:
            return loss
        acc = accumulation_dtype(out0)
        out0, out1 = (F.normalize(out.to(acc), dim=1) for out in (out0, out1))
        share = 2 - self._weights(out0, out1) - self._weights(out1, out0)
        return loss + ((out0 * out1).sum(1) * share).mean() / (2 * as_operand(self.temperature, out0))

    def _weights(self, out0, out1):
        return self.weight_fn(out0, out1)


def _gathered_dcl(out0, out1, temperature):
    views = stacked(*checked_rows("DCLLoss", 2, out0=out0, out1=out1))
    n, world = len(views), world_size()
    samples = torch.arange(n // 2 * world, device=views.device).view(world, 1, -1).expand(-1, 2, -1)
    lse, _, positive = contrastive(
        views,
        gather_rows(views),
        scale_of("DCLLoss", temperature, views),
        positives=(torch.arange(n, device=views.device) + rank() * n).roll(n // 2),
        row_ids=samples[rank()].reshape(-1),
        column_ids=samples.reshape(-1),
        caller="DCLLoss",
    )
    return mean(lse - positive, views)


class DCLWLoss(DCLLoss):
    """`lightly.loss.DCLWLoss`: DCL with `negative_mises_fisher_weights`.

    With gather_distributed, lightly takes the weights' softmax over each process's own rows, which is another loss
    than that of one process; here it is over all rows. `strict=True` does as lightly.

    Args:
        temperature: > 0.
        sigma: > 0; scales the similarities that the weights are made of.
        gather_distributed: The views of all processes are the negatives.
        strict: Weights from the process's own rows.
    """

    strict = False

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)
        self.strict = strict

    def _weights(self, out0, out1):
        if self.strict or not self.gather_distributed or world_size() == 1:
            return self.weight_fn(out0, out1)
        rows = (gather_constant(out.detach()) for out in (out0, out1))
        return self.weight_fn(*rows).chunk(world_size())[rank()]


class NegativeCosineSimilarity(nn.Module):
    """`lightly.loss.NegativeCosineSimilarity`: minus the mean cosine, with gradients to both sides.

    Rows shorter than 1e-8 have their true cosine; lightly's goes to 0 with their length. Other dim or eps, more
    dimensions and shapes that broadcast are left to `F.cosine_similarity`.

    Args:
        dim, eps: As `nn.CosineSimilarity`.
        strict: `F.cosine_similarity` always.
    """

    strict = False

    def __init__(self, dim: int = 1, eps: float = 1e-8, *, strict: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.strict = strict

    def forward(self, x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        """The mean over all pairs of vectors."""
        x0, x1 = widest_under_autocast(x0, x1)
        paired = x0.dim() == 2 and x0.shape == x1.shape and x0.dtype == x1.dtype in DTYPES and x0.numel()
        if paired and self.dim in (1, -1) and self.eps == 1e-8 and not self.strict:
            return minus_mean_cosine(x0, x1, "NegativeCosineSimilarity")
        return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()
