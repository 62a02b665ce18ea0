"""Losses and gradients of 2, 3 and 4 processes over gloo are those of one on the joined batch."""

from unittest import mock

import pytest
import torch
from torch import distributed as dist

import ssl_kernels
from ssl_kernels import distributed
from ssl_kernels.distributed import groups, operators, pairs, transport
from tests.distributed import cases, processes
from tests.distributed.cases import CASES
from tests.helpers import random_rows

SPLITS = {2: ((4, 4), (5, 2), (0, 5)), 3: ((3, 3, 3), (1, 4, 2), (4, 0, 3)), 4: ((2, 2, 2, 2), (1, 3, 2, 4))}
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def averaged(model, world):
    """What DistributedDataParallel makes of the ranks' gradients."""
    for gradient in cases.gradients(model).values():
        dist.all_reduce(gradient)
        gradient /= world
    return cases.gradients(model)


def check(case, rank, sizes, reduction, expected, **options):
    world = len(sizes)
    loss, model = cases.on_rank(case, rank, sizes, reduction=reduction, **options)
    loss.sum().backward()
    result, gradients = loss.detach(), averaged(model, world)
    value, wanted = expected
    if reduction == "none":
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        value = value.view(case.views, -1)[:, rows].flatten()
        wanted = {name: gradient / world for name, gradient in wanted.items()}
    else:
        dist.all_reduce(result)
        result /= world
    torch.testing.assert_close(result, value, **TIGHT)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


def several_texts(loss, scalars, rank, images, texts, strategy, options):
    """A loss with `image_index`, where each rank has some images and all of their texts."""
    sums = [torch.tensor([0, *counts]).cumsum(0) for counts in (images, texts)]
    x, y = (random_rows(sum(counts), 4, seed=k).double() for k, counts in enumerate((images, texts)))
    everyones = torch.cat(
        [start + torch.arange(t) % max(1, i) for start, i, t in zip(sums[0], images, texts, strict=False)]
    )
    marks = {"image_index": everyones}
    if loss == "clip_loss":
        marks["row_weights"] = torch.linspace(0.5, 1.5, len(y), dtype=torch.float64)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in scalars]
    leaves = [leaf.requires_grad_() for leaf in (x, y, *scalars)]
    expected = getattr(ssl_kernels, loss)(*leaves, **marks, **options)
    wanted = torch.autograd.grad(expected, leaves)
    own = [slice(int(s[rank]), int(s[rank + 1])) for s in sums]
    marks = {name: values[own[1]] for name, values in marks.items()}
    marks["image_index"] = marks["image_index"] - sums[0][rank]
    loss = getattr(distributed, loss)(
        x[own[0]], y[own[1]], *leaves[2:], **marks, strategy=strategy, **options
    )
    for result, expectation in zip(
        (loss.detach(), *torch.autograd.grad(loss, leaves)), (expected.detach(), *wanted), strict=True
    ):
        dist.all_reduce(result)
        torch.testing.assert_close(result / len(images), expectation, **TIGHT)


def symmetric_moco(rank, sizes, strategy, with_queue, with_ids):
    """Two views a rank, one above the other, of which each is held against the keys of the other."""
    world, total = len(sizes), sum(sizes)
    query, key = (random_rows(2 * total, 4, seed=seed).double() for seed in (0, 1))
    own = torch.arange(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = torch.cat((own, own + total))
    options = {"symmetric": True}
    ids = torch.arange(total).repeat(2) % 4 if with_ids else None
    if with_queue:
        options["queue"] = random_rows(5, 4, seed=2).double()
        options |= {"queue_ids": torch.arange(5)} if with_ids else {}
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    query.requires_grad_()
    expected = ssl_kernels.moco_loss(query, key, temperature=temperature, ids=ids, **options)
    wanted = torch.autograd.grad(expected, (query, temperature))
    rows = query.detach()[mine].requires_grad_()
    loss = distributed.moco_loss(
        rows,
        key[mine],
        temperature=temperature,
        ids=None if ids is None else ids[mine],
        strategy=strategy,
        **options,
    )
    by_rows, by_temperature = torch.autograd.grad(loss, (rows, temperature))
    torch.testing.assert_close(by_rows / world, wanted[0][mine], **TIGHT)
    for found, right in ((loss.detach(), expected.detach()), (by_temperature, wanted[1])):
        dist.all_reduce(found)
        torch.testing.assert_close(found / world, right, **TIGHT)


def other_negatives(rank, sizes, strategy):
    """InfoNCE of ranks with other numbers of negatives than of queries, and with ids of paired negatives."""
    world, counts, total = len(sizes), sizes[::-1], sum(sizes)
    own, theirs = (slice(sum(each[:rank]), sum(each[: rank + 1])) for each in (sizes, counts))
    ids, other_ids = torch.arange(total) % 3, torch.arange(3 * total).view(total, 3) % 4
    rows = [random_rows(total, 4, seed=seed).double() for seed in (0, 1)]
    for mode, negatives, key_ids, part in (
        ("unpaired", random_rows(total, 4, seed=2), other_ids[:, 0], theirs),
        ("paired", random_rows(3 * total, 4, seed=2).view(total, 3, 4), other_ids, own),
    ):
        options = {"temperature": 0.3, "negative_mode": mode}
        leaves = [leaf.requires_grad_() for leaf in (*rows, negatives.double())]
        expected = ssl_kernels.info_nce_loss(*leaves, query_ids=ids, key_ids=key_ids, **options)
        wanted = torch.autograd.grad(expected, leaves)
        mine = [x.detach()[rows].requires_grad_() for x, rows in zip(leaves, (own, own, part), strict=True)]
        marks = {"query_ids": ids[own], "key_ids": key_ids[part]}
        for known in ({}, {"check": False, "rows_per_rank": sizes}):
            loss = distributed.info_nce_loss(*mine, **marks, **options, strategy=strategy, **known)
            for found, right, place in zip(
                torch.autograd.grad(loss, mine), wanted, (own, own, part), strict=True
            ):
                torch.testing.assert_close(found / world, right[place], **TIGHT)
            loss = loss.detach()
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / world, expected.detach(), **TIGHT)


def with_nan(rank, sizes, strategy):
    """A row of NaN on one rank: losses are NaN where those of one process are, and so are gradients of triplets."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for case in CASES:
        inputs, values = cases.inputs_of(case, sum(sizes), torch.float64)
        features, scalars = cases.Model(case, torch.float64)(inputs)
        whole = [each.detach().clone() for each in features]
        whole[0][0] = torch.nan
        mine = [each[own].clone() for each in whole]
        for rows in (whole, mine):
            for place, each in enumerate(rows):
                each.requires_grad_(place not in case.frozen)
        plain, over_ranks = getattr(ssl_kernels, case.loss), getattr(distributed, case.loss)
        expected = cases.call(plain, case, lambda _, given=(whole, scalars): given, None, values)
        of_rank = cases.part(values, own)
        loss = cases.call(
            over_ranks, case, lambda _, given=(mine, scalars): given, None, of_rank, strategy=strategy
        )
        options = {**TIGHT, "equal_nan": True, "msg": str(case)}
        if case.loss == "triplet_loss":
            (found,), (wanted,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, whole)
            torch.testing.assert_close(found / len(sizes), wanted[own], **options)
        loss = loss.detach()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / len(sizes), expected.detach(), **options)


def on_the_way(rank, world):
    """Gradients that are added as they travel, as on GPUs."""
    with mock.patch.object(transport.Sum, "on_the_way", lambda part: True):
        for case in CASES:
            if str(case) in ("nt_xent_loss", "info_nce_loss", "siglip_loss"):
                for sizes in SPLITS[world]:
                    check(case, rank, sizes, "mean", cases.plain(case, sum(sizes)), strategy="gather")


def at_the_edges(rank, world):
    """Weights that are all 0, and rows that are the same on all ranks."""
    x, y = (random_rows(3, 4, seed=seed + rank).double().requires_grad_() for seed in (0, 9))
    loss = distributed.clip_loss(x, y, 5.0, row_weights=torch.zeros(3, dtype=torch.float64))
    assert loss == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, (x, y)))
    same = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    for distance in ("euclidean", "cosine"):
        for margin in (0.3, "soft"):
            options = {"margin": margin, "distance": distance}
            loss = distributed.triplet_loss(same, torch.arange(2), **options)
            expected = ssl_kernels.triplet_loss(
                same.repeat(world, 1), torch.arange(2).repeat(world), **options
            )
            torch.testing.assert_close(loss, expected)
            assert torch.autograd.grad(loss, same)[0].isfinite().all()
    # Of equally far rows the first in the global batch.
    labels, rows = torch.tensor([0, 0, 1]), torch.diag(torch.tensor([1.0, 2, 1], dtype=torch.float64))
    everyones = rows.repeat(world, 1).requires_grad_()
    for distance in ("euclidean", "cosine"):
        options = {"margin": 5.0, "distance": distance, "normalize": False}
        expected = ssl_kernels.triplet_loss(everyones, labels.repeat(world), **options)
        wanted = torch.autograd.grad(expected, everyones)[0].chunk(world)[rank]
        for strategy in ("gather", "ring"):
            own = rows.clone().requires_grad_()
            loss = distributed.triplet_loss(own, labels, strategy=strategy, **options)
            torch.testing.assert_close(torch.autograd.grad(loss, own)[0] / world, wanted)


def reduced(rank, world):
    """What a gather returns gradients by on GPUs (on the CPU it is an all-to-all), and log-sum-exps over ranks."""
    name = dist.group.WORLD.group_name
    everyones = torch.stack(
        [torch.tensor([r, -torch.inf, 1000.0 * r, r or -torch.inf]) for r in range(world)]
    )
    torch.testing.assert_close(groups.all_reduce_lse(everyones[rank], name), everyones.logsumexp(0))
    for sizes in SPLITS[world]:
        x = [random_rows(sum(sizes), 3, seed=seed) for seed in range(world)]
        started = groups.start_reduce_scatter(x[rank], sizes, name)
        torch.testing.assert_close(groups.wait(started)[: sizes[rank]], sum(x).split(sizes)[rank])


def every_case(rank, world):
    reduced(rank, world)
    on_the_way(rank, world)
    at_the_edges(rank, world)
    failures = []
    for strategy in ("gather", "ring"):
        other_negatives(rank, SPLITS[world][1], strategy)
        with_nan(rank, SPLITS[world][1], strategy)
        for with_queue, with_ids in ((False, False), (False, True), (True, False), (True, True)):
            symmetric_moco(rank, SPLITS[world][1], strategy, with_queue, with_ids)
        for loss, scalars, options in (
            ("clip_loss", (4.0,), {}),
            ("clip_loss", (4.0,), {"label_smoothing": 0.1}),
            ("siglip_loss", (4.0, -2.0), {}),
        ):
            several_texts(loss, scalars, rank, (3, 2, 1, 0)[:world], (5, 2, 0, 0)[:world], strategy, options)
    for case in CASES:
        for sizes in SPLITS[world]:
            for reduction in ("mean", "sum", "none") if sizes == SPLITS[world][1] else ("mean",):
                expected = cases.plain(case, sum(sizes), reduction=reduction)
                for strategy in ("gather", "ring"):
                    try:
                        check(case, rank, sizes, reduction, expected, strategy=strategy)
                    except Exception as error:
                        failures.append(f"{case}, {strategy}, {sizes}, {reduction}: {str(error)[:600]}")
    return failures


@pytest.mark.parametrize(
    "world", [pytest.param(world, marks=pytest.mark.slow) if world == 4 else world for world in SPLITS]
)
def test_every_loss_is_that_of_one_process_on_the_joined_batch(world):
    for failures in processes.run(world, every_case):
        assert not failures, "\n".join(failures[:5])


def test_a_log_sum_exp_that_was_made_elsewhere_has_one_derivative():
    rows, expectation = random_rows(3, 4).requires_grad_(), random_rows(3, 4, seed=1)
    made = torch.arange(3.0, dtype=torch.float64)
    lse = pairs.log_sums_with_expectation(rows, made, expectation)
    (gradient,) = torch.autograd.grad(lse.square().sum() / 2, rows, create_graph=True)
    assert torch.equal(lse, made) and torch.equal(gradient, made[:, None].float() * expectation)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_expectation_of_a_kernel_that_keeps_none_is_made_by_its_backward(monkeypatch, dtype):
    """Triton's kernels of rows over 256 wide keep none."""
    rows, columns = random_rows(5, 6).to(dtype), random_rows(7, 6, seed=1).to(dtype)
    scale = torch.tensor(4.0, dtype=dtype)
    lse, expectation = operators.frozen_fwd("native", rows, columns, scale, (True, False))
    forward = operators.contrastive_fwd

    def keeping_nothing(*args, **options):
        *results, kept = forward(*args, **options)
        return *results, kept.new_empty(0)

    monkeypatch.setattr(operators, "contrastive_fwd", keeping_nothing)
    again = operators.frozen_fwd("native", rows, columns, scale, (True, False))
    torch.testing.assert_close(again[0], lse)
    torch.testing.assert_close(again[1], expectation)
