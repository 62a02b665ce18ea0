"""Losses where they are used: under DistributedDataParallel and fully_shard, in sub-groups, compiled, in autocast."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ssl_kernels
from ssl_kernels import distributed
from ssl_kernels.distributed.marked_mean import marked_mean
from ssl_kernels.distributed.pairs import Setting
from tests.distributed import cases, processes
from tests.distributed.cases import CASES
from tests.distributed.test_losses import TIGHT
from tests.helpers import random_rows, same_bits

SIZES = {2: (5, 2), 3: (4, 0, 3), 4: (2, 1, 0, 4)}
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.06, 0.02)}


def data_parallel(case, mesh):
    model = cases.Model(case, torch.float64)
    return nn.parallel.DistributedDataParallel(model), model


def sharded(case, mesh):
    model = cases.Model(case, torch.float64)
    for tower in model.towers:
        fully_shard(tower, mesh=mesh)
    return fully_shard(model, mesh=mesh), model


def full(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def compare(case, wrapped, model, rank, sizes, expected, accumulate=1, **options):
    for _ in range(accumulate):
        loss, _ = cases.on_rank(case, rank, sizes, wrapped, **options)
        (loss / accumulate).backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / len(sizes), expected[0], **TIGHT)
    for name, gradient in cases.gradients(model).items():
        torch.testing.assert_close(full(gradient), expected[1][name], **TIGHT)


def in_training(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    failures = []
    for case in CASES:
        expected = cases.plain(case, sum(SIZES[world]))
        for wrap in (data_parallel, sharded):
            for strategy in ("gather", "ring"):
                try:
                    wrapped, model = wrap(case, mesh)
                    compare(case, wrapped, model, rank, SIZES[world], expected, strategy=strategy)
                except Exception as error:
                    failures.append(f"{case}, {strategy}, {wrap.__name__}: {str(error)[:600]}")
    return failures


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_parameter_gets_its_gradient_of_the_global_loss(world):
    for failures in processes.run(world, in_training):
        assert not failures, "\n".join(failures[:5])


def in_sub_groups(rank, world):
    """Ranks 0 and 2, and 1 and 3, are worlds of their own; a mesh names them as well."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("in_group", "across"))
    place, which = divmod(rank, 2)
    for case in (
        CASES[0],
        cases.Case("clip_loss", 2, (5.0,)),
        cases.Case("triplet_loss", 1, (0.4,), ("labels",)),
    ):
        for group in (groups[which], mesh["in_group"]):
            sizes = (3, 4) if which else (4, 2)
            expected = cases.plain(case, sum(sizes))
            for strategy in ("gather", "ring"):
                model = cases.Model(case, torch.float64)
                process_group = groups[which]
                wrapped = nn.parallel.DistributedDataParallel(model, process_group=process_group)
                loss, _ = cases.on_rank(case, place, sizes, wrapped, group=group, strategy=strategy)
                loss.backward()
                loss = loss.detach()
                dist.all_reduce(loss, group=process_group)
                torch.testing.assert_close(loss / 2, expected[0], **TIGHT)
                for name, gradient in cases.gradients(model).items():
                    torch.testing.assert_close(gradient, expected[1][name], **TIGHT)
    x = random_rows(4, 3)
    module = distributed.NTXentLoss(0.2, group=groups[which])
    twin = copy.deepcopy(nn.ModuleList([module]))[0]  # in a model, as averages of weights copy it
    assert twin is not module
    assert same_bits(module(x, x).detach(), twin(x, x).detach())
    try:
        distributed.nt_xent_loss(random_rows(2, 3), random_rows(2, 3), group=groups[1 - which])
    except ValueError as error:
        return str(error)


def test_a_sub_group_is_a_world_of_its_own():
    assert set(processes.run(4, in_sub_groups)) == {
        "nt_xent_loss: group must contain this rank, got a group of others"
    }


def in_other_ways(rank, world):
    """Half precision, autocast, accumulation, modules, no gradients, torch.compile."""
    sizes = SIZES[world]
    case = CASES[0]
    for dtype, (rtol, atol) in TOLERANCES.items():
        for case in CASES:
            expected = cases.plain(case, sum(sizes), dtype)
            for strategy in ("gather", "ring"):
                loss, model = cases.on_rank(case, rank, sizes, dtype=dtype, strategy=strategy)
                assert loss.dtype == torch.float32
                loss.backward()
                loss = loss.detach()
                dist.all_reduce(loss)
                torch.testing.assert_close(loss / world, expected[0], rtol=rtol, atol=atol, msg=f"{case}")
                if dtype == torch.float32:
                    for name, gradient in cases.gradients(model).items():
                        dist.all_reduce(gradient)
                        torch.testing.assert_close(
                            gradient / world, expected[1][name], rtol=2e-3, atol=1e-4, msg=f"{case} {name}"
                        )

    # Accumulated: two halves of the gradient under no_sync are the whole.
    case = CASES[0]
    expected = cases.plain(case, sum(sizes))
    wrapped, model = data_parallel(case, None)
    with wrapped.no_sync():
        loss, _ = cases.on_rank(case, rank, sizes, wrapped)
        (loss / 2).backward()
    loss, _ = cases.on_rank(case, rank, sizes, wrapped)
    (loss / 2).backward()
    for name, gradient in cases.gradients(model).items():
        torch.testing.assert_close(gradient, expected[1][name], **TIGHT)

    x, y = (random_rows(6, 4, seed=seed).chunk(2)[rank].requires_grad_() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = distributed.nt_xent_loss(x.bfloat16(), y, strategy="ring")
        assert narrow.dtype == torch.float32
        clip = distributed.clip_loss(x, y.bfloat16(), 5.0, label_smoothing=0.1)
    (narrow + clip).backward()
    with torch.no_grad():
        same = distributed.NTXentLoss(0.2, strategy="ring")(x, y)
    assert not same.requires_grad
    assert same_bits(same, distributed.nt_xent_loss(x, y, 0.2, strategy="ring").detach())
    assert same_bits(same, distributed.nt_xent_loss(x, y, 0.2, strategy="ring", check=False).detach())
    known = distributed.nt_xent_loss(x, y, 0.2, strategy="ring", check=False, rows_per_rank=[3, 3])
    assert same_bits(same, known.detach())
    some = [rows[: 3 - 3 * rank] for rows in (x, y)]
    known = distributed.nt_xent_loss(*some, 0.2, check=False, rows_per_rank=[3, 0])
    assert same_bits(known.detach(), distributed.nt_xent_loss(*some, 0.2).detach())
    weights = torch.ones(2 * len(x))
    assert same_bits(
        distributed.NTXentLoss(0.2)(x, y, row_weights=weights).detach(),
        distributed.nt_xent_loss(x, y, 0.2, row_weights=weights).detach(),
    )
    for case in CASES:
        loss, model = cases.on_rank(case, rank, sizes, dtype=torch.float32)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        wanted = torch.autograd.grad(loss, learned, create_graph=True)
        several = torch.tensor([1.0, -2.0], dtype=loss.dtype)
        batch = torch.autograd.grad(loss, learned, several, retain_graph=True, is_grads_batched=True)
        for ours, one in zip(batch, wanted, strict=True):
            torch.testing.assert_close(ours, torch.stack((one, -2 * one)), msg=str(case))
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(sum(each.square().sum() for each in wanted), learned, allow_unused=True)

        def embed(inputs, model=model):
            with torch.autocast("cpu", enabled=False):
                return model(inputs)

        with torch.autocast("cpu", dtype=torch.bfloat16):  # of float32 rows a loss is as without
            again, _ = cases.on_rank(case, rank, sizes, embed, torch.float32)
        assert same_bits(again.detach(), loss.detach()), str(case)
        assert all(map(same_bits, torch.autograd.grad(again, learned), wanted)), str(case)
    # Negatives that bfloat16 cannot tell apart.
    near, labels = torch.tensor([[1.0, 1.0], [1.0, 0.001], [1.0, 0.003]]), torch.tensor([0, 1, 1])
    options = {"margin": 3.0, "distance": "cosine", "normalize": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distributed.triplet_loss(near, labels, **options)
    wanted = ssl_kernels.triplet_loss(near.repeat(world, 1), labels.repeat(world), **options)
    torch.testing.assert_close(found, wanted)
    # In `sup_con_loss` it comes with sums that raise.
    setting = Setting("native", True, "gather", rank, world, dist.group.WORLD.group_name)
    mean, _ = marked_mean(x, torch.ones(3, 6, dtype=torch.bool), setting, (3, 3))
    (gradient,) = torch.autograd.grad(mean.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()

    plain = distributed.nt_xent_loss(x, y, 0.2, strategy="gather")
    (wanted,) = torch.autograd.grad(plain, x)
    # Dynamo of torch 2.11 stops at an autograd.Function whose rows became a symbol and a constant again.
    dynamic = False if torch.__version__ < torch.torch_version.TorchVersion("2.12") else None
    compiled = torch.compile(distributed.nt_xent_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    loss = compiled(x, y, 0.2, strategy="gather")
    assert same_bits(loss.detach(), plain.detach())
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)
    few = [rows[: 3 - rank] for rows in (x, y)]
    plain = distributed.nt_xent_loss(*few, 0.2, strategy="gather")
    (wanted,) = torch.autograd.grad(plain, x)
    loss = compiled(*few, 0.2, strategy="gather", rows_per_rank=[3, 2])
    assert same_bits(loss.detach(), plain.detach())
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)
    with pytest.raises(RuntimeError, match="nt_xent_loss: rows_per_rank must be what the ranks have"):
        compiled(*few, 0.2, strategy="gather")
    around = torch.compile(
        lambda x, y: distributed.nt_xent_loss(x, y, 0.2, strategy="ring"), backend="aot_eager"
    )
    plain = distributed.nt_xent_loss(x, y, 0.2, strategy="ring")
    (wanted,) = torch.autograd.grad(plain, x)
    loss = around(x, y)
    assert same_bits(loss.detach(), plain.detach())
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)


def test_half_precision_autocast_accumulation_modules_and_compile():
    processes.run(2, in_other_ways)


def alone(rank, world):
    for case in CASES:
        plain, gradients = cases.plain(case, 7)
        for strategy in (None, "ring"):
            loss, model = cases.on_rank(case, rank, (7,), strategy=strategy)
            loss.backward()
            assert same_bits(loss.detach(), plain), str(case)
            for name, gradient in cases.gradients(model).items():
                assert same_bits(gradient, gradients[name]), f"{case} {name}"
    # Large enough that a ring keeps less than the plain function.
    x, y = (random_rows(1500, 64, seed=seed).requires_grad_() for seed in (0, 1))
    results = [
        torch.autograd.grad(loss(x, y), (x, y))
        for loss in (ssl_kernels.nt_xent_loss, distributed.NTXentLoss(strategy="ring"))
    ]
    assert all(map(same_bits, *results))


def test_one_process_is_the_plain_function_bit_for_bit():
    processes.run(1, alone)


TORCHRUN = """
import torch
from torch import distributed as dist
from ssl_kernels import distributed

dist.init_process_group("gloo")
x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
loss = distributed.nt_xent_loss(x[own], y[own])
dist.all_reduce(loss)
if dist.get_rank() == 0:
    print(repr(loss.item() / 2))
dist.destroy_process_group()
"""


@pytest.mark.slow  # a launcher and two processes that import torch
def test_started_by_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TORCHRUN)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = ssl_kernels.nt_xent_loss(x, y).item()
    assert float(run.stdout.strip().splitlines()[-1]) == pytest.approx(expected, rel=1e-12)


CLIP = cases.Case("clip_loss", 2, (5.0,))


def grad_cached(rank, world):
    """Ranks with 3, 2 and (without rows) 1 mini-batches: one average of gradients per step, those of one process."""
    sizes = (5, 3, 0)[:world]
    expected = cases.plain(CLIP, sum(sizes))
    start = sum(sizes[:rank])
    inputs, _ = cases.inputs_of(CLIP, sum(sizes), torch.float64)
    inputs = [x[start : start + sizes[rank]] for x in inputs]
    mesh = init_device_mesh("cpu", (world,))
    averages = []

    def count(state, bucket):
        averages.append(1)
        future = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def loss(embedded):
        features, (scale,) = embedded
        return distributed.clip_loss(*features, scale)

    def towers_loss(x, y):
        return distributed.clip_loss(x, y, towers.scalars[0])

    towers = cases.Model(CLIP, torch.float64)
    whole, model = data_parallel(CLIP, mesh)
    whole.register_comm_hook(None, count)
    apart = [nn.parallel.DistributedDataParallel(tower) for tower in towers.towers]
    for step in range(2):
        del averages[:]
        model.zero_grad()
        towers.zero_grad()
        value = ssl_kernels.grad_cache(loss, whole, (inputs,), 2)
        assert len(averages) == 1, f"{len(averages)} averages at step {step}"
        other = ssl_kernels.grad_cache(towers_loss, apart, inputs, 2)
        dist.all_reduce(value)
        dist.all_reduce(other)
        torch.testing.assert_close(value / world, expected[0], **TIGHT)
        torch.testing.assert_close(other / world, expected[0], **TIGHT)
        for name, gradient in cases.gradients(model).items():
            torch.testing.assert_close(gradient, expected[1][name], **TIGHT)
        for name, gradient in cases.gradients(towers).items():
            if name.startswith("towers"):  # the scale is in no DistributedDataParallel
                torch.testing.assert_close(gradient, expected[1][name], **TIGHT)

    # Sharded, ranks need as many mini-batches. Two steps that are synchronised once are twice the gradient.
    wrapped, model = sharded(CLIP, mesh)
    expected = cases.plain(CLIP, 3 * world)
    inputs = [x[3 * rank : 3 * rank + 3] for x in cases.inputs_of(CLIP, 3 * world, torch.float64)[0]]
    for sync in (False, True):
        ssl_kernels.grad_cache(loss, wrapped, (inputs,), 2, sync=sync)
    for name, gradient in cases.gradients(model).items():
        torch.testing.assert_close(full(gradient), 2 * expected[1][name], **TIGHT)


@pytest.mark.parametrize("world", [2, 3])
def test_grad_cache_averages_once_whatever_the_number_of_mini_batches(world):
    processes.run(world, grad_cached)
