"""Writes small PTX kernels around a few instructions, for the tests of the emulator."""

import numpy as np

BLOCK = 64

# PTX type of a value: numpy's dtype, the register that holds it, how it is loaded and stored.
TYPES = {
    "u8": (np.uint8, "b16"),
    "s8": (np.int8, "b16"),
    "u16": (np.uint16, "b16"),
    "s16": (np.int16, "b16"),
    "b16": (np.uint16, "b16"),
    "f16": (np.float16, "b16"),
    "u32": (np.uint32, "b32"),
    "s32": (np.int32, "b32"),
    "b32": (np.uint32, "b32"),
    "f32": (np.float32, "f32"),
    "u64": (np.uint64, "b64"),
    "s64": (np.int64, "b64"),
    "b64": (np.uint64, "b64"),
    "f64": (np.float64, "f64"),
}


def evaluate(gpu, body, outputs, *inputs, **options):
    """Runs `body` in one thread for each element of the inputs.

    Args:
        gpu: A runner; `gpu.module` loads PTX.
        body: Statements. They find the thread's element of input i in %a<i> and leave output i in %d<i>;
            %t<20> are 32-bit, %q<20> 64-bit registers and %p<10> predicates to use, %i is its number.
        outputs: PTX types, keys of TYPES.
        inputs: (PTX type, array of n elements) each; the array is converted to the type's dtype.

    Returns:
        One array of n elements an output; the array itself where there is one output.
    """
    arrays = [np.ascontiguousarray(values).astype(TYPES[kind][0]) for kind, values in inputs]
    n = len(arrays[0]) if arrays else BLOCK
    results = [np.full(n, 0x5A, TYPES[kind][0]) for kind in outputs]
    kinds = [kind for kind, _ in inputs]
    lines = []
    for i, kind in enumerate(kinds):
        lines += [f".reg .{TYPES[kind][1]} %a{i};", *_element_address(i, TYPES[kind][0])]
        lines += [f"ld.global.{_memory_type(kind)} %a{i}, [%address];"]
    for i, kind in enumerate(outputs):
        lines += [f".reg .{TYPES[kind][1]} %d{i};"]
    lines += ["{", body, "}"]
    for i, kind in enumerate(outputs):
        lines += _element_address(len(kinds) + i, TYPES[kind][0])
        lines += [f"st.global.{_memory_type(kind)} [%address], %d{i};"]
    text = kernel(lines, len(kinds) + len(outputs), n, gpu.arch)
    grid = ((n + BLOCK - 1) // BLOCK,)
    gpu.module(text).launch("snippet", grid, (BLOCK,), [*arrays, *results], **options)
    return results[0] if len(results) == 1 else results


def kernel(lines, pointers, n, arch, name="snippet", module_scope=""):
    """A kernel of `pointers` parameters of 64 bits, whose threads beyond n return at once."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    return "\n".join(
        [
            f".version {'8.0' if arch <= 90 else '8.7'}",  # the first that knows every card of today
            f".target sm_{arch}{'a' if arch == 90 else ''}",
            ".address_size 64",
            module_scope,
            f".visible .entry {name}({parameters})",
            "{",
            ".reg .b32 %i, %ntid, %ctaid, %t<20>;",
            ".reg .b64 %address, %offset, %q<20>;",
            ".reg .pred %outside, %p<10>;",
            "mov.u32 %i, %tid.x;",
            "mov.u32 %ntid, %ntid.x;",
            "mov.u32 %ctaid, %ctaid.x;",
            "mad.lo.u32 %i, %ctaid, %ntid, %i;",
            f"setp.ge.u32 %outside, %i, {n};",
            "@%outside bra DONE;",
            *lines,
            "DONE: ret;",
            "}",
        ]
    )


def launch(gpu, lines, arrays, *, threads=32, grid=1, shared=0, module_scope="", **options):
    """Runs `lines` in `grid` blocks of `threads`; register %b<i> holds the address of arrays[i]."""
    head = [f".reg .b64 %b<{max(1, len(arrays))}>;"]
    for i in range(len(arrays)):
        head += [f"ld.param.u64 %b{i}, [p{i}];", f"cvta.to.global.u64 %b{i}, %b{i};"]
    text = kernel(head + lines, len(arrays), grid * threads, gpu.arch, module_scope=module_scope)
    return gpu.module(text).launch("snippet", (grid,), (threads,), list(arrays), shared=shared, **options)


def at(base, index, size):
    """Lines that leave base + index * size in %address."""
    return [f"mul.wide.u32 %offset, {index}, {size};", f"add.u64 %address, {base}, %offset;"]


def bfloat16_bits(values):
    """float32 values rounded to bfloat16, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits):
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _memory_type(kind):
    return "b16" if kind == "f16" else kind


def _element_address(parameter, dtype):
    return [
        f"ld.param.u64 %address, [p{parameter}];",
        "cvta.to.global.u64 %address, %address;",
        f"mul.wide.u32 %offset, %i, {np.dtype(dtype).itemsize};",
        "add.u64 %address, %address, %offset;",
    ]
