"""Which backend runs a call: what each one can run, which is preferred, and how to force one.

| name | what | where |
|---|---|---|
| `native` | C++ on CPU tensors, CUDA C++ on CUDA tensors | the built extension `ssl_kernels._C` |
| `triton` | Triton kernels | CUDA tensors |
| `chunked` | plain PyTorch in row blocks | any device |
| `reference` | plain PyTorch, the whole matrix of logits in memory | any device; the oracle, never picked by itself |
"""

import importlib.util

import torch

from ssl_kernels.preference import architecture_of, prefer, runs_on

BACKENDS = ("native", "triton", "chunked", "reference")

try:
    from ssl_kernels import _C as extension

    extension_missing = None
except ImportError as error:
    extension = None
    extension_missing = f"the extension ssl_kernels._C is not built or does not load ({error})"

triton_missing = None if importlib.util.find_spec("triton") else "the package triton is not installed"

OLDEST_FOR_TRITON = 80

_forced = None
_operations = {}
_preferences = {}


class use_backend:
    """Run every later call on one backend, until changed; as a context manager, until the block ends.

        use_backend("chunked")             # from here on
        with use_backend("reference"):     # inside the block
            loss = nt_xent_loss(z0, z1)

    Args:
        name: "native", "triton", "chunked", "reference", or None for the automatic choice. An explicit
            `backend=` argument of a call goes first.

    Raises:
        ValueError: name is none of these.
    """

    def __init__(self, name):
        global _forced
        if name is not None and name not in BACKENDS:
            raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        self._previous = _forced
        _forced = name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _forced
        _forced = self._previous


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


def backends_for(op, *args):
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
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{caller}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")


def choose_backend(op, backend, caller, *tensors, views=1):
    """The backend that runs this call: the one asked for, the one forced by `use_backend`, or the first that can.

    The operation has `views` times the rows of the first tensor.
    """
    unsupported = _operations[op]
    wanted = backend if backend is not None else _forced
    if wanted is None:
        for candidate in _order(op, *tensors, views=views):
            if unsupported(candidate, *tensors) is None:
                return candidate
    check_name(caller, wanted)
    reason = unsupported(wanted, *tensors)
    if reason is not None:
        raise ValueError(f'{caller}: backend "{wanted}" cannot run this call: {reason}')
    return wanted
