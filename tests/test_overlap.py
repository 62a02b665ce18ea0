"""Which tensors lie in each other's memory, and that none is overwritten that is read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels.overlap import share_memory
from tests.helpers import same_bits


@st.composite
def views(draw):
    """Two views of one piece of memory, of any strides, places and widths of elements."""
    memory = torch.zeros(96, dtype=torch.int64)
    found = []
    for _ in range(2):
        elements = memory.view(draw(st.sampled_from([torch.int64, torch.int16, torch.uint8])))
        dims = draw(st.integers(0, 3))
        shape = [draw(st.integers(1, 4)) for _ in range(dims)]
        strides = [draw(st.integers(0, 9)) for _ in range(dims)]
        reach = sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
        place = draw(st.integers(0, len(elements) - 1 - reach))
        found.append(elements.as_strided(shape, strides, place))
    return found


def bytes_of(tensor):
    indices = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        indices = (indices[..., None] + stride * torch.arange(size)).flatten()
    width = tensor.element_size()
    begins = (indices.flatten() * width + tensor.data_ptr()).tolist()
    return {begin + k for begin in begins for k in range(width)}


@given(views())
def test_exactly_those_that_share_a_byte(pair):
    x, other = pair
    expected = bool(bytes_of(x) & bytes_of(other))
    assert share_memory(x, other) == share_memory(other, x) == expected


def test_large_views_are_told_apart_at_once():
    """Images and masks side by side in one tensor, and every other row, column and sample."""
    batch = torch.zeros(64, 4, 500, 500)
    apart = [(batch[:, :3], batch[:, 3:]), (batch[..., ::2], batch[..., 1::2]), (batch[::2], batch[1::2])]
    apart.append((batch[..., :250], batch[..., 250:]))
    assert not any(share_memory(*pair) for pair in apart)
    assert share_memory(batch[:, :3], batch[:, 2:]) and share_memory(batch[..., ::2], batch[..., ::3])
    assert not share_memory(torch.zeros(3, device="meta"), torch.zeros(3, device="meta"))


def test_arrays_of_numpy_too():
    """Whose tensors share no storage."""
    array = torch.zeros(8).numpy()
    assert share_memory(torch.from_numpy(array[:5]), torch.from_numpy(array[4:]))
    assert not share_memory(torch.from_numpy(array[:4]), torch.from_numpy(array[4:]))


def test_nothing_that_is_read_is_overwritten():
    x = torch.rand(4, 4, 4, dtype=torch.float64)
    whole = x.view(torch.int64)
    order, boxes = whole[0, 0], whole[1]
    before = x.clone()
    here, none = torch.arange(4), torch.zeros(4, 4, dtype=torch.int64)
    calls = [
        ("permutation", ssl_kernels.mixup_, (x, 0.5, order)),
        ("lam", ssl_kernels.mixup_, (x, x[:, 1, 2], here)),
        ("lam", ssl_kernels.mixup_, (x, x[3, 3, 3], here)),
        ("permutation", ssl_kernels.cutmix_, (x, none, order)),
        ("boxes", ssl_kernels.cutmix_, (x, boxes, here)),
    ]
    for name, function, arguments in calls:
        with pytest.raises(ValueError, match=f"^{function.__name__}: {name} must lie in memory of its own"):
            function(*arguments)
        assert same_bits(x, before)
    wide = torch.rand(4, 5)
    share = wide[:, 4].clone()
    expected = ssl_kernels.mixup(wide[:, :4], share, here.flip(0))
    torch.testing.assert_close(ssl_kernels.mixup_(wide[:, :4], wide[:, 4], here.flip(0)), expected)
    torch.testing.assert_close(wide[:, 4], share)
