"""What people use today: the implementations that ours are compared with."""

import torch

from benchmarks.harness import Implementation
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

MATRICES_OF_LOGITS = 6  # that plain PyTorch code holds at its worst moment, estimated from above


def nt_xent_peers(temperature, logits_bytes):
    """Baselines of NT-Xent: plain PyTorch, the same compiled, lightly.

    Args:
        logits_bytes: Of one 2B × 2B matrix.
    """
    extra_bytes = MATRICES_OF_LOGITS * logits_bytes

    def plain(z0, z1):
        return plain_nt_xent_loss(z0, z1, temperature)

    return [
        Implementation("plain PyTorch", plain, baseline=True, extra_bytes=extra_bytes),
        Implementation("torch.compile", compiled(plain), baseline=True, extra_bytes=extra_bytes),
        lightly_nt_xent(temperature, extra_bytes),
    ]


def compiled(function):
    """`function` compiled for the shapes of its calls alone, and nothing kept of other cases."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def lightly_nt_xent(temperature, extra_bytes):
    """NTXentLoss of lightly (pip install lightly)."""
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        return Implementation("lightly", None, baseline=True, missing="lightly is not installed")
    return Implementation("lightly", NTXentLoss(temperature), baseline=True, extra_bytes=extra_bytes)
