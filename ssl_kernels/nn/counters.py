"""Counters of modules: integers in buffers, whatever is done to the module, and what the host knows of them."""

import torch


def after_apply(before, after):
    """The counter after `Module._apply` made `after` of `before`: an integer, and 0 where it was given new memory."""
    if before.is_meta and not after.is_meta:
        return torch.zeros_like(after, dtype=before.dtype)
    return after if after.dtype == before.dtype else before.to(after.device)


class Fullness:
    """Whether a ring on a CUDA device is full, as far as the host knows without waiting for the device.

    A copy of the fill count follows a push to the host. Once one that has arrived shows a full ring, it stays full,
    since pushes never empty it. A write by others, which the version of the tensor shows, makes it unknown again.
    """

    def __init__(self):
        self._filled = self._version = None  # the fill count, and its version after the last push
        self._full = False
        self._copy = self._arrival = None

    def __reduce__(self):
        return Fullness, ()  # a copy of a module, or one from a file, has counters of its own

    def known(self, filled, size):
        """Whether `filled`, 0-d, is known to be `size`; never inside a graph capture, whose replays come later."""
        if not self.follows(filled) or torch.cuda.is_current_stream_capturing():
            return False
        if not self._full and self._arrival.query():
            self._full = self._copy.item() >= size
        return self._full

    def follows(self, filled):
        """Whether nobody but `pushed` has seen a write to `filled`."""
        return filled is self._filled and filled._version == self._version

    def pushed(self, filled, followed):
        """Call after a push, with what `follows` said before it."""
        if filled.is_inference() or torch.cuda.is_current_stream_capturing():
            self._filled = None
            return
        if not followed or not (self._full or not self._arrival.query()):
            self._full = False
            self._copy = filled.detach().to("cpu", non_blocking=True, copy=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(filled.device))
        self._filled, self._version = filled, filled._version
