"""`nn.MoCoQueue`: what it holds after pushes and reloads, and what it refuses."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

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


def test_refuses_keys_of_another_width():
    with pytest.raises(ValueError, match=r"^queue_push_: keys must have shape \(B, 4\), got \(3, 5\)"):
        MoCoQueue(5, 4).push_(random_rows(3, 5))


def test_an_empty_queue_is_true():
    queue = MoCoQueue(4, 3)
    assert len(queue) == 0 and (queue or None) is queue
