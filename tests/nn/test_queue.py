"""`nn.MoCoQueue`: what it holds after pushes and reloads, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from ssl_kernels import moco_loss
from ssl_kernels.nn import MoCoQueue
from tests.helpers import random_rows, same_bits


def reload(queue):
    """A new queue with the state of `queue`, through a file."""
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    size, dim = queue.storage.shape
    other = MoCoQueue(size, dim, queue.storage.dtype)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def same_state(first, second):
    return all(same_bits(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@given(
    size=st.integers(1, 20),
    batches=st.lists(st.integers(0, 45), min_size=1, max_size=6),
    break_at=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_reloaded_in_the_middle_it_ends_bit_for_bit_the_same(size, batches, break_at, dtype):
    queue, interrupted = MoCoQueue(size, 5, dtype), MoCoQueue(size, 5, dtype)
    for step, batch in enumerate(batches):
        if step == break_at:
            interrupted = reload(interrupted)
        keys = random_rows(batch, 5, seed=step)
        queue.push_(keys)
        interrupted.push_(keys)
    assert same_state(queue, interrupted)
    assert len(queue) == min(size, sum(batches))


def test_holds_the_last_keys_normalised():
    queue = MoCoQueue(7, 4)
    keys = random_rows(12, 4)
    for batch in keys.split(5):
        queue.push_(batch)
    held = {tuple(row.tolist()) for row in queue.keys}
    expected = MoCoQueue(12, 4)
    expected.push_(keys)
    assert held == {tuple(row.tolist()) for row in expected.keys[5:]}
    torch.testing.assert_close(expected.keys, F.normalize(keys, dim=1))


def test_keys_and_length_are_those_filled():
    queue = MoCoQueue(7, 4)
    assert len(queue) == 0
    assert queue.keys.shape == (0, 4)
    assert queue.push_(random_rows(3, 4)) is queue
    assert len(queue) == 3
    assert queue.keys.shape == (3, 4)
    assert queue.keys.data_ptr() == queue.storage.data_ptr()  # no copy


def test_state_is_persistent_and_complete():
    assert set(MoCoQueue(3, 2).state_dict()) == {"storage", "position", "filled"}


def test_a_state_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        MoCoQueue(3, 2).load_state_dict(MoCoQueue(4, 2).state_dict())


@pytest.mark.parametrize("strict", [False, True])
def test_a_refused_state_changes_nothing(strict):
    queue = MoCoQueue(3, 2)
    queue.push_(random_rows(2, 2))
    before = copy.deepcopy(queue)
    other = MoCoQueue(5, 2).push_(random_rows(4, 2))
    with pytest.raises(
        RuntimeError, match=r"the MoCoQueue of the checkpoint has \(size, dim\) \(5, 2\), this one \(3, 2\)"
    ):
        queue.load_state_dict(other.state_dict(), strict=strict)
    assert same_state(queue, before)
    state = MoCoQueue(3, 2).state_dict()
    del state["filled"]
    with pytest.raises(RuntimeError, match="Missing key"):
        queue.load_state_dict(state)
    assert same_state(queue, before)
    with pytest.raises(ValueError, match="queue_push_: keys"):
        queue.push_(random_rows(2, 3))
    assert same_state(queue, before)


@pytest.mark.parametrize("change", [
    lambda queue: queue.half(),
    lambda queue: queue.double(),
    lambda queue: queue.to("cpu", torch.bfloat16),
    lambda queue: queue.type(torch.float16),
    lambda queue: queue.to(memory_format=torch.contiguous_format),
    lambda queue: queue.share_memory(),
    lambda queue: copy.deepcopy(queue),
    lambda queue: pickle.loads(pickle.dumps(queue)),
    lambda queue: queue.to("meta").to_empty(device="cpu"),
    lambda queue: MoCoQueue(5, 4, ids=True, device="meta").to_empty(device="cpu"),
], ids=[*"half double to type layout share deepcopy pickle emptied meta".split()])  # fmt: skip
def test_any_move_keeps_the_pointers_or_empties_the_queue(change, request):
    queue = MoCoQueue(5, 4, ids=True).push_(random_rows(7, 4), torch.arange(7))
    kept = request.node.callspec.id not in ("emptied", "meta")
    changed = change(queue)
    assert changed.position.dtype == changed.filled.dtype == changed.ids.dtype == torch.int64
    assert (int(changed.position), len(changed)) == ((2, 5) if kept else (0, 0))
    assert changed.storage.isfinite().all()
    changed.push_(random_rows(1, 4, seed=9), torch.tensor([9]))
    assert changed.ids.tolist() == ([5, 6, 9, 3, 4] if kept else [9, 0, 0, 0, 0])
    expected = torch.zeros(5, 4)
    expected[2 if kept else 0] = F.normalize(random_rows(1, 4, seed=9))[0]
    written = changed.storage[2 if kept else 0].float()
    torch.testing.assert_close(written, expected[2 if kept else 0], rtol=2**-7, atol=0)


def test_made_under_inference_mode_it_is_written_outside():
    with torch.inference_mode():
        queue = MoCoQueue(5, 4)
        queue.push_(random_rows(2, 4))
    queue.push_(random_rows(1, 4))
    assert len(queue) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_compiled_twice_whatever_the_fill_and_batch():
    """The loss and the push, as the queue fills up and with batches that change."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    eager, traced = MoCoQueue(20, 8), MoCoQueue(20, 8)

    def step(queue, query, key):
        loss = moco_loss(query, key, queue)
        queue.push_(key)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for i, batch in enumerate((4, 4, 6, 3, 7, 5, 9, 4, 30, 2, 8, 6)):
        query, key = random_rows(batch, 8, seed=i), random_rows(batch, 8, seed=i + 50)
        torch.testing.assert_close(compiled(traced, query, key), step(eager, query, key))
        assert same_state(eager, traced)
    assert graphs.frame_count <= 2


def test_copies_and_casts_keep_the_state():
    queue = MoCoQueue(5, 4)
    queue.push_(random_rows(7, 4))
    other = copy.deepcopy(queue)
    assert same_state(queue, other)
    other.push_(random_rows(1, 4))
    assert not same_state(queue, other)
    cast = copy.deepcopy(queue).to(torch.bfloat16)
    assert cast.storage.dtype == torch.bfloat16
    assert cast.position.dtype == torch.int64
    assert len(cast) == 5


def test_without_normalisation_keys_stay_as_they_are():
    queue, keys = MoCoQueue(5, 4, normalize=False), random_rows(3, 4)
    queue.push_(keys)
    assert same_bits(queue.keys.contiguous(), keys)


@pytest.mark.parametrize("arguments, error, message", [
    ((0, 4), ValueError, "size must be at least 1, got 0"),
    ((4, -1), ValueError, "dim must be at least 1, got -1"),
    ((2.5, 4), TypeError, "size must be an int, got float"),
    ((True, 4), TypeError, "size must be an int, got bool"),
    ((4, 4, torch.int8), TypeError, "dtype must be float64, float32, float16 or bfloat16, got torch.int8"),
])  # fmt: skip
def test_refuses_what_no_queue_can_be(arguments, error, message):
    with pytest.raises(error, match=f"^MoCoQueue: {message}"):
        MoCoQueue(*arguments)


def test_refuses_an_unknown_backend_before_it_pushes():
    with pytest.raises(ValueError, match=r"^MoCoQueue: backend must be .* or None, got 'gpu'"):
        MoCoQueue(4, 4, backend="gpu")


def test_refuses_keys_of_another_width():
    with pytest.raises(ValueError, match=r"^queue_push_: keys must have shape \(B, 4\), got \(3, 5\)"):
        MoCoQueue(5, 4).push_(random_rows(3, 5))


def test_an_empty_queue_is_true():
    queue = MoCoQueue(4, 3)
    assert len(queue) == 0 and (queue or None) is queue


class Card:
    """What the host sees of a CUDA device: copies, which arrive where `arrives` says so, and captures."""

    def __init__(self, monkeypatch):
        self.arrives, self.capturing, self.copies = True, False, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda: Arrival(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(MoCoQueue, "_is_watched", lambda queue: not torch.compiler.is_compiling())


class Arrival:
    def __init__(self, card):
        self.card, self.done = card, False

    def record(self, stream):
        self.card.copies += 1
        self.done = self.card.arrives

    def query(self):
        self.done |= self.card.arrives
        return self.done


def gives_all_rows(queue):
    """Whether the loss gets the whole storage and nothing to leave out."""
    columns, row_ids, column_ids = queue.negatives(2)
    every = columns is queue.storage and row_ids is column_ids is None
    if queue.has_ids:
        own = torch.zeros(2, dtype=torch.int64)
        columns, row_ids, column_ids, bias = queue.negatives_with_ids(own)
        assert row_ids is own
        assert (columns is queue.storage and column_ids is queue.ids and bias is None) == every
    return every


def given_rows(queue):
    """How many rows the loss gets without anything to leave out, or None."""
    columns, row_ids, column_ids = queue.negatives(2)
    given = columns.shape[0] if row_ids is column_ids is None else None
    if queue.has_ids:
        with_ids, _, of_columns, bias = queue.negatives_with_ids(torch.zeros(2, dtype=torch.int64))
        assert (bias is None) == (given is not None)
        assert with_ids.shape[0] == of_columns.shape[0] == (given or queue.storage.shape[0])
    return given


@pytest.mark.parametrize("ids", [False, True])
def test_on_a_card_the_loss_gets_the_rows_that_the_host_knows_to_be_filled(ids, monkeypatch):
    card, queue = Card(monkeypatch), MoCoQueue(20, 4, ids=ids)
    monkeypatch.setattr(MoCoQueue, "__len__", lambda queue: pytest.fail("the host waits for the device"))

    def push(count):
        queue.push_(random_rows(count, 4), torch.arange(count) if ids else None)

    assert given_rows(queue) is None  # a checkpoint may have been broadcast into it
    card.arrives = False
    push(3)
    push(2)
    assert given_rows(queue) is None and card.copies == 1
    card.arrives = True
    assert given_rows(queue) == 5
    card.arrives = False
    push(4)
    assert given_rows(queue) == 9 and card.copies == 2
    push(1)
    assert given_rows(queue) == 10
    queue.filled.data.add_(6)  # past autograd, as collectives write: corrected by the next copy
    card.arrives = True
    assert given_rows(queue) == 10
    push(1)
    assert given_rows(queue) == 17
    push(5)
    assert given_rows(queue) == 20 and gives_all_rows(queue)


@pytest.mark.parametrize("ids", [False, True])
def test_on_a_card_a_queue_known_to_be_full_has_nothing_to_leave_out(ids, monkeypatch):
    card, queue = Card(monkeypatch), MoCoQueue(7, 4, ids=ids)

    def push(count):
        queue.push_(random_rows(count, 4), torch.arange(count) if ids else None)

    card.arrives = False
    push(6)
    push(3)
    assert not gives_all_rows(queue)  # the host does not know yet, and does not wait
    push(1)
    assert card.copies == 1  # still on its way
    card.arrives = True
    assert gives_all_rows(queue)
    push(1)
    push(3)
    assert gives_all_rows(queue) and card.copies == 1  # full for good
    card.capturing = True
    assert not gives_all_rows(queue)  # replayed when nobody knows
    push(1)
    card.capturing = False
    assert not gives_all_rows(queue)
    push(1)
    assert gives_all_rows(queue)


@pytest.mark.parametrize("write", [
    lambda queue: queue.filled.zero_(),
    lambda queue: queue.load_state_dict(MoCoQueue(7, 4).state_dict()),
    lambda queue: queue.to("meta").to_empty(device="cpu"),
    lambda queue: torch.compile(lambda: queue.filled.zero_() and None, backend="aot_eager")(),
], ids=[*"zeroed loaded emptied compiled".split()])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_on_a_card_a_queue_that_others_write_to_is_not_taken_as_full(write, monkeypatch):
    Card(monkeypatch)
    queue = MoCoQueue(7, 4).push_(random_rows(7, 4))
    assert gives_all_rows(queue)
    write(queue)
    assert len(queue) == 0 and not gives_all_rows(queue)
    queue.push_(random_rows(6, 4))
    assert not gives_all_rows(queue)
    queue.push_(random_rows(1, 4))
    assert gives_all_rows(queue)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda queue: pickle.loads(pickle.dumps(queue))])
def test_a_copy_of_a_full_queue_finds_out_by_itself(copied, monkeypatch):
    Card(monkeypatch)
    queue = MoCoQueue(7, 4).push_(random_rows(7, 4))
    other = copied(queue)
    assert gives_all_rows(queue) and not gives_all_rows(other)
    assert gives_all_rows(other.push_(random_rows(1, 4)))
