"""Manifold mixup: the hidden features of one layer mixed inside a model."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ssl_kernels import mixing
from ssl_kernels.checks import check_whole
from ssl_kernels.nn.draws import DrawingModule
from ssl_kernels.nn.mixing import Mixup
from ssl_kernels.nn.wrapped import WRAPPED

_OPTIONS = {
    "prob",
    "mode",
    "pairing",
    "label_smoothing",
    "num_classes",
    "dense_target",
    "target_kind",
    "backend",
}
_HOST = torch.device("cpu")
_ONE_THREAD = "ManifoldMixup: module must run in one thread at a time, got a second one"


class ManifoldMixup(DrawingModule):
    """A model with the hidden features of one layer mixed, the layer drawn anew each call.

        model = ManifoldMixup(resnet, ["layer1", "layer2"], alpha=2.0, num_classes=10)
        logits, target = model(images, target)
        loss = F.cross_entropy(logits, target)

    In evaluation mode the model runs as it is. The layer is drawn on the host, everything else as `Mixup` draws it;
    in a compiled call on the device, and there every layer is run with shares, those of the others 1.

    Mixing is a part of the layers' own `forward`, under a class of their own that passes everything else on, so that
    a compiled model, whatever part of it, mixes too, and one that is computed again in backward (activation
    checkpointing) mixes as it did at first. Copies and pickles of a layer are of the class that it had.

    Args:
        module: The model, called with one batch.
        layers: Names of submodules, as in `module.named_modules()` (with or without what wrappers put in), whose
            outputs (B, ...) may be mixed. One that runs several times in a call is mixed the first time.
        alpha: λ is drawn from Beta(alpha, alpha), > 0.
        mix_input: The input counts as one more layer.
        batch_dim: The dimension of the layers' outputs that counts samples: 1 for sequence-first ones, (T, B, D). None:
            the first, and 3-d outputs that are B long in the first two, where this cannot be told, are refused.
        input_batch_dim: The same of the input.
        generator: As in `Mixup`; the layer is drawn from one of its own on the CPU with the same seed.
        **options: Of `Mixup`: prob, mode, pairing, label_smoothing, num_classes, dense_target, target_kind,
            backend.

    Raises:
        TypeError: An option that is none of these.
        ValueError: No layers, a name that the module does not have, an option outside its range.

    Source: Verma et al., Manifold Mixup, arXiv:1806.05236.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        alpha: float = 2.0,
        *,
        mix_input: bool = True,
        batch_dim: int | None = None,
        input_batch_dim: int = 0,
        generator: torch.Generator | int | None = None,
        **options: Any,
    ) -> None:
        names = {_plain_name(name) for name, _ in module.named_modules()} - {""}
        unknown = [name for name in layers if _plain_name(name) not in names]
        if unknown:
            raise ValueError(f"ManifoldMixup: layers must be submodules of module, got {unknown}")
        other = options.keys() - _OPTIONS
        if other:
            raise TypeError(f"ManifoldMixup: options must be of {sorted(_OPTIONS)}, got {sorted(other)}")
        if not layers and not mix_input:
            raise ValueError("ManifoldMixup: layers must not be empty without mix_input, got []")
        for name, dim in (("batch_dim", batch_dim), ("input_batch_dim", input_batch_dim)):
            check_whole("ManifoldMixup", name, dim, 0, optional=True)
        mixup = Mixup(alpha, generator=generator, inplace=False, **options)
        super().__init__(generator.initial_seed() if isinstance(generator, torch.Generator) else generator)
        self.module, self.layers, self.mix_input = module, tuple(layers), mix_input
        self.batch_dim, self.input_batch_dim = batch_dim, input_batch_dim
        self.mixup = mixup
        self._latest = None
        self._prepare()

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> Any:
        """Run the model with one layer mixed.

        Args:
            x: The batch, (B, ...).
            target: None, or as in `Mixup`.

        Returns:
            The output alone, or (output, mixed target) as `Mixup` returns it.

        Raises:
            TypeError: The chosen layer's output is no floating tensor.
            ValueError: Its batch dimension is not B or not to be told, or it did not run in this call.
            RuntimeError: The model runs in another thread, or backward could not mix again as the call did.
        """
        draw = self.mixup.draw(x.transpose(0, self.input_batch_dim))
        output = self._run(x, draw) if self.training else self.module(x)
        return output if target is None else (output, self.mixup.mix_target(target, draw))

    def _run(self, x, draw):
        compiling = torch.compiler.is_compiling()
        choices = len(self.layers) + self.mix_input
        if compiling:
            chosen = None
            place = self.draws.uniform((), draw.lam.device, torch.float64)
            here = torch.arange(choices, device=place.device) == (choices * place).long()
        else:
            chosen = self._choice()
            here = (torch.arange(choices, device=_HOST) == chosen).to(draw.lam.device, non_blocking=True)
        shares = torch.where(here[:, None], draw.pixel_lam, 1)  # (choices, B)
        call = _Call(chosen, shares, draw.permutation, self.batch_dim, self.mixup.backend)
        if self.mix_input and chosen in (None, 0):
            x = _mixed("the input", x, shares[0], draw.permutation, self.input_batch_dim, self.mixup.backend)
        layers, parts = self._layers_of(call)
        try:
            for layer, part in zip(layers, parts, strict=True):
                layer._mixing = part
            output = self.module(x)
        finally:
            for layer in layers:
                layer._mixing = None
        for part in parts:
            part.check()
        if not compiling and torch.is_grad_enabled():
            self._remember(call, layers, parts, output)
        return output

    def _layers_of(self, call):
        """The layers as they are now, each once, and their parts in the call."""
        layers, parts = [], []
        for choice, name in enumerate(self.layers, int(self.mix_input)):
            layer = _submodule(self.module, name)
            known = [part for other, part in zip(layers, parts, strict=True) if other is layer]
            if known:
                known[0].choices.append(choice)
                continue
            if not isinstance(layer, _MixedForward):  # put there since
                _prepare_layer(layer)
            if layer._mixing is not None:
                raise RuntimeError(_ONE_THREAD)
            layers.append(layer)
            parts.append(_LayerOfCall(call, name, choice))
        return layers, parts

    def _choice(self):
        """Which of the input, where it counts, and the layers."""
        place = self.draws.uniform((), _HOST, torch.float64)
        return int((len(self.layers) + self.mix_input) * place)

    def _prepare(self):
        """Give the layers their class."""
        for name in self.layers:
            _prepare_layer(_submodule(self.module, name))

    def _remember(self, call, layers, parts, output):
        """As long as the graph of the output lives, or until the next call, backward may run a layer again."""
        call.end = torch.autograd._get_sequence_nr()
        self._latest = call
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.metadata[call] = call
        for layer, part in zip(layers, parts, strict=True):
            call.parts[layer], part.call = part, None  # no cycle: it goes with the graph
            alive = [other for other in layer._calls if other() is not None]
            layer._calls = [*alive, weakref.ref(call)]

    def __getstate__(self):
        state = self.__dict__.copy()
        state["_latest"] = None
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self._prepare()


class _Call:
    """What one call of a ManifoldMixup mixes, and where."""

    def __init__(self, chosen, shares, permutation, batch_dim, backend):
        self.chosen = chosen  # None in a compiled call: the shares say it
        self.shares, self.permutation = shares, permutation
        self.batch_dim, self.backend = batch_dim, backend
        self.records_grad = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()
            self.begin = self.end = torch.autograd._get_sequence_nr()  # of the nodes of its graph
            self.parts = {}  # by layer, once the call has run

    def mix(self, part, features):
        lam = self.shares[part.choices[0]]
        for choice in part.choices[1:]:  # the same layer again: all but one are 1
            lam = lam * self.shares[choice]
        return _mixed(
            f"the output of {part.name!r}", features, lam, self.permutation, self.batch_dim, self.backend
        )


class _LayerOfCall:
    """One layer in one call."""

    def __init__(self, call, name, choice):
        self.call, self.name, self.choices = call, name, [choice]
        self.runs = 0
        self.compiled_without_grad = False

    def run(self, layer, features):
        """The layer's output as it goes on."""
        self.runs += 1
        call = self.call
        if torch.compiler.is_compiling():
            if self.runs > 1:
                return features
            if call.records_grad and not torch.is_grad_enabled():
                self.compiled_without_grad = any(p.requires_grad for p in layer.parameters())
            return call.mix(self, features)
        if call.thread != threading.get_ident():
            raise RuntimeError(_ONE_THREAD)
        if self.runs > 1 or call.chosen not in self.choices:
            return features
        return call.mix(self, features)

    def run_again(self, call, features):
        """The output of a run that the backward of `call` repeats."""
        if call.chosen not in self.choices:
            return features
        if self.runs > 1:
            raise RuntimeError(
                f"ManifoldMixup: layer {self.name!r} must run once in a call to be computed again in backward"
                f" (activation checkpointing), got {self.runs} runs: the first alone is mixed"
            )
        return call.mix(self, features)

    def check(self):
        """After the model ran: the layer was mixed once."""
        chosen = self.call.chosen
        if self.runs == 0 and (chosen is None or chosen in self.choices):
            raise ValueError(
                f"ManifoldMixup: layer {self.name!r} must run in every call of module, got a call without it:"
                " its features were not mixed"
            )
        if self.compiled_without_grad and (chosen is None or chosen in self.choices):
            raise RuntimeError(
                f"ManifoldMixup: layer {self.name!r} must not be compiled inside of a reentrant checkpoint or of"
                " no_grad, got one that is: computed again in backward it would not be mixed; use_reentrant=False, or"
                " compile around the checkpoint"
            )


class _MixedForward:
    """First base of the class of a layer whose output may be mixed; `_plain` is the class that it had."""

    _mixing = None  # a _LayerOfCall while a ManifoldMixup runs
    _calls = ()  # weak references to those whose graphs may run the layer again

    def forward(self, *args, **kwargs):
        return _output_of(self, super().forward(*args, **kwargs))

    @property
    def __class__(self):
        """What pickle, repr and containers that make one of their kind take it for."""
        return self._plain

    @__class__.setter
    def __class__(self, other):
        """By parametrizations and FSDP, which put a class over the plain one; the next call puts this over theirs."""
        _set_class(self, other)

    def __reduce_ex__(self, protocol):
        mixed = type(self)
        _set_class(self, mixed._plain)
        try:
            reduced = list(self.__reduce_ex__(protocol))
        finally:
            _set_class(self, mixed)
        if len(reduced) > 2 and isinstance(reduced[2], dict):
            reduced[2] = {key: value for key, value in reduced[2].items() if key not in ("_mixing", "_calls")}
        return tuple(reduced)


class _MixedCall(_MixedForward):
    """For a layer with a `forward` of its own in the instance, which goes before the class's."""

    def __call__(self, *args, **kwargs):
        return _output_of(self, super().__call__(*args, **kwargs))


_set_class = object.__dict__["__class__"].__set__
_classes = weakref.WeakValueDictionary()
# The call whose layer was last run again in this thread, and in which graph task.
_backward = threading.local()


def _prepare_layer(layer):
    if isinstance(layer, _MixedForward):
        return
    plain = type(layer)
    first = _MixedCall if "forward" in vars(layer) else _MixedForward
    mixed = _classes.get((plain, first))
    if mixed is None:
        names = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
        mixed = _classes[plain, first] = type(plain.__name__, (first, plain), {"_plain": plain, **names})
    _set_class(layer, mixed)
    layer._mixing, layer._calls = None, ()  # in the instance, where compiled code looks for changes


def _output_of(layer, output):
    part = layer._mixing
    if part is not None:
        return part.run(layer, output)
    if torch.compiler.is_compiling() or not layer._calls:
        return output
    call = _call_in_backward(layer)
    return output if call is None else call.parts[layer].run_again(call, output)


def _call_in_backward(layer):
    """The call whose backward is running this layer of it again; None: it runs by itself.

    The node that runs tells its call by its number. A checkpoint inside of one that is computed again has nodes made
    in backward, in a graph task within that of the outer.
    """
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    number = torch._C._current_autograd_node()._sequence_nr()
    for reference in layer._calls:
        call = reference()
        if call is not None and call.begin <= number < call.end:
            if getattr(_backward, "latest", None) is None:
                torch.autograd.Variable._execution_engine.queue_callback(_forget)
            _backward.latest = call, task
            return call
    call, outer = getattr(_backward, "latest", None) or (None, task)
    return call if task != outer and layer in call.parts else None


def _forget():
    _backward.latest = None


def _plain_name(name):
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _submodule(module, name):
    """Of this name, without what wraps it or the modules on the way."""
    module = _unwrapped(module)
    for part in _plain_name(name).split("."):
        module = _unwrapped(module._modules[part])
    return module


def _unwrapped(module):
    for name in WRAPPED:
        if name in module._modules:
            return _unwrapped(module._modules[name])
    return module


def _mixed(name, features, lam, permutation, batch_dim, backend):
    """Features of one layer with their partners' share."""
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"ManifoldMixup: {name} must be a floating tensor, got {kind}")
    batch, shape = permutation.shape[0], tuple(features.shape)
    dim = 0 if batch_dim is None else batch_dim
    if features.dim() <= dim or features.shape[dim] != batch:
        raise ValueError(
            f"ManifoldMixup: {name} must have {batch} samples in dimension {dim}, got {shape};"
            " pass batch_dim where they are in another"
        )
    if batch_dim is None and len(shape) == 3 and batch > 1 and shape[1] == batch:
        raise ValueError(
            f"ManifoldMixup: batch_dim must be given for {name}, got None: its shape {shape} does not"
            " tell whether it is (B, T, D), 0, or (T, B, D), 1"
        )
    if dim == 0:
        return mixing.mixup(features, lam, permutation, backend=backend)
    return mixing.mixup(features.movedim(dim, 0), lam, permutation, backend=backend).movedim(0, dim)
