"""Counters of modules: integers in buffers, whatever is done to the module."""

import torch


def after_apply(before, after):
    """The counter after `Module._apply` made `after` of `before`: an integer, and 0 where it was given new memory."""
    if before.is_meta and not after.is_meta:
        return torch.zeros_like(after, dtype=before.dtype)
    return after if after.dtype == before.dtype else before.to(after.device)
