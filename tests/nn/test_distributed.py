"""Averages and learned scalars under DistributedDataParallel and fully_shard, with two processes over gloo."""

import copy
import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ssl_kernels
from ssl_kernels.nn import MoCoQueue, MomentumEncoder
from tests.helpers import random_rows, same_bits

WORLD = 2
FULL = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """A query encoder and its average, as a recipe holds them."""

    def __init__(self, query, momentum=0.9):
        super().__init__()
        self.query = query
        self.key = MomentumEncoder(query, momentum, steps=20)

    def forward(self, rows, update=False):
        if update:
            self.key.update_(self.query)
        return self.query(rows), self.key(rows)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(dtype)


def shard(module, mesh):
    fully_shard(module[0], mesh=mesh)
    return fully_shard(module, mesh=mesh)


def grown(*groups):
    with torch.no_grad():
        for parameters in groups:
            for parameter in parameters:
                parameter.mul_(1.1)


def whole(module):
    state = module.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(same_bits(first[k], second[k]) for k in first)


def update_sharded(mesh, dtype, how, rows):
    """After forwards with and without gradients and before backward: state and features are those of a plain run."""
    query = network(dtype)
    sharded, unsharded = Model(query), Model(copy.deepcopy(query))
    if how in ("both", "query"):
        shard(sharded.query, mesh)
    if how in ("both", "average"):
        shard(sharded.key.module, mesh)
    if how == "encoder":
        shard(sharded.query, mesh)
        fully_shard(sharded.key, mesh=mesh)
    if how == "model":
        fully_shard(sharded, mesh=mesh)
    weights = [[p for p in model.parameters() if p.requires_grad] for model in (sharded, unsharded)]
    for _ in range(3):
        grown(*weights)
        for model in (sharded, unsharded):
            loss = model(rows)[0].float().square().sum()
            if how != "model":
                model.key.update_(model.query)
            loss.backward()
            with torch.no_grad():
                model(rows)  # leaves the root gathered
            model.key.update_(model.query)
    with torch.no_grad():
        torch.testing.assert_close(sharded(rows)[1], unsharded(rows)[1], rtol=0, atol=0)
    state = whole(sharded.key)
    assert same(state, whole(unsharded.key)), how

    full = {k: v.clone() for k, v in get_model_state_dict(sharded.key, options=FULL).items()}
    assert same(full, state)
    sharded.key.update_(sharded.query, momentum=0.0)
    assert not same(whole(sharded.key), state)
    set_model_state_dict(sharded.key, full, options=FULL)
    assert same(whole(sharded.key), state)


def sharded_averages(mesh):
    for how in ("both", "query", "average", "encoder", "model"):
        update_sharded(mesh, torch.float32, how, random_rows(4, 5))
    for how in ("both", "query"):
        update_sharded(mesh, torch.bfloat16, how, random_rows(4, 5).bfloat16())

    model = Model(network())
    fully_shard(model, mesh=mesh)
    before = whole(model.key)
    with pytest.raises(ValueError, match=r"^MomentumEncoder: update_ must be called outside of the forward"):
        model(random_rows(4, 5), update=True)
    with pytest.raises(ValueError, match=r"^MomentumEncoder: module must not be sharded when it is copied"):
        MomentumEncoder(shard(network(), mesh))
    assert same(whole(model.key), before)


def data_parallel_averages(rank):
    model = Model(network(torch.bfloat16))
    model.queue = MoCoQueue(8, 3)
    model.key.update_(model.query)
    parallel = nn.parallel.DistributedDataParallel(model)
    assert any("masters" in name for name in model.state_dict())
    for master in model.key.masters.buffers():
        master.fill_(rank)
    parallel(random_rows(4, 5).to(torch.bfloat16))
    assert all((master == rank).all() for master in model.key.masters.buffers())

    model = Model(network(torch.bfloat16))
    parallel = nn.parallel.DistributedDataParallel(model)
    query = nn.parallel.DistributedDataParallel(network(torch.bfloat16))
    for step in range(2):
        parallel(random_rows(4, 5, seed=step).to(torch.bfloat16))
        model.key.update_(query if step else parallel.module.query)
    everyones = [torch.empty_like(model.key.module[0].weight) for _ in range(WORLD)]
    dist.all_gather(everyones, model.key.module[0].weight.detach())
    assert same_bits(*everyones)


def sharded_losses(mesh):
    x, y = random_rows(6, 4), random_rows(6, 4, seed=1)
    for make in (
        lambda: ssl_kernels.nn.SigLIPLoss(parameter(5.0), parameter(-3.0)),
        lambda: ssl_kernels.nn.NTXentLoss(parameter(0.3)),
        lambda: ssl_kernels.nn.TripletMarginLoss(parameter(0.3)),
    ):
        plain, sharded = make(), fully_shard(make(), mesh=mesh)
        arguments = (x, y, y.flip(0)) if isinstance(plain, ssl_kernels.nn.TripletMarginLoss) else (x, y)
        optimizers = [torch.optim.SGD(loss.parameters(), lr=0.1) for loss in (plain, sharded)]
        for _ in range(2):
            for loss, optimizer in zip((plain, sharded), optimizers, strict=True):
                loss(*arguments).backward()
                optimizer.step()
                optimizer.zero_grad()
        state = whole(sharded)
        assert state.keys() == whole(plain).keys()
        for name, value in whole(plain).items():
            torch.testing.assert_close(state[name], value)
        assert any(
            value != start for value, start in zip(state.values(), whole(make()).values(), strict=True)
        )


def parameter(value):
    return nn.Parameter(torch.tensor(value))


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    data_parallel_averages(rank)
    sharded_averages(mesh)
    sharded_losses(mesh)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, with which the process can abort as it ends


def test_two_processes(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=WORLD)
