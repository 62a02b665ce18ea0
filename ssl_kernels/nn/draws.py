"""Random numbers of the mixing modules: where they come from, and the distributions that are drawn from."""

import hashlib
import itertools
import numbers
import weakref
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import get_worker_info

_SEED = "seed"  # in a state, in place of a device: nothing has been drawn yet
_handles = itertools.count()
_by_handle = weakref.WeakValueDictionary()
_by_generator = weakref.WeakValueDictionary()  # from its id: the Draws that holds it


class MixingDraw(NamedTuple):
    """What one call of `Mixup` has drawn, on the device of the batch."""

    permutation: torch.Tensor  # (B,) int64, the partner of each sample
    lam: torch.Tensor  # (B,) float32, the share of each sample in its target: pass it to a loss
    # (B,) float32, its share in every pixel: 1 where it is pasted into or left as it is
    pixel_lam: torch.Tensor
    boxes: torch.Tensor | None  # (B, 4) int64, the pixels pasted from the partner; None without CutMix


class Draws:
    """A stream of random numbers: a torch.Generator, a seed for one on the device of the first batch, or torch's own.

    A stream of its own is copied and pickled with its state, as bytes: torch.Generator, pickled for a worker that is
    spawned, sends memory that is gone when the worker opens it. In a DataLoader's worker the stream begins anew from
    its state and the worker's seed, which torch draws for every worker and epoch.
    """

    def __init__(self, generator=None):
        self._generator = generator if isinstance(generator, torch.Generator) else None
        seeded = generator is not None and self._generator is None
        self._pending = (_SEED, int(generator).to_bytes(16, "little", signed=True)) if seeded else None
        self._worker = None  # the seed of the worker that it is already folded with
        self._register()

    @classmethod
    def of(cls, generator):
        """The same Draws for the same torch.Generator, so that modules which share one share it in their copies too."""
        if not isinstance(generator, torch.Generator):
            return cls(generator)
        known = _by_generator.get(id(generator))
        if known is None or known._generator is not generator:
            known = _by_generator[id(generator)] = cls(generator)
        return known

    def _register(self):
        self.handle = next(_handles)
        self.token = torch.zeros(1, dtype=torch.uint8, device="cpu")  # what a compiled draw mutates
        self.own = self._generator is not None or self._pending is not None
        _by_handle[self.handle] = self

    @property
    def generator(self):
        """The torch.Generator, the seed as long as nothing has been drawn, or None."""
        if self._pending is not None and self._pending[0] == _SEED:
            return int.from_bytes(self._pending[1], "little", signed=True)
        return self.on(torch.device("cpu")) if self._pending is not None else self._generator

    def on(self, device):
        """The generator for a batch on `device`, which may lie elsewhere; None: torch's own."""
        if not self.own:
            return None
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker:
            self._fold(worker.seed)
        if self._pending is not None:
            self._begin(device)
        return self._generator

    def device(self, device):
        """Where numbers for a batch on `device` are drawn."""
        if not self.own or torch.compiler.is_compiling():
            return device
        return self.on(device).device

    def uniform(self, shape, device, dtype=torch.float32):
        """In [0, 1)."""
        if not self.own:
            return torch.rand(shape, dtype=dtype, device=device)
        return self._drawn("uniform", shape, device, dtype)

    def gamma(self, concentration, shape, device):
        """Of scale 1, float64."""
        if not self.own and not torch.compiler.is_compiling():
            return torch._standard_gamma(torch.full(shape, concentration, dtype=torch.float64, device=device))
        return self._drawn("gamma", shape, device, torch.float64, concentration)

    def permutation(self, count, device):
        if not self.own:
            return torch.randperm(count, device=device)
        return self._drawn("permutation", (count,), device, torch.int64)

    def _drawn(self, kind, shape, device, dtype, concentration=0.0):
        if torch.compiler.is_compiling() and (self.own or kind == "gamma"):  # which torch 2.11 cannot trace
            return _draw(self.token, self.handle, kind, concentration, shape, dtype, device)
        # Compiled, torch takes no `generator=None` where a size is symbolic.
        options = {"generator": self.on(device)} if self.own else {}
        device = self.device(device)
        if kind == "uniform":
            return torch.rand(shape, dtype=dtype, device=device, **options)
        if kind == "permutation":
            return torch.randperm(shape[0], device=device, **options)
        full = torch.full(shape, concentration, dtype=dtype, device=device)
        return torch._standard_gamma(full, **options)

    def state(self):
        """All that the next draws depend on, as a uint8 tensor; None for torch's own stream."""
        return torch.frombuffer(bytearray(self._bytes()), dtype=torch.uint8).clone() if self.own else None

    def set_state(self, state):
        """Go on as the stream did whose `state()` this was. Torch's own stream is left as it is."""
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError(f"the state of a stream of draws must be a 1-d uint8 tensor, got {state!r}")
        where, separator, payload = bytes(state.tolist()).partition(b"\n")
        if not separator:
            raise ValueError("the state of a stream of draws must be one that state() returned, got another")
        if self.own:
            self._restore(where.decode(), payload)

    def __getstate__(self):
        return {"state": self._bytes() if self.own else None, "worker": self._worker}

    def __setstate__(self, state):
        self._generator, self._pending, self._worker = None, None, state["worker"]
        if state["state"] is not None:
            where, _, payload = state["state"].partition(b"\n")
            self._pending = (where.decode(), payload)
        self._register()

    def _bytes(self):
        if self._pending is not None:
            where, payload = self._pending
        else:
            where, payload = self._generator.device.type, bytes(self._generator.get_state().tolist())
        return where.encode() + b"\n" + payload

    def _restore(self, where, payload):
        """A generator that is there already goes on, for whoever else holds it, as far as its device can."""
        if self._generator is None:
            self._pending = (where, payload)
        elif where == self._generator.device.type:
            self._generator.set_state(_as_tensor(payload))
        elif where == _SEED:
            self._generator.manual_seed(_seed_of(payload))
        else:
            self._generator.manual_seed(_hashed(where.encode(), payload))

    def _begin(self, device):
        (where, payload), self._pending = self._pending, None
        try:
            self._generator = torch.Generator(device if where == _SEED else where)
        except RuntimeError:  # of a device that this machine lacks
            self._generator = torch.Generator(device)
        _by_generator[id(self._generator)] = self
        self._restore(where, payload)

    def _fold(self, seed):
        folded = _hashed(self._bytes(), seed.to_bytes(16, "little", signed=True))
        self._restore(_SEED, folded.to_bytes(16, "little", signed=True))
        self._worker = seed


def is_seed(value):
    """Whether `torch.Generator.manual_seed` takes it."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and -(2**63) <= value < 2**64


def _as_tensor(payload):
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _seed_of(payload):
    return int.from_bytes(payload, "little", signed=True)


def _hashed(*parts):
    digest = hashlib.blake2b(b"\n".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch.Generator takes 63 bits of either sign


@torch.library.custom_op("ssl_kernels::draw", mutates_args=("token",))
def _draw(
    token: torch.Tensor,
    handle: int,
    kind: str,
    concentration: float,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """One draw of the stream with this handle, for a compiled graph, where torch takes no generator.

    The token is written so that draws keep their order and none is left out or made once for two.
    """
    token.add_(1)
    return _by_handle[handle]._drawn(kind, shape, device, dtype, concentration).to(device)


@_draw.register_fake
def _(token, handle, kind, concentration, shape, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


class DrawingModule(nn.Module):
    """A module with a stream of draws, which is in its `state_dict` as a tensor where the stream is its own.

    Checkpoints without it load, and leave the stream as it is.
    """

    _EXTRA = "_extra_state"

    def __init__(self, generator):
        super().__init__()
        self.draws = Draws.of(generator)

    @property
    def generator(self):
        """The torch.Generator, the seed as long as nothing has been drawn, or None."""
        return self.draws.generator

    @generator.setter
    def generator(self, generator):
        self.draws = Draws.of(generator)

    def get_extra_state(self):
        return self.draws.state()

    def set_extra_state(self, state):
        try:
            self.draws.set_state(state)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination[prefix + self._EXTRA] is None:
            del destination[prefix + self._EXTRA]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        own_missing = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, own_missing, *rest)
        missing.extend(key for key in own_missing if key != prefix + self._EXTRA)


_ALPHAS = (1e-300, 1e300)  # beyond, every draw is 0 or 1, or 1/2, as it is there
_SMALL_ALPHA = 0.1  # from here on U^(1/alpha) of the least U, 2⁻⁵³, is a float64


def beta(alpha, count, device, draws):
    """`count` numbers from Beta(alpha, alpha), float32: the share of one of two gammas.

    The gammas of a small alpha underflow, and are drawn in logarithms, of G(a) = G(a + 1) U^(1/a).
    """
    alpha = min(max(float(alpha), _ALPHAS[0]), _ALPHAS[1])
    if alpha >= _SMALL_ALPHA:
        first, second = draws.gamma(alpha, (2, count), device).unbind()
        return (first / (first + second)).float()
    gammas = draws.gamma(alpha + 1, (2, count), device)
    powers = torch.log1p(-draws.uniform((2, count), device, torch.float64)) / alpha
    first, second = torch.log(gammas) + powers
    return torch.sigmoid(first - second).float()


def sides_of(area, height, width):
    """The shares of height and width of a box of this share of the image; a side of 1 is taken in full."""
    if height > 1 and width > 1:
        return (torch.sqrt(area),) * 2
    return (area if height > 1 else torch.ones_like(area)), (area if width > 1 else torch.ones_like(area))


def span_around(centre, side, size):
    """Of a box of `side` times `size` around a centre drawn in [0, 1), what lies inside; begin and end.

    Of an even number of pixels, as in the paper's code, where there are more than two.
    """
    # An integer would be cast first, in each product.
    factor = size if torch.compiler.is_compiling() else float(size)
    length = torch.floor(factor * side).long()
    middle = torch.floor(factor * centre).long()
    if size <= 2:
        begin = middle * (length < size)
        return begin, begin + length
    half = length // 2
    return (middle - half).clamp(0, size), (middle + half).clamp(0, size)


def span_within(place, side, size):
    """A box of `side` times `size`, one pixel at least, its place drawn in [0, 1); begin and end."""
    length = torch.floor(size * side).long().clamp_min(1)
    begin = torch.floor((size - length + 1) * place).long()
    return begin, begin + length
