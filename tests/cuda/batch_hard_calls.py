"""Calls csrc/cuda/batch_hard.h on tensors, and holds what it chose to float64."""

import ctypes

import torch

from ssl_kernels.reference.batch_hard import batch_hard as reference
from tests.cuda.launching import DTYPE_CODES, launch, strides


class Common(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in (
            "dtype", "normalize", "cosine", "allow_tf32", "splits", "reserved",
        )],
        *[(name, ctypes.c_int64) for name in ("N", "D")],
        ("strides", ctypes.c_int64 * 2),
        *[(name, ctypes.c_void_p) for name in ("embeddings", "labels", "workspace")],
    ]  # fmt: skip


class Args(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        ("positive_index", ctypes.c_void_p),
        ("negative_index", ctypes.c_void_p),
    ]


def batch_hard(library, x, labels, normalize, distance, *, splits=0, tf32=False, **options):
    """((positive_index, negative_index), launches)"""
    results = torch.full((2, len(x)), -77, dtype=torch.int64, device=x.device)
    args = Args(
        Common(
            dtype=DTYPE_CODES[x.dtype],
            normalize=normalize,
            cosine=distance == "cosine",
            allow_tf32=tf32,
            splits=splits,
            N=len(x),
            D=x.shape[1],
            strides=strides(x),
            embeddings=x.data_ptr(),
            labels=labels.data_ptr(),
        ),
        results[0].data_ptr(),
        results[1].data_ptr(),
    )
    launches = launch(
        library, "batch_hard", args, {"embeddings": x, "labels": labels}, {"results": results}, **options
    )
    return tuple(results), launches


def random_labels(n, classes, seed=0):
    return torch.randint(-3, classes - 3, (n,), generator=torch.Generator().manual_seed(seed)) * 2**33


def random_rows(n, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def check_choice(library, x, labels, normalize, distance, **options):
    """The chosen keys are within the rounding of a dot product of the best; returns launches."""
    (positive, negative), launches = batch_hard(library, x, labels, normalize, distance, **options)
    wide = x.double().cpu()
    y = torch.nn.functional.normalize(wide, dim=1) if normalize else wide
    keys = -(y @ y.T)
    if distance == "euclidean":
        keys = y.square().sum(1) / 2 + keys
    same = labels.cpu()[:, None] == labels.cpu()[None, :]
    largest = keys.masked_fill(~same | torch.eye(len(x), dtype=torch.bool), -torch.inf).amax(1)
    smallest = keys.masked_fill(same, torch.inf).amin(1)
    norm = y.norm(dim=1)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    unit = 2.0**-10 if options.get("tf32") else 4 * torch.finfo(acc).eps
    slack = unit * norm.max() * (norm + norm.max()) * x.shape[1] ** 0.5 + 1e-300
    for index, best, candidates in (
        (positive.cpu(), largest, same & ~torch.eye(len(x), dtype=torch.bool)),
        (negative.cpu(), smallest, ~same),
    ):
        exists = candidates.any(1)
        assert ((index >= -1) & (index < len(x))).all()
        assert torch.equal(index == -1, ~exists)
        row = torch.arange(len(x))[exists]
        chosen = index[exists]
        assert candidates[row, chosen].all()
        assert ((keys[row, chosen] - best[exists]).abs() <= slack[exists]).all()
    return launches


def check_indices(library, x, labels, distance, **options):
    """Where every key is exact or NaN, the choice is that of the reference to the index."""
    expected = reference(x.double().cpu(), labels.cpu(), False, distance)
    got, _ = batch_hard(library, x, labels, False, distance, **options)
    for ours, right in zip(got, expected, strict=True):
        assert torch.equal(ours.cpu(), right)
    return got
