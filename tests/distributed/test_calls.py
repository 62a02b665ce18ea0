"""What a call settles before rows move, in one process: which way they take, what ranks are told, modules' options."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from ssl_kernels import distributed, nn
from ssl_kernels.distributed import call, checks, groups, queue
from ssl_kernels.distributed.queue import ShardedMoCoQueue
from tests.helpers import random_rows


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "dtype, limit",
    [(torch.float32, 5 * 4 * 8), (torch.float64, 5 * 4 * 16), (torch.bfloat16, 5 * 4 * 6)],
    ids=str,
)
def test_rows_and_their_gradients_are_gathered_while_they_are_few(alone, dtype, limit, monkeypatch):
    """Five rows of width 4 of all ranks, and a gradient of each in the accumulation dtype."""
    made = call.Call("f", group=None, strategy=None, check=False, rows_per_rank=None)
    made.like, made.backend, made.total = random_rows(3, 4).to(dtype), "native", 5
    for bytes_allowed, strategy in ((limit, "gather"), (limit - 1, "ring")):
        monkeypatch.setattr(call, "GATHERED_BYTES", bytes_allowed)
        assert made.setting(True).strategy == strategy
    made.strategy = "gather"
    setting = made.setting(False)
    assert (setting.strategy, setting.normalize, setting.rank, setting.world) == ("gather", False, 0, 1)


def test_what_a_group_can_take(alone, monkeypatch):
    rows = random_rows(2, 3)
    checks.check_device_of_group("f", "rows", rows, alone)
    assert groups.device_of(alone) == torch.device("cpu")
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    with pytest.raises(
        ValueError, match=r"^f: rows must be on cuda, where the backend nccl .* works, got cpu$"
    ):
        checks.check_device_of_group("f", "rows", rows, alone)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for config, device in (("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda:3")):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert groups.device_of(alone) == torch.device(device)


def test_a_mesh_of_two_dimensions_is_refused(alone):
    mesh = SimpleNamespace(ndim=2, get_group=lambda: alone)
    rows = random_rows(2, 3)
    with pytest.raises(
        ValueError, match=r"^clip_loss: group must have one dimension as a DeviceMesh, got 2$"
    ):
        distributed.clip_loss(rows, rows, 5.0, group=mesh)
    mesh.ndim = 1
    assert groups.process_group("f", mesh) is alone


def test_many_ranks_are_told_in_few_words():
    values = ["mean"] * 10 + ["sum"]
    assert checks._by_rank(values) == "mean on ranks 0, 1, 2, 3, 4, 5, 6, 7 and others, sum on rank 10"
    assert checks._by_rank([True, 2, True]) == "true on ranks 0, 2, 2 on rank 1"


def test_options_as_facts():
    """Of a tensor whether it gets a gradient, not its value, which would wait for the device."""
    learned = torch.tensor(1.0, requires_grad=True)
    assert checks.as_fact(learned) == "tensor, requires_grad=True" != checks.as_fact(learned.detach())
    with torch.no_grad():
        assert checks.as_fact(learned) == checks.as_fact(torch.tensor(2.0))
    for plain in (None, True, 3, 0.5, "mean"):
        assert checks.as_fact(plain) is plain
    facts = [checks.as_fact(SimpleNamespace(weights=object())) for _ in range(2)]
    assert facts[0] == facts[1] and "0x" not in facts[0]


MODULES = [name for name in distributed.__all__ if name.endswith("Loss")]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_function(name, monkeypatch):
    """With what the plain module holds, what forward is given, and how the rows travel."""
    module, plain = getattr(distributed, name), getattr(nn, name)
    assert issubclass(module, plain)
    function = module.function
    assert function is getattr(distributed, function.__name__)
    assert function.__name__.replace("_", "") == name.lower()
    over = {"group": object(), "strategy": "ring", "check": False, "rows_per_rank": [1, 2]}
    learned = {"CLIPLoss": ("logit_scale",), "SigLIPLoss": ("logit_scale", "logit_bias")}.get(name, ())
    given = {"temperature": 0.3, "margin": 0.4, "normalize": False, "reduction": "sum", "backend": "chunked"}
    options = {key: given[key] for key in inspect.signature(plain).parameters.keys() & given.keys()}
    assert options
    made = module(**options, **over)
    monkeypatch.setattr(module, "function", staticmethod(lambda **named: named))
    tensors = [each for each in made._arguments if each not in learned]
    seen = made(*range(len(tensors)))
    expected = dict(zip(tensors, range(len(tensors)), strict=True)) | options | over
    assert {key: seen[key] for key in expected} == expected
    assert all(seen[key] is getattr(made, key) for key in learned)
    others = {key: object() for key in learned}  # given at the call
    assert made(*range(len(tensors)), **others) == seen | others
    with pytest.raises(TypeError, match=f"{name}: at most {len(made._arguments)} tensors .* got 9"):
        made(*range(9))
    assert re.search("strategy='ring'", repr(made)) and "strategy" not in repr(module(**options))


def test_a_queue_of_a_group_of_one_is_the_plain_one(alone):
    assert queue.class_for(None) is nn.MoCoQueue and type(nn.MoCoQueue(4, 3, group=alone)) is nn.MoCoQueue


def test_a_divided_queue_moves_with_its_module(alone):
    made = ShardedMoCoQueue(5, 3, ids=True, group=alone).push_(random_rows(2, 3), torch.tensor([7, 8]))
    rows = made.shard.clone()
    for dtype, move in (
        (torch.float64, lambda: made.double()),
        (torch.float32, lambda: made.type(torch.float32)),
    ):
        move()
        assert made.shard.dtype == dtype and torch.equal(made.shard, rows.to(dtype))
        assert made.shard_ids.dtype == torch.int64 and made.ids.tolist() == [7, 8, 0, 0, 0]
        assert (len(made), int(made.position)) == (2, 2)
    made.to("meta").to_empty(device="cpu")
    assert not made.shard.any() and not made.ids.any() and (len(made), int(made.position)) == (0, 0)


def test_a_divided_queue_says_what_a_checkpoint_lacks(alone):
    made = ShardedMoCoQueue(5, 3, ids=True, group=alone)
    assert repr(made).endswith("ids=True, rows 0 to 5 on rank 0 of 1)")
    state = nn.MoCoQueue(5, 3, ids=True).push_(random_rows(2, 3), torch.arange(2)).state_dict()
    made.load_state_dict(state)
    assert len(made) == 2 and made.ids.tolist() == [0, 1, 0, 0, 0]
    for name in state:
        less = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            made.load_state_dict(less)
    before = made.shard.clone()
    found = made.load_state_dict(
        {"storage": torch.ones(5, 3)}, strict=False
    )  # a part is not taken, as by the plain one
    assert set(found.missing_keys) == set(state) - {"storage"}
    assert torch.equal(made.shard, before) and len(made) == 2
