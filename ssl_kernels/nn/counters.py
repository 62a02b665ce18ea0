"""Counters and ids of modules: integers in buffers, whatever is done to the module; what the host knows of counters."""

import torch


def after_apply(before, after):
    """Integers that `Module._apply` made of `before`: of their dtype, and 0 where they were given new memory."""
    if before.is_meta and not after.is_meta:
        return torch.zeros_like(after, dtype=before.dtype)
    return after if after.dtype == before.dtype else before.to(after.device)


class Fill:
    """The fill count of a ring on a CUDA device, as far as the host knows it without waiting for the device.

    A copy of the count follows a push to the host. Once one has arrived, the rows pushed since are added, up to the
    size of the ring. Copies follow until the ring is full, since others may write what the host does not see; then it
    stays full, since pushes never empty it. A write by others that the version of the tensor shows makes it unknown
    again.
    """

    def __init__(self):
        self._filled = self._version = None  # the fill count, and its version after the last push
        self._count = None  # as known
        self._copy = self._arrival = None  # of a count that is on its way,
        self._since = 0  # and the rows pushed after it

    def __reduce__(self):
        return Fill, ()  # a copy of a module, or one from a file, has counters of its own

    def known(self, filled, size):
        """The value of `filled`, 0-d, of a ring of `size` rows, or None.

        Never inside a graph capture, whose replays come later.
        """
        if not self.follows(filled) or torch.cuda.is_current_stream_capturing():
            return None
        self._receive(size)
        return self._count

    def follows(self, filled):
        """Whether nobody but `pushed` has seen a write to `filled`."""
        return filled is self._filled and filled._version == self._version

    def pushed(self, filled, size, rows, followed):
        """Call after a push of so many rows, with what `follows` said before it."""
        if filled.is_inference() or torch.cuda.is_current_stream_capturing():
            self._filled = None
            return
        if not followed:
            self._count = self._arrival = None
        self._receive(size)
        self._since += rows
        if self._count is not None:
            self._count = min(size, self._count + rows)
        if self._arrival is None and self._count != size:
            self._since = 0
            self._copy = filled.detach().to("cpu", non_blocking=True, copy=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(filled.device))
        self._filled, self._version = filled, filled._version

    def _receive(self, size):
        if self._arrival is not None and self._arrival.query():
            self._count, self._arrival = min(size, self._copy.item() + self._since), None
