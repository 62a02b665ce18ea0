"""Calls csrc/cuda/batch_hard.h on tensors, and holds what it chose to float64."""

import ctypes

import torch

from tests.cuda.launching import DTYPE_CODES, launch, strides
from tests.support import batch_hard as support


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


def check_choice(library, x, labels, normalize, distance, *, tf32=False, **options):
    """Holds the choice to float64; returns launches."""
    found, launches = batch_hard(library, x, labels, normalize, distance, tf32=tf32, **options)
    support.check_choice(found, x, labels, normalize, distance, tf32=tf32)
    return launches


def check_indices(library, x, labels, distance, **options):
    """Where every key is exact or NaN; returns the choice."""
    found, _ = batch_hard(library, x, labels, False, distance, **options)
    support.check_indices(found, x, labels, distance)
    return found
