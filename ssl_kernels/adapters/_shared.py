"""What the adapters share: dtypes of results, and the way back to the libraries that they stand for."""

import importlib
import sys

import torch
from torch import nn

from ssl_kernels.checks import check_scalar
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.losses._shared import inverse
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.warning import warn

originals = {}  # from a replaced class or function, as `patch` left it in its library, to the library's own
_warned = set()


class LibraryMethod:
    """A method that an adapter never calls. A program that does, as a subclass's own forward, gets the original's."""

    def __set_name__(self, owner, name):
        self.owner, self.name = owner, name

    def __get__(self, instance, kind=None):
        if instance is None:
            return self
        name = self.owner.__name__
        whole = original(sys.modules[self.owner.__module__].ORIGINALS[name], name, f"{name}.{self.name}")
        return getattr(whole, self.name).__get__(instance)


class Closed:
    """A base of adapters: a subclass that replaces a `LibraryMethod` is refused, not ignored."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in vars(cls):
            if any(isinstance(vars(base).get(name), LibraryMethod) for base in cls.__mro__[1:]):
                raise TypeError(
                    f"{cls.__name__}: a subclass of this adapter must leave {name} alone, which it never calls:"
                    " derive it from the original"
                )


def is_plain_cross_entropy(module):
    """Whether it is `nn.CrossEntropyLoss` itself, to which nobody listens."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is nn.CrossEntropyLoss and not any(hooks)


def classes_of(adapter):
    """`__getattr__` of an adapter's module whose classes are derived from its library's.

    They lie in the module of the adapter's name after an underscore, which imports the library.
    """
    package, _, name = adapter.rpartition(".")

    def find(attribute):
        classes = sys.modules[adapter].ORIGINALS
        if attribute in classes:
            return getattr(importlib.import_module(f"{package}._{name}"), attribute)
        raise AttributeError(
            f"module {adapter!r} has no attribute {attribute!r}: it holds {', '.join(sorted(classes))}, and what else"
            f" {name} has is imported from there"
        )

    return find


def scale_of(caller, temperature, rows, *, positive=True):
    """1 / temperature for rows, which must be > 0, or without `positive` not 0."""
    check_scalar(caller, "temperature", temperature, rows, positive=positive)
    if not isinstance(temperature, torch.Tensor) and temperature == 0:
        raise ValueError(f"{caller}: temperature must not be 0, got {temperature}")
    return inverse(temperature, rows)


def mean(losses, like):
    """The mean of float64 losses, one per row, in the accumulation dtype of `like`."""
    return losses.mean(dtype=accumulation_dtype(like))


def minus_mean_cosine(x, y, caller):
    """−1 / N · Σ <x̂_i, ŷ_i> of rows (N, D), with gradients to both."""
    return row_pairs_loss(
        x, y, factor=-1.0, normalize=True, measure="product", reduction="mean", caller=caller
    )


def original(module, name, why):
    """The library's own class or function `name`, with one warning that it runs.

    Args:
        why: What the kernels have no operation for; begins the warning and the error message.

    Raises:
        ImportError: The library is not installed.
    """
    library = module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(f"{why}: that is left to {library}, which cannot be imported ({error})") from error
    warn_once(f"{why}: {module}.{name} itself runs", library)
    return originals.get(found, found)


def warn_of_fallback(name, library, why):
    """Says once that a call of an adapter runs the original's code. `why`: what the kernels do not cover."""
    warn_once(
        f"{name}: {library}'s own code runs, at its speed: the kernels here do not cover {why}", library
    )


def warn_once(message, library):
    """A warning that a process sees once, of the line that called the adapter or its library."""
    if message not in _warned:
        _warned.add(message)
        warn(message, beyond=(library,))
