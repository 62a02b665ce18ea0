"""The memory that the CPU kernels hold between calls."""

from collections.abc import Iterator
from contextlib import contextmanager

from ssl_kernels import backends


@contextmanager
def kept_at_most(limit: int) -> Iterator[None]:
    """Losses of the CPU that keep at most so many bytes of logits for backward each, with the same bits.

    Inside a lower limit that one stays.
    """
    if backends.extension is None:
        yield
        return
    before = backends.extension.keep_at_most(limit)
    backends.extension.keep_at_most(min(before, limit))
    try:
        yield
    finally:
        backends.extension.keep_at_most(before)


def empty_cache() -> None:
    """Give back to the system the memory that the CPU kernels hold to use it again, as `torch.cuda.empty_cache` does.

    All losses of the process together keep at most 122 MB (116 MiB) of logits from forward to backward, beside what
    grows with N · D; what does not fit is computed again in backward, with the same bits. What backward has freed
    stays with the kernels for their next call; that and what is kept are at most 134 MB (128 MiB). This returns what
    is idle, and calls that follow fetch it again. Memory in use is left alone. Safe in any thread.

    On GPUs the memory is torch's, and so is the function.
    """
    if backends.extension is not None:
        backends.extension.empty_cache()
