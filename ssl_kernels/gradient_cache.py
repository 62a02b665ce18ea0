"""A contrastive batch that is larger than memory: gradients of the whole batch, mini-batch by mini-batch."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ssl_kernels.checks import is_whole
from ssl_kernels.memory import empty_cache, kept_at_most

OP = "grad_cache"


def grad_cache(
    loss: Callable[..., torch.Tensor],
    encoders: Callable[..., Any] | Sequence[Callable[..., Any]],
    inputs: Any,
    mini_batch_size: int | Sequence[int],
    *,
    scaler: torch.amp.GradScaler | None = None,
    sync: bool = True,
) -> torch.Tensor:
    """One step's backward for a batch whose activations do not fit: the gradients are those of the whole batch.

        value = grad_cache(clip, (image_encoder, text_encoder), (images, texts), mini_batch_size=64)
        optimizer.step()

    Embeds all mini-batches without a graph, takes the loss of all embeddings once with its gradients, then embeds each
    mini-batch again with a graph, whose backward gets its rows of these gradients. Memory is that of one mini-batch and
    of the embeddings with their gradients, or while the loss runs that of the loss; those of this library keep no
    logits for backward here. Time is that of one more forward. Random numbers (dropout) and buffers (running averages)
    are those of the first time when a mini-batch is embedded the second time, and move on once per step. Layers that
    look across their batch, as batch normalisation, see mini-batches.

    Under DistributedDataParallel gradients are averaged once, at the last mini-batch, whatever the number of
    mini-batches, which may differ from rank to rank; `fully_shard` gathers weights at every mini-batch, so that all
    ranks need as many, and reduces gradients once.

    Args:
        loss: `loss(*embeddings)` -> scalar, of what the encoders return for all rows: of this library, over several
            ranks (`ssl_kernels.distributed`), or any other. Parameters in it get their gradient.
        encoders: A module or function, or a sequence of them. They may be wrapped in DistributedDataParallel or
            sharded, be the same one for several inputs, or be frozen: one without a parameter or input that needs a
            gradient is run once. What one returns is a tensor, or tuples, lists and dicts of tensors, with a row for
            each of the mini-batch; tensors without dimensions, as a learned scale, are taken from its last mini-batch.
        inputs: For each encoder: a tensor, a tuple or list of arguments, or a dict of keyword arguments. All tensors in
            them of one dimension or more have one row per sample; the rest is passed as it is.
        mini_batch_size: Rows a mini-batch, or one number for each encoder.
        scaler: A GradScaler, whose factor the gradients get, or None.
        sync: False leaves the gradients of this rank as they are, for a step accumulated from several calls.

    Returns:
        The loss, detached. Gradients are added to `.grad`. Under `torch.no_grad()` it is the loss alone.

    Raises:
        TypeError, ValueError: Numbers of encoders and inputs that differ, inputs without rows or of different numbers
            of them, a mini-batch size that is no whole number from 1, a loss that is no scalar.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv:2101.06983.
    """
    encoders, inputs, sizes = _checked(encoders, inputs, mini_batch_size)
    parts = [
        _Part(index, encoder, mini_batch)
        for index, (encoder, given, size) in enumerate(zip(encoders, inputs, sizes, strict=True))
        for mini_batch in _mini_batches(given, size)
    ]
    wanted = torch.is_grad_enabled()
    again = [part for part in parts if wanted and _needs_gradient(part.encoder, part.inputs)]
    buffers = _Buffers(part.encoder for part in again)
    with torch.no_grad(), _without_sync(encoders):
        for part in parts:
            part.embed_first()
    # Casts that autocast keeps were made without a graph, and would be taken for the weights.
    torch.clear_autocast_cache()

    wholes = [_Whole([part for part in parts if part.index == index]) for index in range(len(encoders))]
    for whole in wholes:
        whole.join({id(part) for part in again})
    with kept_at_most(0):  # logits that it kept for backward would be more than all else here
        value = loss(*(whole.embeddings for whole in wholes))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{OP}: loss must return one number, got {got}")
    if not wanted:
        return value.detach()
    if not value.requires_grad:
        raise ValueError(f"{OP}: loss must need a gradient: no encoder, input or parameter of the loss does")
    with _outside_autocast():
        parameters = _differentiate(value if scaler is None else scaler.scale(value), wholes)
    empty_cache()  # what the loss worked in makes room for the graphs

    buffers.restore()
    after = _random_state(inputs)
    # The last of every encoder go backward together, so that its gradients are complete in one backward.
    last = {id(_module(part.encoder)): part for part in again}
    lasts = list(last.values())
    for part in again:
        if part not in lasts:
            with _without_sync([part.encoder]):
                part.embed_again()
                _backward(part.outputs, part.gradients)
            part.outputs = None
    with contextlib.nullcontext() if sync else _without_sync(encoders):
        for part in lasts:
            part.embed_again()
        outputs = [output for part in lasts for output in part.outputs]
        gradients = [gradient for part in lasts for gradient in part.gradients]
        _backward(outputs + [p for p, _ in parameters], gradients + [g for _, g in parameters])
    _set_random_state(after)
    return value.detach()


def _checked(encoders, inputs, mini_batch_size):
    """Encoders, inputs and mini-batch sizes as lists of one length."""
    if not isinstance(encoders, (list, tuple, nn.ModuleList)):
        encoders, inputs = [encoders], [inputs]
    encoders, inputs = list(encoders), list(inputs)
    if len(encoders) != len(inputs) or not encoders:
        raise ValueError(f"{OP}: inputs must be {len(encoders)}, one for each encoder, got {len(inputs)}")
    sizes = [mini_batch_size] * len(encoders) if is_whole(mini_batch_size) else mini_batch_size
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(encoders) or not all(map(is_whole, sizes)):
        raise TypeError(
            f"{OP}: mini_batch_size must be a whole number, or one for each encoder, got {mini_batch_size!r}"
        )
    if min(sizes) < 1:
        raise ValueError(f"{OP}: mini_batch_size must be at least 1, got {min(sizes)}")
    for index, (encoder, given) in enumerate(zip(encoders, inputs, strict=True)):
        if not callable(encoder):
            raise TypeError(f"{OP}: encoders must be callable, got {type(encoder).__name__}")
        rows = {leaf.shape[0] for leaf in tree_leaves(given) if _has_rows(leaf)}
        if len(rows) != 1:
            raise ValueError(
                f"{OP}: inputs[{index}] must hold tensors with the same number of rows, got {sorted(rows) or None}"
            )
    return encoders, inputs, sizes


def _has_rows(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _mini_batches(given, size):
    """`given` in parts; of no rows one part without, so that an encoder meets the other ranks."""
    leaves, spec = tree_flatten(given)
    rows = next(leaf.shape[0] for leaf in leaves if _has_rows(leaf))
    for start in range(0, max(rows, 1), size):
        yield tree_unflatten(
            [leaf[start : start + size] if _has_rows(leaf) else leaf for leaf in leaves], spec
        )


def _module(encoder):
    """What an encoder is: two methods of one module are of that module."""
    return getattr(encoder, "__self__", encoder)


def _needs_gradient(encoder, inputs):
    module = _module(encoder)
    if any(leaf.requires_grad for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)):
        return True
    return not isinstance(module, nn.Module) or any(p.requires_grad for p in module.parameters())


class _Part:
    """One mini-batch of one encoder."""

    def __init__(self, index, encoder, inputs):
        self.index, self.encoder, self.inputs = index, encoder, inputs
        self.outputs = self.gradients = self.spec = self.random_state = None

    def embed_first(self):
        self.random_state = _random_state(self.inputs)
        self.outputs, self.spec = tree_flatten(self._run())

    def embed_again(self):
        """`outputs` with a graph, but for those without a gradient."""
        _set_random_state(self.random_state)
        outputs = tree_leaves(self._run())
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, self.gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        self.outputs, self.gradients = [output for output, _ in pairs], [gradient for _, gradient in pairs]

    def _run(self):
        if isinstance(self.inputs, dict):
            return self.encoder(**self.inputs)
        if isinstance(self.inputs, (tuple, list)):
            return self.encoder(*self.inputs)
        return self.encoder(self.inputs)


class _Whole:
    """All rows that one encoder embeds."""

    def __init__(self, parts):
        self.parts = parts

    def join(self, again):
        """Make `embeddings` of the mini-batches' outputs: leaves, which need a gradient if their encoder runs again."""
        columns = zip(*(part.outputs for part in self.parts), strict=True)
        self.leaves = []
        for outputs in columns:
            leaf = torch.cat(outputs) if _has_rows(outputs[-1]) else outputs[-1]
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaf = leaf.detach().requires_grad_(id(self.parts[-1]) in again)
            self.leaves.append(leaf)
        self.rows = [[o.shape[0] if _has_rows(o) else 0 for o in part.outputs] for part in self.parts]
        self.embeddings = tree_unflatten(self.leaves, self.parts[0].spec)
        for part in self.parts:
            part.outputs = None

    @property
    def differentiable(self):
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def hand_out(self, gradients):
        """Each mini-batch its rows of `gradients`, a dict by the id of a leaf."""
        starts = [0] * len(self.leaves)
        for part, rows in zip(self.parts, self.rows, strict=True):
            part.gradients = []
            for place, leaf in enumerate(self.leaves):
                gradient = gradients.get(id(leaf))
                if gradient is not None and _has_rows(leaf):
                    gradient = gradient[starts[place] : starts[place] + rows[place]]
                elif part is not self.parts[-1]:
                    gradient = None  # what has no rows counts once
                starts[place] += rows[place]
                part.gradients.append(gradient)


def _differentiate(value, wholes):
    """Hand the gradients of the loss to the mini-batches; [(parameter, gradient)] of what else the loss depends on.

    Those gradients wait: under DistributedDataParallel they belong to the one backward in which all are complete.
    """
    embeddings = [leaf for whole in wholes for leaf in whole.differentiable]
    known = {id(leaf) for leaf in embeddings}
    parameters = [leaf for leaf in _leaves_of(value) if id(leaf) not in known]
    found = torch.autograd.grad(value, embeddings + parameters, allow_unused=True)
    # A loss that leaves an embedding out has gradient 0, which the encoder still needs to meet the other ranks.
    gradients = {
        id(leaf): torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(embeddings, found, strict=False)
    }
    for whole in wholes:
        whole.hand_out(gradients)
    of_parameters = zip(parameters, found[len(embeddings) :], strict=True)
    return [(parameter, gradient) for parameter, gradient in of_parameters if gradient is not None]


def _leaves_of(value):
    """The leaves that need a gradient in the graph of `value`."""
    leaves, seen, ahead = [], set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        ahead.extend(following for following, _ in node.next_functions)
    return leaves


def _backward(outputs, gradients):
    if outputs:
        with _outside_autocast():
            torch.autograd.backward(outputs, gradients)


@contextlib.contextmanager
def _outside_autocast():
    """A backward chooses the dtypes of its forward itself."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _without_sync(encoders):
    """Backward passes in which gradients stay on their rank."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = {id(_module(encoder)): _module(encoder) for encoder in encoders}
    with contextlib.ExitStack() as stack:
        sharded = []
        for module in modules.values():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif fsdp is not None and isinstance(module, nn.Module):
                sharded += [child for child in module.modules() if isinstance(child, fsdp.FSDPModule)]
        for child in sharded:
            child.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for child in sharded:
                child.set_requires_gradient_sync(True, recurse=False)


class _Buffers:
    """The buffers of modules as they are now: the second time a mini-batch is embedded, it meets those of the first."""

    def __init__(self, encoders):
        modules = {id(_module(encoder)): _module(encoder) for encoder in encoders}
        buffers = [b for m in modules.values() if isinstance(m, nn.Module) for b in m.buffers()]
        self.saved = [(buffer, buffer.detach().clone()) for buffer in buffers]

    @torch.no_grad()
    def restore(self):
        for buffer, value in self.saved:
            buffer.copy_(value)


def _random_state(inputs):
    """The states of the generators that forwards of these inputs draw from."""
    devices = {leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.is_cuda}
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


def _set_random_state(state):
    torch.set_rng_state(state[0])
    for device, of_device in state[1].items():
        torch.cuda.set_rng_state(of_device, device)
