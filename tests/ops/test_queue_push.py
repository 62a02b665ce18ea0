"""`queue_push_` on every CPU backend: a ring simulated in Python, dtypes, strides, versions, what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_kernels.ops.queue_push import queue_push_
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, same_bits
from tests.support.queue_push import Ring

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)


def empty_ring(size, dim, dtype=torch.float32):
    return torch.zeros(size, dim, dtype=dtype), torch.tensor(0), torch.tensor(0)


def ring_on(backend, size, width, dtype=torch.float32):
    def push(storage, keys, position, filled, normalize):
        queue_push_(storage, keys, position, filled, normalize=normalize, backend=backend)

    return Ring(push, size, width, dtype)


@every_backend
def test_is_the_ring_simulated_in_python(backend):
    """Every (size, batch, steps) up to sizes of several turns, batches larger than the ring and empty ones."""
    for size, batch in itertools.product((1, 2, 3, 5, 8), (0, 1, 2, 3, 4, 7, 8, 9, 17)):
        ring = ring_on(backend, size, 2)
        for step in range(6):
            numbers = torch.arange(100.0 * step + 1, 100 * step + 1 + batch)
            ring.push(numbers[:, None].expand(-1, 2), False)
            ring.check()


@given(size=st.integers(1, 40), batches=st.lists(st.integers(0, 90), max_size=8), seed=st.integers(0, 100))
def test_any_batches_are_the_ring_simulated_in_python(size, batches, seed):
    keys = torch.randperm(sum(batches) + 1, generator=torch.Generator().manual_seed(seed)).float()[1:]
    for backend in BACKENDS:
        ring = ring_on(backend, size, 1)
        for part in keys.split(batches) if batches else ():
            ring.push(part[:, None], False)
        ring.check()


@every_operator
@pytest.mark.parametrize("storage_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
def test_normalises_and_rounds_once(backend, storage_dtype, key_dtype):
    ring = ring_on(backend, 450, 33, storage_dtype)
    ring.push(random_rows(300, 33, key_dtype, spread=2.0), True)
    ring.check()


@every_operator
def test_short_zero_huge_and_nan_keys(backend):
    keys = random_rows(6, 8)
    keys[0] = 0
    keys[1] *= 1e-14
    keys[2] *= 1e-25
    keys[3] *= 1e30
    keys[4, 2] = torch.nan
    storage, position, filled = empty_ring(6, 8)
    queue_push_(storage, keys, position, filled, backend=backend)
    truth = F.normalize(keys.double(), dim=1)
    assert storage[4].isnan().any()
    rows = [0, 1, 2, 5] if backend == "chunked" else [0, 1, 2, 3, 5]
    torch.testing.assert_close(storage[rows].double(), truth[rows], rtol=1e-6, atol=1e-30)


@every_backend
def test_any_strides(backend):
    wide = random_rows(40, 66)
    layouts = [wide[::2, :16], wide[:20, 1:33:2], wide.T[:20, :16], wide[:1, :16].expand(20, 16)]
    for keys in layouts:
        assert not keys.is_contiguous()
        storage, position, filled = empty_ring(30, 16)
        queue_push_(storage, keys, position, filled, normalize=False, backend=backend)
        assert torch.equal(storage[:20], keys)


@every_backend
def test_rows_that_no_key_falls_on_stay(backend):
    storage = random_rows(20, 4)
    before, position, filled = storage.clone(), torch.tensor(18), torch.tensor(20)
    queue_push_(storage, random_rows(5, 4, seed=3), position, filled, backend=backend)
    assert same_bits(storage[3:18], before[3:18])
    assert not (storage[:3] == before[:3]).any()
    assert position.item() == 3


@every_operator
def test_advances_the_versions_of_what_it_writes(backend):
    storage, position, filled = empty_ring(5, 4)
    versions = [t._version for t in (storage, position, filled)]
    queue_push_(storage, random_rows(2, 4), position, filled, backend=backend)
    assert all(t._version > v for t, v in zip((storage, position, filled), versions, strict=True))


@every_backend
def test_overwriting_what_backward_needs_raises(backend):
    storage, position, filled = empty_ring(5, 4)
    x = random_rows(3, 4).requires_grad_()
    product = x @ storage.T
    queue_push_(storage, random_rows(2, 4), position, filled, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@every_backend
def test_keys_with_a_history_leave_the_ring_without_one(backend):
    storage, position, filled = empty_ring(5, 4)
    keys = random_rows(2, 4).requires_grad_() * 2
    queue_push_(storage, keys, position, filled, backend=backend)
    assert not storage.requires_grad
    assert filled.item() == 2


@every_operator
def test_opcheck(backend):
    storage, position, filled = empty_ring(5, 4, torch.bfloat16)
    operator = getattr(torch.ops.ssl_kernels.queue_push_, backend)
    torch.library.opcheck(operator, (storage, random_rows(3, 4), position, filled, True))


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()

    def push(storage, keys, position, filled):
        queue_push_(storage, keys, position, filled, backend=backend)
        return storage * 2

    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")
    eager, traced = empty_ring(7, 4), empty_ring(7, 4)
    for step in range(3):
        keys = random_rows(3, 4, seed=step)
        assert same_bits(compiled(traced[0], keys, *traced[1:]), push(eager[0], keys, *eager[1:]))
        assert all(same_bits(t, e) for t, e in zip(traced, eager, strict=True))


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_changing_batches_are_compiled_twice(backend):
    torch._dynamo.reset()
    graphs = CompileCounter()

    def push(storage, keys, position, filled):
        queue_push_(storage, keys, position, filled, backend=backend)

    compiled = torch.compile(push, fullgraph=True, backend=graphs)
    eager, traced = empty_ring(7, 4), empty_ring(7, 4)
    for step, batch in enumerate((3, 2, 5, 9, 4, 7, 12, 6, 30, 2, 8, 11)):
        keys = random_rows(batch, 4, seed=step)
        compiled(traced[0], keys, *traced[1:])
        push(eager[0], keys, *eager[1:])
        assert all(map(same_bits, traced, eager))
    assert graphs.frame_count <= 2


def test_fake_tensors_are_traced():
    with FakeTensorMode():
        storage, position, filled = empty_ring(5, 4)
        queue_push_(storage, torch.empty(3, 4), position, filled)
        assert storage.shape == (5, 4)


@every_operator
@pytest.mark.parametrize("strict", [False, True])
def test_is_exported_with_a_dynamic_batch(backend, strict):
    class Ring(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in zip(("storage", "position", "filled"), empty_ring(5, 4), strict=True):
                self.register_buffer(name, tensor)

        def forward(self, keys):
            queue_push_(self.storage, keys, self.position, self.filled, backend=backend)
            return self.storage * 1

    shapes = {"keys": {0: torch.export.Dim("batch", min=1, max=99)}}
    program = torch.export.export(Ring(), (random_rows(3, 4),), dynamic_shapes=shapes, strict=strict)
    exported, eager = program.module(), Ring()
    for batch in (3, 2, 8):
        assert same_bits(exported(random_rows(batch, 4)), eager(random_rows(batch, 4)))


@every_backend
def test_tensors_of_inference_mode(backend):
    """Keys made there are pushed anywhere; a ring made there is written nowhere else."""
    ring, expected = empty_ring(5, 4), empty_ring(5, 4)
    with torch.inference_mode():
        keys = random_rows(3, 4) * 1
        inside = empty_ring(5, 4)
        queue_push_(ring[0], keys, *ring[1:], backend=backend)
    queue_push_(ring[0], keys, *ring[1:], backend=backend)
    for _ in range(2):
        queue_push_(expected[0], random_rows(3, 4), *expected[1:], backend=backend)
    assert all(map(same_bits, ring, expected))
    for i, name in enumerate(("storage", "position", "filled")):
        mixed = [*ring[:i], inside[i], *ring[i + 1 :]]
        with pytest.raises(ValueError, match=f"^queue_push_: {name} must not be written outside"):
            queue_push_(mixed[0], keys, *mixed[1:], backend=backend)
        assert all(map(same_bits, ring, expected))


def good_call():
    storage, position, filled = empty_ring(5, 4)
    return {"storage": storage, "keys": random_rows(2, 4), "position": position, "filled": filled}


@pytest.mark.parametrize("change, message", [
    ({"keys": [1, 2]}, "keys must be a tensor, got list"),
    ({"keys": torch.zeros(2, 4, dtype=torch.int64)}, "keys must be float64, float32, float16 or bfloat16, got"),
    ({"keys": torch.zeros(4)}, r"keys must have shape \(B, 4\), got \(4,\)"),
    ({"keys": torch.zeros(2, 5)}, r"keys must have shape \(B, 4\), got \(2, 5\)"),
    ({"keys": torch.zeros(2, 4, device="meta")}, "keys must be on cpu as storage is, got meta"),
    ({"storage": torch.zeros(0, 4)}, "storage must be contiguous with shape"),
    ({"storage": torch.zeros(4, 5).T}, "storage must be contiguous with shape"),
    ({"position": torch.tensor(0.0)}, "position must be 0-d int64"),
    ({"position": torch.tensor([0])}, "position must be 0-d int64"),
    ({"position": torch.tensor(5)}, r"position must be in \[0, 5\), got 5"),
    ({"position": torch.tensor(-1)}, r"position must be in \[0, 5\), got -1"),
    ({"filled": torch.tensor(6)}, r"filled must be in \[0, 5\], got 6"),
])  # fmt: skip
def test_refuses_what_does_not_fit(change, message):
    for backend in BACKENDS:
        call = good_call() | change
        before = call["storage"].clone()
        with pytest.raises((TypeError, ValueError), match=f"^queue_push_: {message}"):
            queue_push_(**call, backend=backend)
        assert torch.equal(call["storage"], before)


@every_backend
def test_refuses_its_own_rows_as_keys(backend):
    storage, position, filled = empty_ring(5, 4)
    with pytest.raises(ValueError, match="keys must not share memory with storage"):
        queue_push_(storage, storage[1:3], position, filled, backend=backend)


def test_native_operator_refuses_what_it_would_write_out_of_bounds():
    operator = torch.ops.ssl_kernels.queue_push_.native
    for change in (
        {"keys": torch.zeros(2, 5)},
        {"storage": torch.zeros(4, 5).T},
        {"position": torch.tensor(5)},
        {"filled": torch.tensor(-1)},
        {"position": torch.tensor(0.0)},
    ):
        call = good_call() | change
        with pytest.raises((RuntimeError, ValueError), match="queue_push_"):
            operator(*call.values(), True)


@every_backend
def test_refuses_storage_that_requires_grad(backend):
    call = good_call()
    call["storage"].requires_grad_()
    before = call["storage"].detach().clone()
    with pytest.raises(ValueError, match=r"^queue_push_: storage must not require grad while gradients are"):
        queue_push_(**call, backend=backend)
    assert torch.equal(call["storage"], before)
    with torch.no_grad():
        queue_push_(**call, backend=backend)
    assert not torch.equal(call["storage"], before)
