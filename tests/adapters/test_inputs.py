"""Inputs of other kinds than a plain training's, against the libraries where they are installed."""

import contextlib
import warnings
from dataclasses import dataclass

import pytest
import torch

from benchmarks.peers import Originals
from tests.adapters.uses import Case, adapter, all_uses, largest_error, results

SEEDS = range(2)


@dataclass
class Kind(Case):
    """A case whose leaves are transposed in memory, or of which only some get a gradient, or with other integers.

    `widened`: float64 tensors of the numbers that the case has in its dtype.
    """

    transposed: bool = False
    wants_gradient: tuple = (True,)
    integer: torch.dtype = torch.int64
    widened: bool = False

    def fit(self, tensor):
        return tensor.double() if self.widened else tensor

    def rows(self, n=None, d=None, *shape, grad=True):
        rows = self.fit(super().rows(n, d, *shape, grad=False))
        return self.leaf(rows) if grad else rows

    def images(self, *shape):
        return self.fit(super().images(*shape))

    def leaf(self, tensor):
        tensor = self.fit(tensor)
        if self.transposed and tensor.dim() > 1:
            tensor = tensor.mT.contiguous().mT
        wanted = self.wants_gradient[len(self.leaves) % len(self.wants_gradient)]
        self.leaves.append(tensor.detach().requires_grad_(wanted))
        return self.leaves[-1]

    def integers(self, high, *shape):
        return super().integers(high, *shape).to(self.integer)

    def pick(self, *choices):
        return choices[int(super().integers(len(choices), 1))]


KINDS = {
    "transposed": {"transposed": True},
    "gradient of the first": {"wants_gradient": (True, False)},
    "gradient of the second": {"wants_gradient": (False, True)},
    "one sample": {"n": 1},
    "one column": {"n": 5, "d": 1},
    "more than a tile": {"n": 70, "d": 130},
    "int32": {"integer": torch.int32},
    "uint8": {"integer": torch.uint8},
    "float labels": {"integer": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {},
}
AUTOCAST_TOLERANCE = 0.06
TOLERANCE = 5e-4  # in float32


def outcome(use, space, kind, seed, **more):
    """Results and gradients, or the error."""
    options = {"n": 6, "d": 8, "temperature": 0.2, "dtype": use.dtype or torch.float32} | KINDS[kind]
    case = Kind(seed=seed, **options, **more)
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()
    with warnings.catch_warnings(), autocast:
        warnings.simplefilter("ignore")  # of the library
        try:
            return results(use, space, case)
        except Exception as error:
            return error


@pytest.mark.parametrize("use", [use for use in all_uses() if use.peer], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_itself(use, kind):
    """The same numbers; where the library takes an input, so does the adapter, or says why not in words.

    In float16 and bfloat16 the numbers are the library's in float64, for the inputs as rounded.
    """
    try:
        space = Originals(use.library)
    except ImportError as error:
        pytest.skip(f"the library is not installed (make test-peers installs all): {error}")
    narrow = KINDS[kind].get("dtype")
    tolerance = AUTOCAST_TOLERANCE if kind == "autocast" else TOLERANCE
    for seed in SEEDS:
        found, expected = (outcome(use, one, kind, seed) for one in (adapter(use.library), space))
        if isinstance(found, Exception):
            assert isinstance(expected, Exception) or (
                isinstance(found, (ValueError, TypeError)) and " must " in str(found)
            ), found
        elif not isinstance(expected, Exception):
            if narrow:  # a library's own sums may be off by a fifth
                exact = outcome(use, space, kind, seed, widened=True)
                expected = expected if isinstance(exact, Exception) else exact
                tolerance = (
                    2 * torch.finfo(narrow).eps
                )  # results are rounded, and sums of two gradients once more
            assert largest_error(found, expected) <= tolerance
