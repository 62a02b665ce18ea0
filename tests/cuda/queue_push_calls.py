"""Calls csrc/cuda/queue_push.h on tensors."""

import ctypes

from tests.cuda.launching import DTYPE_CODES, strides
from tests.gpu_emulation import STREAM
from tests.support.queue_push import Ring


class Args(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("storage_dtype", "key_dtype", "normalize", "reserved")],
        *[(name, ctypes.c_int64) for name in ("K", "B", "D")],
        ("key_strides", ctypes.c_int64 * 2),
        *[(name, ctypes.c_void_p) for name in ("storage", "keys", "position", "filled")],
    ]


def push_on(library):
    """`queue_push_` by the launchers, which returns the launches."""

    def push(storage, keys, position, filled, normalize, **options):
        args = Args(
            storage_dtype=DTYPE_CODES[storage.dtype],
            key_dtype=DTYPE_CODES[keys.dtype],
            normalize=normalize,
            K=len(storage),
            B=len(keys),
            D=storage.shape[1],
            key_strides=strides(keys),
            storage=storage.data_ptr(),
            keys=keys.data_ptr(),
            position=position.data_ptr(),
            filled=filled.data_ptr(),
        )
        buffers = {"storage": storage, "position": position, "filled": filled, "keys": keys}
        return library.call(
            "queue_push", ctypes.byref(args), STREAM, buffers=buffers, read_only={"keys"}, **options
        )

    return push


def ring_on(library, *args, **start):
    return Ring(push_on(library), *args, **start)
