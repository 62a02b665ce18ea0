"""Which backend runs a call: what each one can run, which is preferred, and how to force one.

| name | what | where |
|---|---|---|
| `native` | C++ on CPU tensors, CUDA C++ on CUDA tensors | the built extension `ssl_kernels._C` |
| `triton` | Triton kernels | CUDA tensors |
| `chunked` | plain PyTorch in row blocks | any device |
| `reference` | plain PyTorch, the whole matrix of logits in memory | any device; the oracle, never picked by itself |
"""

import contextlib
import contextvars
import functools
import importlib.util
import inspect
import pathlib
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ssl_kernels._sources import staleness
from ssl_kernels.checks import check_choice
from ssl_kernels.preference import architecture_of, prefer
from ssl_kernels.warning import warn

_Function = TypeVar("_Function", bound=Callable[..., Any])

BACKENDS = ("native", "triton", "chunked", "reference")

try:
    from ssl_kernels import _C as extension

    extension_missing = None
except ImportError as error:
    extension = None
    if importlib.util.find_spec("ssl_kernels._C") is None:
        extension_missing = "the extension ssl_kernels._C is not built (docs/start.md says how)"
    else:
        extension_missing = f"the extension ssl_kernels._C does not load ({error})"


def _warn_if_stale():
    try:
        built = {} if extension is None else extension.build_info()
    except ValueError:  # an unknown instruction set, which is an error of the first call
        return
    if built and (stale := staleness(built.get("sources"), pathlib.Path(__file__).resolve().parents[1])):
        warn(stale, RuntimeWarning)


_warn_if_stale()


def _multiplies_bfloat16():
    try:
        return extension.build_info()["cpu_instruction_set"] in ("avx512_bf16", "amx")
    # No extension; an unknown instruction set, which is an error of the first call.
    except (AttributeError, ValueError):
        return False


# Whether the C++ kernels of the CPU multiply bfloat16 rows as they are.
MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()

triton_missing = None if importlib.util.find_spec("triton") else "the package triton is not installed"

OLDEST_FOR_TRITON = 80

_operations = {}
_preferences = {}

# What `use_backend` was told. The with-blocks of each context, the outermost first, and the plain calls of the process;
# both change by one atomic step, so that neither threads nor a fork need a lock.
_blocks = contextvars.ContextVar("ssl_kernels.use_backend", default=())
_calls = []
# The same of code that torch.compile traces: it cannot set a context variable, but follows these. Outside compiled code
# there are none, but for a plain call that it made.
_traced_blocks = ()
_traced_call = None


class _State(types.ModuleType):
    """Lets Dynamo read, and guard, what is behind a context variable: it takes attributes of a module as they come."""

    @property
    def in_block(self):
        return bool(_blocks.get())

    @property
    def forced(self):
        """The name that the innermost with-block gave, or without one the last plain call that holds here, or None."""
        blocks = _blocks.get()
        if blocks:
            return blocks[-1].name
        if _calls:
            for call in reversed(_calls[:]):
                if call.holds_here():
                    return call.name
        return None


_state = _State("ssl_kernels.backends._state")


class _Call:
    """A call `use_backend(name)`. While its result may still be entered, it holds in its own thread alone."""

    def __init__(self, name, result=None):
        self.name = name
        self.thread = threading.get_ident()
        self.is_taken_back = False
        self.result = weakref.ref(result) if result is not None else lambda: None

    def is_settled(self):
        # In this order: another thread may take the call back, and drop its result, in between.
        return self.result() is None and not self.is_taken_back

    def holds_here(self):
        return self.is_settled() or (self.thread == threading.get_ident() and not self.is_taken_back)


def _remove(calls):
    for call in calls:
        with contextlib.suppress(ValueError):  # another thread was first
            _calls.remove(call)


class use_backend:
    """Run calls on one backend: inside a block, inside a function, or from now on.

        with use_backend("reference"):     # inside the block
            loss = nt_xent_loss(z0, z1)

        @use_backend("chunked")            # inside each call of the function, which may be `async`
        def validate(...): ...

        use_backend("chunked")             # from here on, in the whole process

    A block holds in its own thread or asyncio task (a context of `contextvars`) and in the tasks that are started
    inside it; no other thread sees anything of it. The innermost block goes first, and blocks may end in any order. A
    plain call holds wherever there is no block, in all threads, also those that start later, until the next plain
    call. (While what it returns is kept in a variable, it holds in the calling thread alone: it may still be entered,
    which takes the call back.) Forked processes begin with what held where they were forked, spawned ones with
    the automatic choice.

    The backward of a loss runs on the backend of its forward, in whatever thread. What torch.compile has compiled is
    compiled again for another choice.

    Args:
        name: "native", "triton", "chunked", "reference", or None for the automatic choice. An explicit
            `backend=` argument of a call goes first.

    Raises:
        ValueError: name is none of these.
    """

    def __init__(self, name: str | None) -> None:
        global _traced_call
        check_choice("use_backend", "name", name, *BACKENDS, None)
        self.name = name
        self._call = None
        self._traced_before = ()
        if torch.compiler.is_dynamo_compiling():
            self._traced_before = (_traced_call,)
            _traced_call = (name,)
            return
        if _traced_call is not None:  # a compiled function made a plain call
            _calls.append(_Call(_traced_call[0]))
            _traced_call = None
        earlier = _calls[:]
        self._call = _Call(name, self)
        _calls.append(self._call)
        settled = [call for call in earlier if call.is_settled()]
        _remove(settled[:-1])  # the last one comes back if this object is entered

    def _take_call_back(self):
        call, self._call = self._call, None
        if call is not None:
            call.is_taken_back = True
            _remove([call])

    def __enter__(self):
        global _traced_blocks, _traced_call
        if torch.compiler.is_dynamo_compiling():
            if self._traced_before:  # made here: its call is taken back
                _traced_call = self._traced_before[0]
                self._traced_before = ()
            _traced_blocks = (*_traced_blocks, self.name)
            return self
        self._take_call_back()
        _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(self, *_):
        global _traced_blocks
        if torch.compiler.is_dynamo_compiling():
            _traced_blocks = _traced_blocks[:-1]
            return
        blocks = _blocks.get()
        for place in reversed(range(len(blocks))):  # not always the last: generators may end out of order
            if blocks[place] is self:
                _blocks.set(blocks[:place] + blocks[place + 1 :])
                break

    def __call__(self, function: _Function) -> _Function:
        """As a decorator."""
        self._take_call_back()
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"use_backend: it must decorate a function that is not a generator, got {function.__qualname__}"
            )
        name = self.name
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def under_backend(*args, **kwargs):
                with use_backend(name):
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def under_backend(*args, **kwargs):
                with use_backend(name):
                    return function(*args, **kwargs)

        return under_backend


def _forced():
    """The backend that `use_backend` forces on a call made here, or None."""
    if _traced_blocks:
        return _traced_blocks[-1]
    if _traced_call is not None and not _state.in_block:
        return _traced_call[0]
    return _state.forced


# Embedded GPUs, which run no machine code of another architecture; 8.8, of which NVIDIA says only that nvcc 13 compiles
# for it, is taken for one: PTX runs in any case.
EMBEDDED = (53, 62, 72, 87, 88, 101, 110)


def runs_on(built, architecture):
    """Whether code built for `built`, as "8.0", "9.0a" or "8.0+PTX", runs on compute capability `architecture` / 10.

    Machine code runs on the later minor versions of its major version, PTX on every later version, where the driver
    compiles it; code for features of one architecture ("a") nowhere else.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    number, _, ptx = built.partition("+")
    major, minor = map(int, number.rstrip("af").split("."))
    target = 10 * major + minor
    if target == architecture:
        return True
    if number.endswith("a"):
        return False
    same_major = architecture // 10 == major and architecture >= target
    return (same_major and architecture not in EMBEDDED) or (ptx == "PTX" and architecture >= target)


def native_unsupported(device):
    """Why the CUDA kernels of the extension cannot run on this GPU, or None if they can."""
    built = extension.build_info()["cuda_architectures"].split()
    if not built:
        return "the extension was built without CUDA"
    architecture = _architecture(device)
    if architecture is None or any(runs_on(each, architecture) for each in built):
        return None
    return (
        f"its CUDA kernels were built for compute capability {', '.join(built)}, which does not run on"
        f" {architecture // 10}.{architecture % 10} (build with TORCH_CUDA_ARCH_LIST; 8.0 is the least)"
    )


def triton_unsupported(device):
    """Why no Triton kernel can run on this GPU, or None."""
    architecture = _architecture(device)
    if architecture is None or architecture >= OLDEST_FOR_TRITON:
        return triton_missing
    return triton_missing or (
        f"its kernels need compute capability 8.0, this GPU has {architecture // 10}.{architecture % 10}"
    )


def _architecture(device):
    """None where there is no GPU to ask: the tensor is a fake one."""
    return architecture_of(device) if torch.cuda.is_available() else None


def register_operation(name, unsupported, preference=()):
    """Declare an operation.

    Args:
        unsupported: `unsupported(backend, *tensors)` tells why a backend cannot run a call, or None.
        preference: A table of `ssl_kernels.preference`: which goes first on a GPU. Without, the order of BACKENDS.
    """
    _operations[name] = unsupported
    _preferences[name] = preference


def preferred(op, *tensors, views=1):
    """(backend to try first, the reason) of a call, before it is asked what can run."""
    if _preferences[op] and tensors and tensors[0].is_cuda:
        entry = prefer(_preferences[op], tensors[0], architecture_of(tensors[0].device), views)
        if entry is not None:
            return entry.backend, entry.reason
    return BACKENDS[0], "it is compiled for this device"


def _order(op, *tensors, views=1):
    if not _preferences[op] or not tensors or not tensors[0].is_cuda:
        return BACKENDS
    first, _ = preferred(op, *tensors, views=views)
    return (first, *[backend for backend in BACKENDS if backend != first])


def operations():
    """Names of the operations, for `backends_for`."""
    return tuple(_operations)


def backends_for(op: str | Callable[..., Any], *args: Any) -> dict[str, str | None]:
    """What can run a call, and for each backend that cannot, the reason.

    Args:
        op: An operation's name ("contrastive"), or a public function such as `ssl_kernels.nt_xent_loss`.
        *args: The call's arguments; only tensors are looked at.

    Returns:
        dict from backend name to None (it can) or the reason why it cannot, in order of preference. The
        first that can, other than "reference", is what `backend=None` picks.

    Raises:
        ValueError: op is unknown.
    """
    name = getattr(op, "operation", op)
    if name not in _operations:
        raise ValueError(f"backends_for: op must be one of {', '.join(_operations)} or a loss, got {op!r}")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    order = _order(name, *tensors, views=getattr(op, "views", 1))
    return {backend: _operations[name](backend, *tensors) for backend in order}


def check_name(caller, backend):
    check_choice(caller, "backend", backend, *BACKENDS, None)


def choose_backend(op, backend, caller, *tensors, views=1):
    """The backend that runs this call: the one asked for, the one forced by `use_backend`, or the first that can.

    The operation has `views` times the rows of the first tensor.
    """
    unsupported = _operations[op]
    wanted = backend if backend is not None else _forced()
    if wanted is None:
        for candidate in _order(op, *tensors, views=views):
            if unsupported(candidate, *tensors) is None:
                return candidate
    check_name(caller, wanted)
    reason = unsupported(wanted, *tensors)
    if reason is not None:
        raise ValueError(f'{caller}: backend "{wanted}" cannot run this call: {reason}')
    return wanted
