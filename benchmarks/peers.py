"""What people use today: the implementations that ours are compared with."""

import importlib.util
import pathlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks import plain_losses
from benchmarks.harness import Implementation
from ssl_kernels import adapters
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


def plain_siglip_loss(image_features, text_features, logit_scale, logit_bias):
    """SigLIP as open_clip writes it, in one process."""
    x, y = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = (logit_scale * x @ y.T + logit_bias).to(x.dtype)
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum(dtype=logit_scale.dtype) / len(x)


def siglip_peers(logits_bytes):
    """Baselines of SigLIP: plain PyTorch, the same compiled.

    Args:
        logits_bytes: Of one N × N matrix.
    """
    extra_bytes = MATRICES_OF_LOGITS * logits_bytes
    return [
        Implementation("plain PyTorch", plain_siglip_loss, baseline=True, extra_bytes=extra_bytes),
        Implementation("torch.compile", compiled(plain_siglip_loss), baseline=True, extra_bytes=extra_bytes),
    ]


def plain_triplet_loss(embeddings, labels, margin=0.2):
    """Batch-hard triplet loss from the dense matrix of distances; every label has two rows at least.

    In float32 whatever the dtype of the rows: in less the hardest rows are others.
    """
    x = F.normalize(embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings, dim=1)
    squares = x.square().sum(1)
    squared = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=0)
    zero = squared == 0
    distances = (squared + zero * 1e-16).sqrt() * ~zero
    return _hardest_of(distances, labels, margin)


def cdist_triplet_loss(embeddings, labels, margin=0.2):
    """The same over torch.cdist."""
    x = F.normalize(embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings, dim=1)
    return _hardest_of(torch.cdist(x, x), labels, margin)


def _hardest_of(distances, labels, margin):
    same = labels[:, None] == labels
    farthest = (distances * same).max(1).values
    nearest = distances.masked_fill(same, torch.inf).min(1).values
    return F.relu(farthest - nearest + margin).mean()


def triplet_peers(distances_bytes):
    """Baselines of the batch-hard triplet loss: plain PyTorch, the same compiled, torch.cdist.

    Args:
        distances_bytes: Of one N × N matrix.
    """
    extra_bytes = MATRICES_OF_LOGITS * distances_bytes
    functions = {
        "plain PyTorch": plain_triplet_loss,
        "torch.compile": compiled(plain_triplet_loss),
        "torch.cdist": cdist_triplet_loss,
    }
    return [
        Implementation(name, function, baseline=True, extra_bytes=extra_bytes)
        for name, function in functions.items()
    ]


class Originals:
    """The names of an adapter as its library itself has them.

    Args:
        library: Name of a module in `ssl_kernels.adapters`.

    Raises:
        ImportError: The library is not installed.
    """

    def __init__(self, library):
        originals = getattr(adapters, library).ORIGINALS
        if not originals:
            raise ImportError(f"{library} is not a package")
        for name, module in originals.items():
            setattr(self, name, getattr(_module(library, module), name))


def _module(library, name):
    if library != "solo_learn":
        return importlib.import_module(name)
    # The package itself cannot be imported any more: it asks for one that is gone.
    root, *path = name.split(".")
    spec = importlib.util.find_spec(root)
    if spec is None:
        raise ImportError(f"{root} is not installed")
    file = pathlib.Path(spec.submodule_search_locations[0], *path).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class _PlainSupCon:
    """SupContrast's loss of unit rows (B, V, D)."""

    def __call__(self, features, labels):
        rows = torch.cat(features.unbind(1))
        return plain_losses.plain_sup_con_of_units(rows, labels.repeat(features.shape[1]))


def _plain_in_batch_neg_loss(q_reps, p_reps):
    return F.cross_entropy(q_reps @ p_reps.T / 0.02, torch.arange(len(q_reps), device=q_reps.device))


# Of libraries that are no packages.
RESTATED = {
    "flag_embedding": SimpleNamespace(in_batch_neg_loss=_plain_in_batch_neg_loss),
    "sup_contrast": SimpleNamespace(SupConLoss=_PlainSupCon),
}
