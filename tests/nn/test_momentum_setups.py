"""`nn.MomentumEncoder` in real set-ups: checkpoints, layouts, wrappers, torch.compile, moves, refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ssl_kernels.nn import MomentumEncoder, cosine_momentum
from tests.helpers import same_bits
from tests.nn.test_momentum import moved, small_network

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def convolutions(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 5, 3), nn.Linear(5, 7))
    )
    return network.to(dtype)


def updated(dtype, steps=3, **options):
    """An average after some updates, whose masters lie off what they are rounded to."""
    network = small_network(dtype)
    encoder = MomentumEncoder(network, 0.99, **options)
    for step in range(steps):
        encoder.update_(moved(network, 0.1 * step))
    return encoder


def exact(encoder):
    """The averages at their full precision."""
    return [parameter.detach().clone() for parameter in copy.deepcopy(encoder).float().module.parameters()]


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


# What is written into the average from outside


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cast", [torch.float32, torch.float64, *HALF], ids=str)
def test_a_cast_takes_what_was_written_and_else_the_master(dtype, cast):
    encoder = updated(dtype)
    before = exact(encoder)
    weight = encoder.module[0].weight
    assert not torch.equal(before[0], weight.float())
    with torch.no_grad():
        weight[1] = 2.0
    expected = before[0].clone()
    expected[1] = 2.0
    encoder.to(cast)
    assert torch.equal(exact(encoder)[0], expected)
    encoder.update_(small_network(), momentum=1.0)
    assert torch.equal(exact(encoder)[0], expected)


@pytest.mark.parametrize("write", ["load", "initialise"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_weights_written_after_construction_are_the_average(dtype, write):
    encoder = updated(dtype)
    if write == "load":
        encoder.module.load_state_dict(small_network(dtype, seed=5).state_dict())
    else:
        nn.init.constant_(encoder.module[0].weight, 0.3)
    written = [parameter.detach().clone() for parameter in encoder.module.parameters()]
    average = exact(encoder)[0]
    assert torch.equal(average, written[0].float())
    other = MomentumEncoder(small_network(), 0.99)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.module[0].weight, average)
    target = moved(small_network())
    encoder.update_(target, momentum=0.5)
    torch.testing.assert_close(exact(encoder)[0], (average + target[0].weight) / 2, rtol=1e-6, atol=1e-7)


# State


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_made_of_tensors_and_complete(dtype):
    encoder = updated(dtype, steps=4, buffers="average")
    state = encoder.state_dict()
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in state.values())
    assert state["update_count"] == 4
    state = {name: value.cpu().clone() for name, value in state.items()}
    other = MomentumEncoder(small_network(dtype, seed=9), 0.99, buffers="average")
    other.load_state_dict(state)
    assert same_state(encoder, other)
    for network in (small_network(dtype, seed=3), small_network(dtype, seed=4)):
        encoder.update_(network)
        other.update_(network)
    assert same_state(encoder, other) and other.updates == 6


def test_state_through_safetensors():
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    encoder = updated(torch.bfloat16)
    other = MomentumEncoder(small_network(torch.bfloat16, seed=9))
    other.load_state_dict(safetensors.load(safetensors.save(encoder.state_dict())))
    assert same_state(encoder, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_older_checkpoints_load(dtype, nested):
    """Those with the count in a dict, and those that lack it or the masters."""
    encoder = updated(dtype, steps=4)
    wrap = nn.Sequential if nested else lambda encoder: encoder
    prefix = "0." if nested else ""
    state = wrap(encoder).state_dict()
    del state[f"{prefix}update_count"]
    for extra, count in (({f"{prefix}_extra_state": {"updates": 4}}, 4), ({}, 1)):
        other = updated(dtype, steps=1)
        wrap(other).load_state_dict(state | extra)
        assert other.updates == count
        other.updates = 4
        assert same_state(encoder, other)
    bare = {name: value for name, value in state.items() if "masters" not in name}
    other = updated(dtype, steps=1)
    wrap(other).load_state_dict(bare)
    assert all(map(torch.equal, exact(other), [p.detach().float() for p in encoder.module.parameters()]))
    with pytest.raises(RuntimeError, match="Missing key"):
        wrap(other).load_state_dict(
            {name: v for name, v in state.items() if not name.endswith("module.0.bias")}
        )
    with pytest.raises(RuntimeError, match="Unexpected key"):
        wrap(other).load_state_dict(state | {f"{prefix}masters.99": torch.zeros(1)})


@pytest.mark.parametrize("saved", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("loaded", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_checkpoints_of_one_dtype_load_into_another(saved, loaded, buffers):
    encoder = updated(saved, buffers=buffers)
    other = MomentumEncoder(small_network(loaded, seed=9), buffers=buffers)
    other.load_state_dict(encoder.state_dict())
    assert {parameter.dtype for parameter in other.module.parameters()} == {loaded}
    assert all(map(torch.equal, exact(other), exact(encoder)))
    assert other.updates == 3
    assigned = MomentumEncoder(small_network(loaded, seed=9), buffers=buffers)
    assigned.load_state_dict(encoder.state_dict(), assign=True)
    assert same_state(assigned, encoder)


def test_a_master_of_another_shape_is_an_error():
    encoder = updated(torch.bfloat16)
    state = encoder.state_dict()
    state["masters.0"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"size mismatch for masters.0"):
        encoder.load_state_dict(state)


def test_the_count_is_set_read_and_survives_copies_and_casts():
    encoder = updated(torch.bfloat16, steps=5)
    copies = [
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        copy.deepcopy(encoder).type(torch.float16),
    ]
    for other in copies:
        assert type(other.updates) is int and other.updates == 5
        assert other.update_count.dtype == torch.int64
    assert all(map(torch.equal, exact(copies[1]), exact(encoder)))
    encoder.updates = 2
    assert encoder.updates == 2


# Layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["both", "average", "copy inside", "module", "made so", "there and back"])
@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
def test_any_change_of_layout_on_either_side(dtype, side, backend):
    network = convolutions(dtype)
    if side == "made so":
        network.to(memory_format=torch.channels_last)
    encoder, plain = (MomentumEncoder(network, 0.75, backend=backend) for _ in range(2))
    target = moved(network)
    if side in ("both", "average", "there and back"):
        encoder.update_(target), plain.update_(target)
        encoder.to(memory_format=torch.channels_last)
    if side == "there and back":
        encoder.to(memory_format=torch.contiguous_format)
    if side == "copy inside":
        encoder.module[0].to(memory_format=torch.channels_last)
    if side in ("both", "module"):
        target.to(memory_format=torch.channels_last)
    for _ in range(2):
        encoder.update_(target)
        plain.update_(target)
    assert all(map(torch.equal, encoder.state_dict().values(), plain.state_dict().values()))


# Wrappers


def compiled_inside(network):
    network[2] = torch.compile(network[2], backend="eager")
    network[2]._orig_mod[0] = torch.compile(network[2]._orig_mod[0], backend="eager")


def checkpointed_inside(network):
    network[2][0] = checkpoint_wrapper(network[2][0])
    network[2] = checkpoint_wrapper(network[2])


def data_parallel_inside(network):
    network[2] = nn.DataParallel(network[2])


class Engine(nn.Module):
    """As engines of other libraries wrap a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class FullySharded(nn.Module):
    """The names that torch.distributed.fsdp.FullyShardedDataParallel gives."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def all_inside(network):
    network[2][1] = FullySharded(network[2][1])
    network[0] = Engine(torch.compile(network[0], backend="eager"))
    compiled_inside(network)


WRAPPINGS = (compiled_inside, checkpointed_inside, data_parallel_inside, all_inside)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrappers_are_looked_through_at_every_depth(wrapping, dtype):
    network = convolutions(dtype)
    plain, source, average = (MomentumEncoder(network, 0.75) for _ in range(3))
    target = moved(network)
    wrapped = copy.deepcopy(target)
    wrapping(wrapped)
    wrapping(average.module)
    plain.update_(target)
    source.update_(torch.compile(Engine(wrapped), backend="eager"))
    average.update_(target)
    made_of_it = MomentumEncoder(wrapped, 0.75)
    made_of_it.update_(target, momentum=1.0)
    expected = list(plain.module.parameters())
    for other in (source, average):
        assert all(map(torch.equal, other.module.parameters(), expected))
    assert all(map(torch.equal, made_of_it.module.parameters(), target.parameters()))
    for other in (average, made_of_it):
        again = copy.deepcopy(other)
        again.update_(network)
        again.load_state_dict(other.state_dict())
        assert same_state(again, other)


def test_a_module_of_that_name_is_no_wrapper():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    network = Named()
    encoder = MomentumEncoder(network, 0.0).update_(moved(network))
    assert torch.equal(encoder.module.head.weight, network.head.weight + 1)
    with pytest.raises(ValueError, match=r"got none named \['head.bias', 'head.weight', 'module.bias'"):
        encoder.update_(nn.Linear(2, 3))


def test_a_part_with_tensors_of_its_own_is_no_wrapper():
    network = Engine(nn.Linear(2, 3))
    network.scale = nn.Parameter(torch.ones(1))
    encoder = MomentumEncoder(network, 0.0).update_(moved(network))
    assert encoder.module.scale == 2
    with pytest.raises(ValueError, match=r"surplus \['module.bias', 'module.weight', 'scale'\]"):
        MomentumEncoder(nn.Linear(2, 3)).update_(network)


def test_a_tensor_of_two_names_moves_once():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    encoder = MomentumEncoder(network, 0.5).update_(moved(network))
    torch.testing.assert_close(encoder.module[1].weight, network[0].weight + 0.5)


# torch.compile


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype, schedule, buffers", [
    (torch.float32, None, "copy"),
    (torch.bfloat16, "steps", "average"),
    (torch.bfloat16, "argument", "copy"),
    (torch.float32, "attribute", "average"),
], ids=str)  # fmt: skip
def test_twelve_compiled_updates_are_compiled_twice_at_most(dtype, schedule, buffers):
    torch._dynamo.reset()
    network = small_network(dtype)
    options = {"buffers": buffers, "steps": 10 if schedule == "steps" else None}
    traced, eager = (MomentumEncoder(network, 0.5, **options) for _ in range(2))
    graphs = CompileCounter()

    def step(encoder, network, momentum):
        network(torch.ones(3, 4, dtype=dtype))
        encoder.update_(network, momentum)

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for i in range(12):
        network = network.requires_grad_(False)
        for parameter in network.parameters():
            parameter.add_(0.1 * i)
        if schedule == "attribute":
            traced.momentum = eager.momentum = 0.5 + i / 24
        momentum = 0.5 + i / 24 if schedule == "argument" else None
        compiled(traced, network, momentum)
        eager.update_(network, momentum)
        for mine, other in zip(traced.state_dict().values(), eager.state_dict().values(), strict=True):
            eps = torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0
            torch.testing.assert_close(mine, other, rtol=2 * eps, atol=2 * eps)
    assert traced.updates == 12
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_schedule_is_that_of_its_definition(dtype):
    network = small_network(dtype)
    encoder = MomentumEncoder(network, 0.3, steps=6)
    averages = [parameter.detach().double() for parameter in network.parameters()]
    for step in range(8):
        momentum = cosine_momentum(step, 6, 0.3)
        assert encoder.current_momentum == momentum
        network = moved(network, 0.25)
        encoder.update_(network)
        averages = [
            torch.lerp(p.detach().double(), a, momentum)
            for a, p in zip(averages, network.parameters(), strict=True)
        ]
    found = copy.deepcopy(encoder).double().module.parameters()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for average, truth in zip(found, averages, strict=True):
        torch.testing.assert_close(average, truth, rtol=tolerance, atol=tolerance)


# Moves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_from_the_meta_device_to_memory(dtype, nested):
    network = small_network(dtype)
    encoder = MomentumEncoder(copy.deepcopy(network).to("meta"), 0.5)
    (nn.Sequential(encoder) if nested else encoder).to_empty(device="cpu")
    assert encoder.updates == 0
    assert {tensor.device.type for tensor in encoder.state_dict().values()} == {"cpu"}
    encoder.module.load_state_dict(network.state_dict())
    whole = MomentumEncoder(network, 0.5)
    for each in (encoder, whole):
        each.update_(moved(network))
    assert same_state(encoder, whole)
    loaded = MomentumEncoder(copy.deepcopy(network).to("meta"), 0.5).to_empty(device="cpu")
    loaded.load_state_dict(whole.state_dict())
    assert same_state(loaded, whole)


def test_meta_is_cast_before_it_has_memory():
    encoder = (
        MomentumEncoder(small_network().to("meta"), 0.5).half().float().bfloat16().to_empty(device="cpu")
    )
    encoder.load_state_dict(updated(torch.bfloat16).state_dict())
    assert same_state(encoder, updated(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_memory_is_shared(dtype):
    encoder = updated(dtype)
    before = copy.deepcopy(encoder)
    encoder.share_memory()
    assert all(tensor.is_shared() for tensor in encoder.state_dict().values())
    assert same_state(encoder, before)
    where = [tensor.data_ptr() for tensor in encoder.state_dict().values()]
    encoder.update_(small_network(dtype))
    assert [tensor.data_ptr() for tensor in encoder.state_dict().values()] == where


def test_a_copy_cast_by_itself_has_masters_where_it_needs_them():
    encoder = MomentumEncoder(small_network(), 0.9999)
    encoder.module.bfloat16()
    target = moved(encoder.module, 0.25)
    for _ in range(3):
        encoder.update_(target)
    for master, average in zip(exact(encoder), small_network(torch.bfloat16).parameters(), strict=True):
        truth = average.float() + 0.25 * (1 - 0.9999**3)
        torch.testing.assert_close(master, truth, rtol=1e-2, atol=1e-3)
        assert not torch.equal(master, average.float())
    encoder.module.float()
    encoder.update_(target)
    assert not list(encoder.masters.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_inference_mode(dtype):
    network, expected = small_network(dtype), updated(dtype)
    with torch.inference_mode():
        encoder = MomentumEncoder(network, 0.99)
        assert encoder(torch.ones(3, 4, dtype=dtype)).is_inference()
        encoder.update_(moved(network, 0.0))
    encoder.update_(moved(network, 0.1))
    with torch.inference_mode():
        encoder.update_(moved(network, 0.2))
    assert not any(tensor.is_inference() for tensor in encoder.state_dict().values())
    assert all(map(torch.equal, exact(encoder), exact(expected)))
    assert encoder.updates == 3


# Buffers that change


class Cache(nn.Module):
    """A buffer that grows, one that comes, one that goes."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=dtype)
        self.register_buffer("seen", torch.zeros(2, dtype=dtype))
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("early", torch.ones(1, dtype=dtype))
        self.register_buffer("ids", torch.arange(2))
        self.register_buffer("wide", torch.ones(1, dtype=dtype).expand(3))

    def change(self):
        self.seen = torch.full((5,), 3.0, dtype=self.seen.dtype)
        self.late = torch.full((2,), 7.0, dtype=self.seen.dtype)
        self.early = None
        self.ids = torch.arange(4)
        self.register_buffer("new", torch.ones(1), persistent=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_that_grow_come_or_go_are_taken_over(dtype, buffers):
    network = Cache(dtype)
    encoder = MomentumEncoder(network, 0.5, buffers=buffers)
    encoder.update_(network)
    network.change()
    for _ in range(2):
        encoder.update_(network)
        copied = dict(encoder.module.named_buffers())
        assert copied.keys() == {"seen", "late", "ids", "wide", "new"}
        assert all(torch.equal(copied[name], tensor) for name, tensor in network.named_buffers())
        assert copied["seen"].data_ptr() != network.seen.data_ptr()
    assert {"module.late", "module.new"}.isdisjoint(encoder.state_dict())
    network.seen.fill_(5.0)
    encoder.update_(network)
    assert (encoder.module.seen == (5 if buffers == "copy" else 4)).all()
    assert encoder.updates == 4
    assert len(list(encoder.masters.buffers())) == (
        0 if dtype == torch.float32 else 2 if buffers == "copy" else 5
    )


def test_an_averaged_buffer_that_both_grew_starts_again():
    network = Cache(torch.bfloat16)
    encoder = MomentumEncoder(network, 0.5, buffers="average")
    for each in (network, encoder.module):
        each.seen = torch.full((5,), 2.0, dtype=torch.bfloat16)
    network.seen.fill_(4.0)
    encoder.update_(network)
    assert (encoder.module.seen == 3).all()
