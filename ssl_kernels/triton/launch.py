"""What the launches of all Triton kernels on tiles share: choice of tiles, splits of a walk, kernels over rows."""

import functools

import torch
import torch.nn.functional as F
import triton

from ssl_kernels.triton.common import finish_rows_kernel, row_rnorm_kernel
from ssl_kernels.triton.tiles import TILES, Tile

# A walk over columns is split no finer than this many tiles: below, merging costs more than the idle
# processors.
TILES_PER_SPLIT = 4

# Entries of the logits from which rows that cannot be read in whole sectors are copied first: below, the copies take
# longer than they save.
ALIGNED_FROM = 1 << 24

DTYPE_CLASSES = {
    torch.float16: "half",
    torch.bfloat16: "half",
    torch.float32: "float32",
    torch.float64: "float64",
}


def precision(x):
    """How tl.dot multiplies float32: exactly, unless torch's own settings allow TF32 for matrix products."""
    # What torch makes of the older and the newer switches; the older one raises after some uses of the newer.
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def tile_for(kernel, x):
    """Tile of a kernel for vectors x (N, D) on the current device, or None where the table has none."""
    dtype_class = "tf32" if precision(x) == "tf32" else DTYPE_CLASSES[x.dtype]
    arch = triton.runtime.driver.active.get_current_target().arch
    return find_tile(kernel, arch, dtype_class, x.shape[1])


def find_tile(kernel, arch, dtype_class, d):
    """Entry of the tile table for a width D on compute capability `arch` (80 for 8.0)."""
    for largest_d, tile in TILES[table_arch(arch)][dtype_class][kernel]:
        if largest_d is None or d <= largest_d:
            return Tile(*tile)
    return None


def table_arch(arch):
    """Architecture of the tile table that serves compute capability `arch`."""
    if 80 < arch < 90 or arch >= 120:
        return 86
    return max(known for known in TILES if known <= arch and known != 86)


def launch_options(tile):
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def register_limit(tile):
    """Registers of a thread with which tile.blocks blocks fit a multiprocessor at once."""
    return min(255, 65536 // (32 * tile.num_warps * tile.blocks) // 8 * 8)


def split_walk(owners, tiles):
    """Splits of a walk over `tiles` so that `owners` programs fill every processor, and the tiles in each."""
    device = triton.runtime.driver.active.get_current_device()
    splits = 1
    if owners < _processors(device):
        splits = max(1, min(triton.cdiv(2 * _processors(device), owners), tiles // TILES_PER_SPLIT))
    tiles_per_split = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


@functools.cache
def _processors(device):
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def unsupported_operands(rows, columns=None):
    """Why the kernels cannot run on these (N, D) and (M, D), or None if they can."""
    if rows.dtype not in DTYPE_CLASSES:
        return f"dtype {rows.dtype} is none of {', '.join(str(dtype) for dtype in DTYPE_CLASSES)}"
    if 0 in rows.shape or (columns is not None and 0 in columns.shape):
        shapes = [tuple(x.shape) for x in (rows, columns) if x is not None]
        return f"an operand is empty, shapes {shapes}"
    largest = max(rows.shape[0], 0 if columns is None else columns.shape[0])
    if largest >= 2**31 - 2**16:
        return f"{largest} rows are too many for 32-bit row numbers"
    with torch.cuda.device_of(rows):
        arch = triton.runtime.driver.active.get_current_target().arch
    if not isinstance(arch, int) or arch < 80:
        return f"architecture {arch} has no tile table, which begin at compute capability 8.0"
    return None


def row_rnorm_of(x, scale):
    """1 / max(‖x_i‖, 1e-12), shape (N,), in scale's type."""
    n, d = x.shape
    rnorm = scale.new_empty(n)
    block_n, block_d = 16, min(128, triton.next_power_of_2(d))
    row_rnorm_kernel[triton.cdiv(n, block_n),](x, rnorm, n, d, *x.stride(), BLOCK_N=block_n, BLOCK_D=block_d)
    return rnorm


def finish_rows(partial, vectors, rnorm, scale, bound, grad, row_dots, has_rnorm=False):
    """Row dots, and the gradient unless None, from partial sums (splits, N, D): see finish_rows_kernel."""
    splits, n, d = partial.shape
    block_n, block_d = 16, min(128, triton.next_power_of_2(d))
    finish_rows_kernel[triton.cdiv(n, block_n),](
        partial,
        vectors,
        rnorm,
        scale,
        bound,
        grad,
        row_dots,
        n,
        d,
        *vectors.stride(),
        splits,
        HAS_RNORM=has_rnorm and rnorm is not None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )


def aligned(x, entries, whole=False):
    """x (N, D), or its copy in rows padded with zeros to a multiple of 16, for kernels that make `entries` logits.

    Triton reads 16 bytes at a time, and asynchronously, where widths, strides and addresses are multiples of 16; else
    an element at a time. A kernel on tiles of `whole` rows beside the expectation has no registers for that: it would
    spill up to 280 bytes.
    """
    if entries < ALIGNED_FROM and not whole:
        return x
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16))
    if x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def cut(gradient, d):
    """The first d columns of the gradient of what `aligned` returned, contiguous."""
    return gradient if gradient.shape[1] == d else gradient[:, :d].contiguous()


def contiguous(tensor):
    return None if tensor is None else tensor.contiguous()
