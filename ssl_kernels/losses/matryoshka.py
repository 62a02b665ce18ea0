"""Matryoshka: a loss over several prefixes of the embeddings' width."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssl_kernels.checks import is_number, is_whole

OP = "matryoshka"


def matryoshka(
    loss: Callable[..., torch.Tensor], dims: Sequence[int], weights: Sequence[float] | None = None
) -> "Callable[..., torch.Tensor] | Matryoshka":
    """A loss that is the weighted sum of `loss` over prefixes of the embeddings: the first `dims[k]` features of each.

        loss = matryoshka(info_nce_loss, [64, 128, 256], weights=[1, 1, 2])
        loss(query, positive_key, temperature=0.05)

    The prefixes are views: nothing is copied, and each pass of the loss reads what it needs of the full rows. Rows are
    normalised anew at each width, as the loss does it.

    Args:
        loss: A loss function of this library or one of its modules. What is cut are the floating tensors of two or more
            dimensions among its arguments whose last dimension is the width of the first one of them: embeddings.
            Everything else is passed on, so that temperatures, labels, ids and weights hold for all widths.
        dims: Widths, each at least 1 and at most that of the embeddings.
        weights: A number for each width, or None: 1 each.

    Returns:
        A function of the arguments of `loss`, with its results added up. A module for a module, whose parameters are
        those of `loss`.

    Raises:
        TypeError, ValueError: dims or weights are not as above; when called, dims that are wider than the embeddings, a
            queue that holds rows normalised at full width, or what `loss` raises.

    Source: Kusupati et al., Matryoshka Representation Learning, arXiv:2205.13147, eq. 1.
    """
    dims = _checked_dims(dims)
    weights = _checked_weights(weights, len(dims))
    if isinstance(loss, torch.nn.Module):
        return Matryoshka(loss, dims, weights)
    if not callable(loss):
        raise TypeError(f"{OP}: loss must be a function or a module, got {type(loss).__name__}")

    @functools.wraps(loss)
    def over_prefixes(*args, **kwargs):
        return _sum(loss, dims, weights, args, kwargs)

    return over_prefixes


class Matryoshka(torch.nn.Module):
    """What `matryoshka` makes of a module."""

    def __init__(
        self, loss: Callable[..., torch.Tensor], dims: Sequence[int], weights: Sequence[float]
    ) -> None:
        super().__init__()
        self.loss, self.dims, self.weights = loss, dims, weights

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _sum(self.loss, self.dims, self.weights, args, kwargs)

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, weights={list(self.weights)}"


def _sum(loss, dims, weights, args, kwargs):
    tensors = [value for value in (*args, *kwargs.values()) if _is_embedding(value)]
    if not tensors:
        raise TypeError(f"{OP}: the loss must be given embeddings, got no floating tensor of two dimensions")
    width = tensors[0].shape[-1]
    if max(dims) > width:
        raise ValueError(f"{OP}: dims must be at most the width {width} of the embeddings, got {max(dims)}")
    if any(hasattr(value, "negatives") for value in (*args, *kwargs.values())):
        raise TypeError(
            f"{OP}: the loss must be given no MoCoQueue, whose rows have unit length only at full width"
        )

    def is_cut(value):
        return _is_embedding(value) and value.shape[-1] == width

    places = [place for place, value in enumerate(args) if is_cut(value)]
    names = [name for name, value in kwargs.items() if is_cut(value)]
    total = None
    for dim, weight in zip(dims, weights, strict=True):
        if dim == width:
            value = loss(*args, **kwargs)
        else:
            prefixes = list(args)
            for place in places:
                prefixes[place] = args[place].narrow(-1, 0, dim)
            value = loss(*prefixes, **kwargs | {name: kwargs[name].narrow(-1, 0, dim) for name in names})
        if weight != 1:
            value = weight * value
        total = value if total is None else total + value
    return total


def _is_embedding(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2


def _checked_dims(dims):
    dims = tuple(dims)
    for dim in dims:
        if not is_whole(dim):
            raise TypeError(f"{OP}: dims must be integers, got {type(dim).__name__}")
        if dim < 1:
            raise ValueError(f"{OP}: dims must be at least 1, got {dim}")
    if not dims:
        raise ValueError(f"{OP}: dims must hold at least one width, got none")
    return tuple(map(int, dims))


def _checked_weights(weights, count):
    if weights is None:
        return (1.0,) * count
    weights = tuple(weights)
    if len(weights) != count:
        raise ValueError(f"{OP}: weights must be {count} numbers as dims has, got {len(weights)}")
    for weight in weights:
        if not is_number(weight):
            raise TypeError(f"{OP}: weights must be numbers, got {type(weight).__name__}")
    return tuple(map(float, weights))
