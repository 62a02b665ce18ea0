"""Rows that cannot be read in whole sectors are copied where there are many: the same numbers, fewer instructions."""

import pytest
import torch

from ssl_kernels.triton import batch_hard, contrastive, launch, sigmoid_pairs
from tests.support.batch_hard import check_choice, labels_of
from tests.support.contrastive import random_call
from tests.support.sigmoid_pairs import random_call as random_pairs
from tests.triton.contrastive_calls import backward, case, forward, run
from tests.triton.test_sigmoid_pairs import check as check_pairs

CASES = [
    case(33, None, 24, torch.bfloat16),
    case(17, 35, 129, torch.float16, both_directions=True),
    case(17, 35, 100, torch.bfloat16, expectation=True, positives=2),
]


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(launch, "ALIGNED_FROM", 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contrastive(gpu, always, case):
    with gpu.triton():
        case.check(gpu.device)
        found = run(case.call(gpu.device), case.expectation)
    assert found["grad_rows"].shape == case.call(gpu.device).rows.shape and found["grad_rows"].is_contiguous()


def test_what_is_kept_has_the_width_of_the_rows(gpu, always):
    call = random_call(17, 35, 100, torch.bfloat16, positives=0, device=gpu.device)
    with gpu.triton():
        kept = forward(call, expectation=True)[5]
    assert kept.shape == (17, 100) and kept.is_contiguous()


def test_sigmoid_pairs(gpu, always):
    with gpu.triton():
        check_pairs(random_pairs(17, 33, 130, torch.float16, device=gpu.device))


def test_batch_hard(gpu, always):
    x = torch.randn(40, 21, generator=torch.Generator().manual_seed(0)).bfloat16().to(gpu.device)
    labels = labels_of(40, 5).to(gpu.device)
    with gpu.triton():
        check_choice(batch_hard.batch_hard(x, labels, True, "euclidean"), x, labels, True, "euclidean")


def test_instructions_are_those_of_padded_rows(gpu, monkeypatch):
    """Forward and backward: of rows that are padded beforehand, and fewer than without."""
    if not gpu.emulated:
        pytest.skip("a card has no counters to give")

    def instructions(call):
        with gpu.triton() as launches:
            backward(call, forward(call))
        stems = ("contrastive_fwd", "contrastive_bwd", "contrastive_coef")
        return sum(one.counters.instructions for one in launches if one.kernel.startswith(stems))

    call = random_call(64, None, 40, torch.bfloat16)
    padded = call.replace(rows=torch.nn.functional.pad(call.rows, (0, 8)))
    without = instructions(call)
    monkeypatch.setattr(launch, "ALIGNED_FROM", 64 * 64)
    assert instructions(call) == instructions(padded) < 0.8 * without


def test_which_rows_are_copied():
    """From `entries` on: those of another width, stride or address than the multiples of 16 that they then have."""
    memory = torch.arange(40 * 64, dtype=torch.float32).view(40, 64)
    for rows, is_copied in (
        (memory, False),
        (memory[:, :48], False),
        (memory[::2], False),
        (memory[:, 4:52], False),  # 16 bytes on
        (memory[:, 1:49], True),
        (memory[:, :20], True),
        (memory.T[:32, :32], True),
        (memory.flatten()[: 32 * 40].as_strided((32, 32), (40, 1)), True),
    ):
        assert launch.aligned(rows, launch.ALIGNED_FROM - 1) is rows
        found = launch.aligned(rows, launch.ALIGNED_FROM)
        assert (found is not rows) == is_copied == (launch.aligned(rows, 1, whole=True) is not rows)
        d = rows.shape[1]
        assert torch.equal(found[:, :d], rows) and (found[:, d:] == 0).all()
        assert found.shape[1] % 16 == 0 and found.stride(0) % 16 == 0 and found.data_ptr() % 16 == 0
        gradient = launch.cut(found, d)
        assert torch.equal(gradient, rows) and (gradient.is_contiguous() or d == found.shape[1])


def test_the_size_of_a_call_is_that_of_its_logits(gpu, monkeypatch):
    """Where a kernel holds the expectation beside whole rows, they are copied whatever it is."""
    seen = []

    def stop(x, *entries):
        seen.append((x.shape, *entries))
        raise ZeroDivisionError

    for module in (contrastive, sigmoid_pairs):
        monkeypatch.setattr(module, "aligned", stop)
    for d in (3, 257):
        for options in ({}, {"expectation": True}):
            with pytest.raises(ZeroDivisionError):
                forward(random_call(5, 7, d), **options)
    for d in (3, 129):
        call = random_pairs(5, 7, d, torch.bfloat16, device=gpu.device)
        with gpu.triton(), pytest.raises(ZeroDivisionError):
            sigmoid_pairs.sigmoid_pairs_fwd(*call.operands, False, True, True, True, *call.marks)
    assert seen == [
        ((5, 3), 35, False),
        ((5, 3), 35, True),
        ((5, 257), 35, False),
        ((5, 257), 35, False),
        ((5, 3), 35, True),
        ((5, 129), 35, False),
    ]
