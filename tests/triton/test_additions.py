"""Mutations of what the Triton kernels of `contrastive` add to logits and leave out of the sums: each is noticed."""

import importlib

import pytest
import torch

from ssl_kernels.reference.contrastive import contrastive as by_definition
from tests.cuda.queue_push_calls import keys_of
from tests.gpu_emulation import PtxError, emulated_triton
from tests.triton.mutation import load

MUTATIONS = [
    ("common", "excluded = row_ids[:, None] != column_ids", "excluded = row_ids[:, None] == column_ids"),
    ("common", "excluded &= rows[:, None] != columns[None, :]", "excluded &= True"),
    ("common", "LOG2E * tl.load(ptr + index, mask=index < size, other=0.0)",
     "tl.load(ptr + index, mask=index < size, other=0.0)"),
    ("common", "above = logits > along(limit, ACROSS)", "above = logits >= along(limit, ACROSS)"),
    ("common", "        above &= along(exempt, not ACROSS) == 0\n", "        above &= True\n"),
    ("common", "above &= along(index, ACROSS) != along(others, not ACROSS)",
     "above &= along(index, ACROSS) == along(index, ACROSS)"),
    ("common", "logits, logits + along(bias, ACROSS))", "logits, logits - along(bias, ACROSS))"),
]  # fmt: skip


def matches_float64(kernels, rows, columns):
    """Biases, limits, exempt columns and ids of either sense against float64."""
    n, m, square = len(rows), len(rows if columns is None else columns), columns is None
    generator = torch.Generator().manual_seed(n)
    one = torch.tensor(1.0, dtype=torch.float64)
    biases = [torch.randn(count, generator=generator, dtype=torch.float64) for count in (m, n)]
    biases[0][0] = -torch.inf
    limit = torch.full((n,), 0.1, dtype=torch.float64)
    exempt = torch.arange(m) % 4 == 3
    positives = (torch.arange(n) + 2) % m
    ids = torch.arange(n) % 3, None if square else torch.arange(m) % 3
    for marks, only in ((ids, True), (ids, False), ((None, None), False)):
        additions = (biases[0], None if square else biases[1], limit, exempt, only)
        leaves = [
            leaf if leaf is None else leaf.clone().requires_grad_()
            for leaf in (rows, columns, *additions[:2])
        ]
        operands = (one, positives, *marks)
        flags = (True, True, not square, not square)
        exact = by_definition(*leaves[:2], *operands, *flags, *leaves[2:], *additions[2:])
        sums = [each.where(each.isfinite(), 0).sum() for each in exact]
        wanted = torch.autograd.grad(
            sum(sums), [leaf for leaf in leaves if leaf is not None], allow_unused=True
        )
        lse, column_lse, logits, *saved = kernels.contrastive_fwd(
            rows, columns, *operands, *flags, True, True, *additions
        )
        for ours, right in zip((lse, column_lse, logits), exact, strict=True):
            torch.testing.assert_close(ours, right.detach(), rtol=1e-9, atol=1e-9)
        grad_lse, grad_column_lse = (sums.isfinite().double() for sums in (lse, column_lse))
        made = kernels.contrastive_bwd(
            grad_lse, None if square else grad_column_lse, torch.ones_like(logits), rows, columns, *operands, lse,
            column_lse, *saved, *flags, True, not square, *additions, True, not square,
        )  # fmt: skip
        found = [grad for grad, leaf in zip((*made[:2], *made[3:]), leaves, strict=True) if leaf is not None]
        for ours, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def additions_hold(kernels):
    rows = keys_of(6, 8, torch.float64)
    for columns in (None, keys_of(9, 8, torch.float64, seed=1)):
        matches_float64(kernels, rows, columns)
    # Logits 0, 1, 2 and 3: the one at the limit stays, and a limit of NaN is none.
    rows, columns = torch.ones(2, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    columns[:, 0] = logits = torch.arange(4.0, dtype=torch.float64)
    limit = torch.tensor([2.0, torch.nan], dtype=torch.float64)
    operands = (rows, columns, torch.tensor(1.0, dtype=torch.float64), None, None, None)
    lse = kernels.contrastive_fwd(*operands, *[False] * 6, None, None, limit, None, False)[0]
    torch.testing.assert_close(lse, torch.stack((logits[:3].logsumexp(0), logits.logsumexp(0))))


@pytest.mark.slow
def test_additions_hold():
    with emulated_triton(80):
        additions_hold(importlib.import_module("ssl_kernels.triton.contrastive"))


@pytest.mark.slow
@pytest.mark.parametrize("file, old, new", MUTATIONS)
def test_mutation_is_noticed(tmp_path, monkeypatch, file, old, new):
    monkeypatch.syspath_prepend(tmp_path)
    broken = load(tmp_path, "contrastive", file, old, new)
    with emulated_triton(80), pytest.raises((AssertionError, PtxError)):
        additions_hold(broken)
