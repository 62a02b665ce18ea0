"""Warnings that name the line of the program that called, not one of ours."""

import sys
import warnings

import torch


def warn(message, category=UserWarning, beyond=()):
    """A warning of the nearest line of the call that lies outside this package, torch and the packages `beyond`."""
    if torch.compiler.is_compiling():
        warnings.warn(message, category, stacklevel=2)
        return
    inside = {"ssl_kernels", "torch", "importlib", *beyond}
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
