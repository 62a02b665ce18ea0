"""What the adapters share: dtypes of results, and the way back to the libraries that they stand for."""

import importlib
import warnings

from ssl_kernels.ops.library import accumulation_dtype

originals = {}  # from a replaced class or function, as `patch` left it in its library, to the library's own
_warned = set()


def mean(losses, like):
    """The mean of float64 losses a row, in the accumulation dtype of `like`."""
    return losses.mean(dtype=accumulation_dtype(like))


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
    warn_once(f"{why}: {module}.{name} itself runs", 4)
    return originals.get(found, found)


def warn_once(message, stacklevel=3):
    """A warning that a process sees once."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=stacklevel)
