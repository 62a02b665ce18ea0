"""Mutations of what the Triton kernels of `contrastive` add to logits and leave out of the sums: each is noticed."""

import importlib

import pytest
import torch

from tests.gpu_emulation import PtxError, emulated_triton
from tests.support.contrastive import random_call
from tests.triton.contrastive_calls import check
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


def additions_hold(kernels):
    for m in (None, 15):
        for ids, only in ((3, " only"), (3, ""), (0, "")):
            call = random_call(
                12, m, 8, torch.float64, ids=ids, both_directions=m is not None, keep_diagonal=m is not None,
                additions="bias padding limit exempt" + only,
            )  # fmt: skip
            check(call, kernels=kernels)
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
