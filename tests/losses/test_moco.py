"""`moco_loss` and `nn.MoCoLoss`: parity with the definition, the queue in every state, gradients, what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels import moco_loss
from ssl_kernels.chunked import contrastive as chunked
from ssl_kernels.nn import MoCoLoss, MoCoQueue
from ssl_kernels.ops import contrastive as operation
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, random_rows, same_bits, saved_bytes

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def by_definition(query, key, negatives, temperature, normalize=True):
    """Rows' losses through concatenated logits and cross-entropy."""
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat(((query * key).sum(1, keepdim=True), query @ negatives.T), 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64), reduction="none")


def in_batch_by_definition(query, key, temperature):
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query)), reduction="none")


def pushed_queue(size, dim, pushes, dtype=torch.float32, **options):
    queue = MoCoQueue(size, dim, dtype, **options)
    for seed, batch in enumerate(pushes):
        queue.push_(random_rows(batch, dim, seed=50 + seed))
    return queue


# Half-filled, filled exactly, wrapped, overfilled at once, and one key.
PUSHES = {
    "half-filled": (300,),
    "filled": (300, 200),
    "wrapped": (300, 300, 77),
    "over": (1200,),
    "one": (1,),
}


@every_backend
@pytest.mark.parametrize("pushes", PUSHES.values(), ids=PUSHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_cross_entropy_over_concatenated_logits(backend, pushes, dtype):
    queue = pushed_queue(500, 24, pushes, torch.float64 if dtype == torch.float64 else torch.float32)
    filled = min(500, sum(pushes))
    for temperature in (0.005, 0.07, 1.0):
        query, key = random_rows(33, 24, dtype).requires_grad_(), random_rows(33, 24, dtype, seed=1)
        loss = moco_loss(query, key, queue, temperature, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), query)
        wide = query.detach().double().requires_grad_()
        truth = by_definition(wide, key.double(), queue.storage[:filled].double(), temperature)
        (exact,) = torch.autograd.grad(truth.sum(), wide)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        eps = torch.finfo(loss.dtype).eps
        torch.testing.assert_close(loss.double(), truth, rtol=8 * eps, atol=16 * eps / temperature)
        scale = exact.abs().max().item()
        stored = torch.finfo(dtype).eps
        torch.testing.assert_close(
            grad.double(), exact, rtol=4 * stored, atol=scale * (32 * eps / temperature + stored / 8)
        )


@every_backend
def test_rows_not_yet_filled_do_not_matter(backend):
    queue = pushed_queue(50, 8, (20,))
    query, key = random_rows(7, 8), random_rows(7, 8, seed=1)
    expected = moco_loss(query, key, queue, backend=backend)
    queue.storage[20:] = 1e3
    assert same_bits(moco_loss(query, key, queue, backend=backend), expected)
    columns, row_ids, column_ids = torch.compiler.disable(queue.negatives)(7)
    assert columns.shape == (20, 8)
    assert row_ids is column_ids is None


@every_backend
def test_ids_leave_out_the_same_rows(backend, monkeypatch):
    """Where reading the fill count would wait for a device, or break a graph, rows are told apart by ids."""
    for pushes in PUSHES.values():
        queue = pushed_queue(500, 8, pushes)
        query, key = random_rows(7, 8).requires_grad_(), random_rows(7, 8, seed=1)
        results = []
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=compiling: value)
            loss = moco_loss(query, key, queue, backend=backend)
            monkeypatch.undo()
            results.append((loss, torch.autograd.grad(loss, query)[0]))
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@every_backend
def test_an_empty_queue_gives_no_loss(backend):
    query, key = random_rows(7, 8).requires_grad_(), random_rows(7, 8, seed=1)
    loss = moco_loss(query, key, MoCoQueue(9, 8), backend=backend)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, query)[0] == 0).all()


@every_backend
def test_push_between_forward_and_backward_is_right_or_raises(backend):
    queue, key = pushed_queue(50, 8, (50,)), random_rows(7, 8, seed=1)
    query = random_rows(7, 8).requires_grad_()
    (expected,) = torch.autograd.grad(moco_loss(query, key, queue, backend=backend), query)
    loss = moco_loss(query, key, queue, backend=backend)
    queue.push_(key)
    if backend == "reference":  # needs the queue again
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        assert same_bits(torch.autograd.grad(loss, query)[0], expected)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_the_queue_is_not_saved_for_backward(backend):
    queue, key = pushed_queue(5000, 16, (5000,)), random_rows(7, 16, seed=1)
    query = random_rows(7, 16).requires_grad_()
    assert (
        saved_bytes(moco_loss, query, key, queue, backend=backend) < 20 * query.nbytes < queue.storage.nbytes
    )


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_against_a_long_queue_takes_less_than_2_mb(queue_dtype):
    queue = pushed_queue(65536, 128, (65536,), queue_dtype)
    query, key = random_rows(256, 128).requires_grad_(), random_rows(256, 128, seed=1)
    moco_loss(query, key, queue).backward()  # what lasts from step to step exists
    query.grad = None
    assert peak_memory(lambda: moco_loss(query, key, queue).backward()) < 2_000_000


@every_backend
@pytest.mark.parametrize("queue_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_queue_beside_wide_queries(backend, queue_dtype, dtype):
    queue = pushed_queue(500, 24, (300,), queue_dtype)
    query, key = random_rows(33, 24, dtype).requires_grad_(), random_rows(33, 24, dtype, seed=1)
    loss = moco_loss(query, key, queue, backend=backend)
    wide = query.detach().double().requires_grad_()
    truth = by_definition(wide, key.double(), queue.keys.double(), 0.07).mean()
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
    found, exact = torch.autograd.grad(loss, query)[0], torch.autograd.grad(truth, wide)[0]
    assert found.dtype == dtype
    eps = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=eps * exact.abs().max().item())


@every_backend
@pytest.mark.parametrize("pushes", [(3,), (6,), (4, 4)], ids=["half-filled", "filled", "wrapped"])
def test_gradcheck(backend, pushes):
    queue = pushed_queue(6, 3, pushes, torch.float64)
    query, key = random_rows(4, 3, torch.float64).requires_grad_(), random_rows(4, 3, torch.float64, seed=1)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"normalize": False}, {"symmetric": True}):
        assert torch.autograd.gradcheck(
            lambda q, t, options=options: moco_loss(
                q, key, queue, t, reduction="none", backend=backend, **options
            ),
            (query, temperature),
        )
        assert torch.autograd.gradcheck(
            lambda q, t, options=options: moco_loss(
                q, key, None, t, reduction="none", backend=backend, **options
            ),
            (query, temperature),
        )


def test_reference_differentiates_twice():
    queue, key = pushed_queue(6, 3, (4,), torch.float64), random_rows(4, 3, torch.float64, seed=1)
    query = random_rows(4, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q: moco_loss(q, key, queue, 0.3, backend="reference"), query)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_a_second_derivative_is_refused(backend):
    queue, query = pushed_queue(6, 3, (4,)), random_rows(4, 3).requires_grad_()
    loss = moco_loss(query, random_rows(4, 3, seed=1), queue, backend=backend)
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@every_backend
def test_no_gradient_to_key_and_queue(backend):
    query, key, queue = (random_rows(n, 8, seed=n).requires_grad_() for n in (7, 7, 20))
    key = random_rows(7, 8, seed=1).requires_grad_()
    for negatives in (queue, None):
        moco_loss(query, key, negatives, backend=backend).backward()
        assert key.grad is None
        assert queue.grad is None
    assert query.grad is not None


@every_backend
def test_in_batch_is_the_loss_of_moco_v3(backend):
    q0, q1, k0, k1 = (random_rows(9, 8, seed=seed) for seed in range(4))
    one_way = moco_loss(q0, k1, temperature=0.2, reduction="none", backend=backend)
    torch.testing.assert_close(one_way, in_batch_by_definition(q0, k1, 0.2))
    both = moco_loss(
        torch.cat((q0, q1)), torch.cat((k0, k1)), temperature=0.2, symmetric=True, backend=backend
    )
    expected = in_batch_by_definition(q0, k1, 0.2).mean() + in_batch_by_definition(q1, k0, 0.2).mean()
    torch.testing.assert_close(2 * both, expected)


@every_backend
def test_symmetric_pairs_each_query_with_the_other_view(backend):
    queue = pushed_queue(50, 8, (50,))
    q0, q1, k0, k1 = (random_rows(9, 8, seed=seed) for seed in range(4))
    both = moco_loss(
        torch.cat((q0, q1)), torch.cat((k0, k1)), queue, symmetric=True, reduction="none", backend=backend
    )
    one_way = [moco_loss(q, k, queue, reduction="none", backend=backend) for q, k in ((q0, k1), (q1, k0))]
    torch.testing.assert_close(both, torch.cat(one_way))


@given(
    n=st.integers(1, 12),
    size=st.integers(1, 600),
    batches=st.lists(st.integers(0, 400), max_size=4),
    temperature=st.floats(0.002, 10),
    seed=st.integers(0, 100),
)
def test_any_history_of_pushes(n, size, batches, temperature, seed):
    queue = MoCoQueue(size, 6, torch.float64)
    kept = torch.empty(0, 6, dtype=torch.float64)
    for batch in batches:
        keys = random_rows(batch, 6, torch.float64, seed=seed + batch)
        queue.push_(keys)
        kept = torch.cat((kept, F.normalize(keys, dim=1)))[-size:]
    query, key = (random_rows(n, 6, torch.float64, seed=seed + s) for s in (1, 2))
    truth = by_definition(query, key, kept, temperature).mean()
    for backend in BACKENDS:
        loss = moco_loss(query, key, queue, temperature, backend=backend)
        torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9 / temperature)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_step_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()

    def step(query, key, queue):
        loss = moco_loss(query, key, queue, backend=backend)
        queue.push_(key)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = (MoCoQueue(20, 8, backend=backend) for _ in range(2))
    for seed in range(4):
        query, key = random_rows(7, 8, seed=seed).requires_grad_(), random_rows(7, 8, seed=seed + 9)
        losses = [function(query, key, queue) for function, queue in ((step, eager), (compiled, traced))]
        grads = [torch.autograd.grad(loss, query)[0] for loss in losses]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)
        assert all(same_bits(a, b) for a, b in zip(eager.buffers(), traced.buffers(), strict=True))


def test_module_passes_everything_on():
    queue, query, key = pushed_queue(20, 8, (20,)), random_rows(6, 8), random_rows(6, 8, seed=1)
    options = {"normalize": False, "symmetric": True, "reduction": "none", "backend": "chunked"}
    assert same_bits(
        MoCoLoss(0.2, **options)(query, key, queue), moco_loss(query, key, queue, 0.2, **options)
    )
    assert same_bits(MoCoLoss()(query, key), moco_loss(query, key))
    assert "temperature=0.2" in repr(MoCoLoss(0.2))


def test_autocast_widens_and_changes_nothing_else():
    queue, query, key = pushed_queue(20, 8, (20,)), random_rows(6, 8), random_rows(6, 8, seed=1)
    expected = moco_loss(query, key, queue)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(moco_loss(query, key, queue), expected)
        mixed = moco_loss(query, key.bfloat16(), queue)
    assert mixed.dtype == torch.float32
    assert same_bits(mixed, moco_loss(query, key.bfloat16().float(), queue))


@every_backend
def test_nan_propagates(backend):
    queue, query, key = pushed_queue(20, 8, (20,)), random_rows(6, 8), random_rows(6, 8, seed=1)
    query[2, 3] = math.nan
    loss = moco_loss(query, key, queue, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("change, error, message", [
    ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    ({"key": torch.zeros(5, 8)}, ValueError, "key must have 6 rows as query has, got 5"),
    ({"key": torch.zeros(6, 8).double()}, TypeError, "key must be float32 as query is, got float64"),
    ({"queue": [1.0]}, TypeError, "queue must be a MoCoQueue or a tensor, got list"),
    ({"queue": torch.zeros(9, 7)}, ValueError, r"queue must have shape \(K, 8\) with K >= 1, got \(9, 7\)"),
    ({"queue": torch.zeros(0, 8)}, ValueError, r"queue must have shape \(K, 8\) with K >= 1, got \(0, 8\)"),
    ({"queue": torch.zeros(9, 8).double()}, TypeError, "queue must be floating, and float64 goes with float64"),
    ({"queue": torch.zeros(9, 8).long()}, TypeError, "queue must be floating"),
    ({"queue": torch.zeros(9, 8, device="meta")}, ValueError, "queue must be on cpu as query is, got meta"),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
    ({"reduction": "max"}, ValueError, "reduction must be"),
    ({"query": torch.zeros(5, 8), "key": torch.zeros(5, 8), "symmetric": True}, ValueError,
     "query must have an even number of rows with symmetric, got 5"),
    ({"backend": "cuda"}, ValueError, 'backend must be "native", '),
])  # fmt: skip
def test_refuses_what_does_not_fit(change, error, message):
    call = {"query": random_rows(6, 8), "key": random_rows(6, 8, seed=1), "queue": MoCoQueue(9, 8)} | change
    with pytest.raises(error, match=f"^moco_loss: {message}"):
        moco_loss(**call)


def test_a_backend_that_recomputes_raises_after_a_push(monkeypatch):
    """As the Triton kernels do with rows wider than their tiles: no expectation is kept, the queue is read again."""
    queue, key = pushed_queue(50, 8, (50,)), random_rows(7, 8, seed=1)
    for name, table in (("fwd", operation._fwd), ("bwd", operation._bwd)):
        monkeypatch.setitem(table, "triton", getattr(chunked, f"contrastive_{name}"))
    forward = operation._fwd["triton"]
    monkeypatch.setitem(operation._fwd, "triton", lambda *args: forward(*args[:-2], False, False))
    chosen = {"contrastive": "triton"}
    for module in ("ssl_kernels.backends", "ssl_kernels.losses._shared"):
        monkeypatch.setattr(f"{module}.choose_backend", lambda op, *_, **__: chosen.get(op, "chunked"))
    query = random_rows(7, 8).requires_grad_()
    loss = moco_loss(query, key, queue)
    (found,) = torch.autograd.grad(loss, query, retain_graph=True)
    queue.push_(key)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    wide = query.detach().double().requires_grad_()
    truth = by_definition(wide, key.double(), pushed_queue(50, 8, (50,)).keys.double(), 0.07).mean()
    torch.testing.assert_close(found.double(), torch.autograd.grad(truth, wide)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows, columns, others, reason", [
    (torch.float32, torch.bfloat16, (), None),
    (torch.float32, torch.float16, (False,), None),
    (torch.bfloat16, torch.bfloat16, (True,), None),
    (torch.bfloat16, torch.float16, (), "go with rows of that dtype or float32, not torch.bfloat16"),
    (torch.bfloat16, torch.float32, (), "go with rows of that dtype or float32, not torch.bfloat16"),
    (torch.float32, torch.bfloat16, (True,), "get no gradient and no sums of their own"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_which_dtypes_go_together_on_cuda(monkeypatch, backend, rows, columns, others, reason):
    class Extension:
        build_info = staticmethod(lambda: {"cuda_architectures": "8.0"})

    monkeypatch.setattr(operation.backends, "extension", Extension)
    x, y = (
        SimpleNamespace(dtype=d, device=torch.device("cuda"), requires_grad=False) for d in (rows, columns)
    )
    monkeypatch.setattr("ssl_kernels.triton.contrastive.unsupported", lambda *_: None)
    found = operation.unsupported(backend, x, y, *others)
    assert found is None if reason is None else reason in found
    if rows != columns:
        y.requires_grad = True
        assert operation.unsupported(backend, x, y)
        with torch.no_grad():
            assert (operation.unsupported(backend, x, y, *others) is None) == (reason is None)


def test_says_which_backends_can_run():
    assert ssl_kernels.backends_for(moco_loss, random_rows(6, 8))["native"] is None
