"""What the kernels do, counted by the emulator, against the counts on paper in csrc/cuda/contrastive_*.cuh.

One file, although a long one: the figures of a kernel are those of another with other terms.
"""

import ctypes
import re
from math import ceil

import pytest
import torch

from tests.cuda.conftest import SOURCES
from tests.cuda.contrastive_calls import (
    BwdArgs,
    Common,
    FwdArgs,
    check_parity,
    contrastive_bwd,
    contrastive_fwd,
    run,
)
from tests.cuda.launching import DTYPE_CODES
from tests.support.contrastive import random_call

CASES = [  # n, m, d, dtype, tf32
    (256, None, 128, torch.bfloat16, False),
    (128, 256, 192, torch.float16, False),
    (128, None, 512, torch.bfloat16, False),
    (128, None, 128, torch.float32, True),
    (128, None, 64, torch.float32, False),
]
NARROW_CASES = [
    (256, None, 128, torch.bfloat16, False),
    (128, 256, 192, torch.float16, False),
    (128, None, 96, torch.float32, True),
    (128, None, 32, torch.float32, False),
]
WIDE_CASES = [
    pytest.param((256, None, 640, torch.bfloat16, False), marks=pytest.mark.slow),
    (128, 192, 256, torch.float16, False),
    (128, None, 160, torch.float32, True),
    pytest.param((128, 160, 128, torch.float32, False), marks=pytest.mark.slow),
    (128, None, 64, torch.float32, False),
    (128, None, 80, torch.float64, False),
]
UNIT_BYTES, STEP_BYTES, SECTOR = 16, 128, 32

# Steps of 128 bytes of a row that may stay in shared memory, on emulated devices: (of sm_80, of sm_90), whose blocks
# have 163 and 227 KB, and two blocks a multiprocessor together 1 KB more each.
FORWARD_STEPS = {80: 3, 90: 5}
BACKWARD_STEPS = {80: 7, 90: 11}
COEFFICIENT_STEPS = {80: 7, 90: 3}  # one block a multiprocessor on sm_80 whatever they are, two on sm_90


def launches_of(library, n, m, d, dtype, tf32, **options):
    call = random_call(n, m, d, dtype, positives=1)
    _, _, launches = run(library, call, call.upstream(), **{"splits": 1, "tf32": tf32, **options})
    kernel = "expectation_kernel" if "expectation" in options else "fwd_kernel"
    forward = [launch for launch in launches if kernel in launch.kernel]
    backward = [launch for launch in launches if "contrastive_bwd_kernel" in launch.kernel]
    return forward, backward


@pytest.fixture(autouse=True)
def emulated(gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")


def slots_of(steps, held):
    """Of own rows in shared memory, where all `steps` stay and registers hold the first `held`: 3 to begin with."""
    return max(min(steps, 3), steps - held)


class Forward:
    """Paper figures of one forward launch of n rows by m columns."""

    def __init__(self, n, m, d, dtype, tf32, arch, held=(2, 2)):
        self.block_n = 64
        self.steps = ceil(d * dtype.itemsize / STEP_BYTES)
        self.blocks, self.tiles = ceil(n / 128), ceil(m / self.block_n)
        self.tensor_cores = dtype.itemsize == 2 or tf32
        self.held = min(self.steps, held[dtype.itemsize == 4]) if self.tensor_cores else 0
        self.streamed = slots_of(self.steps, self.held) > FORWARD_STEPS[arch]
        self.comes_again = self.steps - self.held if self.streamed else 0
        self.n, self.m = n, m

    def mma(self):
        return 256 * self.blocks * self.tiles * self.steps if self.tensor_cores else 0

    def sectors(self):
        own = 4 * self.n * (self.steps + self.comes_again * (self.tiles - 1))
        other = 4 * self.blocks * self.m * self.steps
        positives_and_norms = self.blocks * self.tiles * (32 + self.block_n // 8)
        return own + other + positives_and_norms + 20 * self.blocks

    def shared_bytes(self):
        own = 3 if self.streamed else slots_of(self.steps, self.held)
        return own * 128 * STEP_BYTES + 3 * self.block_n * (STEP_BYTES + 4 + 8)

    def wavefronts(self):
        own = 128 * (self.steps + self.comes_again * (self.tiles - 1))
        reads = 384 if self.tensor_cores else 2560
        saved = 128 * self.held * (self.tiles - 1)
        return self.blocks * (own - saved + self.tiles * (self.steps * (self.block_n + reads) + 66))


class BothDirections(Forward):
    """Paper figures of one forward launch in both directions, by `groups` of row blocks and one part."""

    def __init__(self, n, m, d, dtype, tf32, arch, groups):
        super().__init__(n, m, d, dtype, tf32, arch, held=(2, 0))
        self.groups = groups

    def sectors(self):
        return super().sectors() + 8 * (self.blocks - self.groups) * self.m // SECTOR

    def stored_sectors(self):
        """lse, positive logits, of which each is a sector of its own, and the column sums."""
        return 8 * self.n // SECTOR + self.n + 8 * self.blocks * self.m // SECTOR

    def shared_bytes(self):
        return super().shared_bytes() + 4 * self.block_n * 8

    def wavefronts(self):
        return super().wavefronts() + 32 * self.blocks * self.tiles


class Backward:
    """Paper figures of one backward launch whose owners are n rows, against m others."""

    def __init__(self, n, m, d, dtype, tf32, arch, square, one_exponential=None):
        self.one_exponential = square if one_exponential is None else one_exponential
        half = dtype.itemsize == 2
        self.block_m = 64 if half and d > 256 else 128
        self.block_n = 64 if half else 32
        self.steps = ceil(d * dtype.itemsize / STEP_BYTES)
        self.blocks, self.tiles = ceil(n / self.block_m), ceil(m / self.block_n)
        self.tensor_cores = half or tf32
        self.streamed = self.steps > BACKWARD_STEPS[arch]
        self.n, self.m, self.d, self.half, self.square = n, m, d, half, square

    def mma(self):
        per_step = self.block_m * self.block_n // 32
        return 2 * self.blocks * self.tiles * self.steps * per_step if self.tensor_cores else 0

    def own_steps(self):
        return 3 if self.streamed else self.steps

    def operand_sectors(self):
        own = 4 * self.n * self.steps * (self.tiles if self.streamed else 1)
        return own + 8 * self.blocks * self.m * self.steps

    def shared_bytes(self):
        panels = self.block_n * (2 if self.half else 4) // STEP_BYTES
        own = (self.own_steps() + panels) * self.block_m * STEP_BYTES
        return own + 3 * self.block_n * (STEP_BYTES + 8) + (4 * self.block_m + 9 * self.block_n) * 4

    def sectors(self):
        sides = 2 if self.square else 1
        positives = sides * (self.blocks * self.tiles * 16 * 8 // 2 + self.n)
        of_columns = 2 if self.one_exponential else 3
        terms = self.blocks * (3 * self.block_m + of_columns * self.tiles * self.block_n) // 8
        return self.operand_sectors() + positives + terms

    def wavefronts(self):
        warps_m = self.block_m // 32
        n_tiles = self.block_n // (8 // warps_m) // 8
        g_tiles = n_tiles if self.half else 2
        copies = self.tiles * self.steps * 2 * self.block_n
        copies += self.block_m * self.steps * (self.tiles if self.streamed else 1)
        if self.half:
            products = 4 * (2 + n_tiles // 2) * 4 + 4 * (2 + g_tiles // 2) * 4
        elif self.tensor_cores:
            products = 4 * (2 + n_tiles // 2) * 4 + 4 * (2 * 4 + 4 * 2 * g_tiles // 2)
        else:
            products = 8 * (4 + 2 * n_tiles) * 4 + 8 * (4 * 4 + 4 * 2 * g_tiles)
        stores = n_tiles * 4 * (1 if self.half else 4)
        row_terms, column_terms = (4, 2) if self.one_exponential else (3, 3)  # of the square case
        terms = 4 * row_terms + n_tiles * 2 * (1 + column_terms)  # the norms twice
        fill = self.block_n // 32 * column_terms
        walk = self.tiles * (8 * (self.steps * products + stores + terms) + fill)
        return self.blocks * (copies + walk + row_terms * self.block_m // 32)


class WideBackward:
    """Paper figures of the launch that writes a block of coefficients: n rows against m others."""

    def __init__(self, n, m, d, dtype, tf32, arch, square, most_steps=COEFFICIENT_STEPS):
        self.size, self.acc = dtype.itemsize, max(dtype.itemsize, 4)
        self.chunk = STEP_BYTES // self.size
        self.block_n = 64 if self.size == 8 else 128
        self.steps = ceil(d / self.chunk)
        self.blocks, self.tiles = ceil(n / 128), ceil(m / self.block_n)
        self.tensor_cores, self.bfloat16 = self.size == 2 or tf32, dtype == torch.bfloat16
        if not self.tensor_cores:  # one block per multiprocessor anywhere
            most_steps = {80: 7, 90: 11} if self.size == 4 else {80: 8, 90: 12}
        self.streamed = self.steps > most_steps[arch]
        self.column_terms = 2 if square else 3  # 2 with one exponential
        self.n, self.m, self.d, self.square = n, m, d, square

    def coefficient_mma(self):
        return 4 * self.blocks * self.tiles * self.steps * self.block_n if self.tensor_cores else 0

    def coefficient_sectors(self):
        operands = 4 * self.n * self.steps * (self.tiles if self.streamed else 1)
        operands += 4 * self.blocks * self.m * self.steps
        sides = 2 if self.square else 1
        positives = self.blocks * self.tiles * (64 + self.block_n if self.square else 64)
        terms = self.blocks * self.tiles * (self.column_terms * self.block_n // 8 + 96) * self.acc // 4
        return operands + positives + sides * self.n + terms

    def coefficient_store_sectors(self):
        return 128 * self.blocks * self.tiles * self.block_n * self.size // SECTOR

    def coefficient_shared(self):
        own = 3 if self.streamed else self.steps
        slots = 3 if self.acc == 8 else 2
        return (own * 128 + 3 * self.block_n) * STEP_BYTES + slots * 3 * self.block_n * self.acc

    def coefficient_wavefronts(self):
        n_tiles = self.block_n // 16
        products = 4 * (2 + n_tiles // 2) * 4 if self.tensor_cores else 8 * (4 + 2 * n_tiles) * 4
        step = self.block_n + 8 * products
        own = 128 * self.steps * (self.tiles if self.streamed else 1)
        # Of the square case: the norms twice, or all terms twice where the rows are taken by halves.
        by_halves = self.tensor_cores and not self.bfloat16
        reads = 8 * n_tiles * 2 * (2 * self.column_terms if by_halves else 1 + self.column_terms)
        terms = (reads + self.column_terms * self.block_n // 32) * self.acc // 4
        return self.blocks * (own + self.tiles * (self.steps * step + terms))


class Expectation(Backward):
    """Paper figures of one expectation launch: the backward's walk with other terms."""

    def sectors(self):
        positives_and_norms = self.blocks * self.tiles * (64 + self.block_n // 8)
        return self.operand_sectors() + positives_and_norms + self.blocks * self.block_m // 8

    def shared_bytes(self):
        panels = self.block_n * (2 if self.half else 4) // STEP_BYTES
        norms_and_maxima = (1 + 8 * 32 // self.block_m) * self.block_m * 4
        own = (self.own_steps() + panels) * self.block_m * STEP_BYTES
        return own + 3 * self.block_n * (STEP_BYTES + 4 + 8) + norms_and_maxima


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_does_what_its_header_says(library, case):
    n, m, d, dtype, tf32 = case
    (forward,), _ = launches_of(library, *case)
    paper = Forward(n, m or n, d, dtype, tf32, library.arch)
    assert forward.counters.mma == paper.mma()
    assert forward.shared == paper.shared_bytes()
    assert forward.counters.global_load_sectors == pytest.approx(paper.sectors(), rel=0.01)
    assert forward.counters.shared_wavefronts == paper.wavefronts()
    assert forward.counters.shared_wavefronts == forward.counters.shared_wavefronts_ideal
    if paper.tensor_cores:  # one unit of 2 N M D flops
        depth = 2 * UNIT_BYTES // dtype.itemsize
        assert forward.counters.mma * 2 * 16 * 8 * depth == 2 * n * (m or n) * d


@pytest.mark.parametrize("d, steps", [(64, 1), (192, 3), (256, 4), (512, 8)])
@pytest.mark.parametrize("both_directions", [False, True], ids=["one direction", "both"])
def test_wavefronts_per_mma_of_a_long_walk(library, both_directions, d, steps):
    """What four tiles more take: at most 1.6 at D = 192 and 256, with two steps of own rows in registers."""
    counters = []
    for tiles in (8, 4):
        call = random_call(128, 64 * tiles, d, torch.bfloat16, both_directions=both_directions, positives=0)
        _, launches = contrastive_fwd(library, call, splits=1)
        counters += [launch.counters for launch in launches if "fwd_kernel" in launch.kernel]
    more, less = counters
    wavefronts = more.shared_wavefronts - less.shared_wavefronts
    mma = more.mma - less.mma
    assert mma == 4 * 256 * steps
    streamed = slots_of(steps, 2) > FORWARD_STEPS[library.arch]
    of_steps = 320 * min(steps, 2) + (576 if streamed else 448) * max(steps - 2, 0)
    assert wavefronts == 4 * (of_steps + 66 + 32 * both_directions)
    if steps in (3, 4):
        assert wavefronts <= 1.6 * mma


@pytest.mark.parametrize(
    "d, most", [(64, 200), (256, 215), (512, 275)], ids=["in registers", "in shared memory", "come again"]
)
def test_instructions_of_a_step(library, d, most):
    """Of a warp, by where own rows lie; with pointers that each copy computes anew they were 265, and 409."""
    counted = {}
    for width in (d, d + 64):
        for tiles in (8, 4):
            call = random_call(128, 64 * tiles, width, torch.bfloat16, positives=0)
            _, launches = contrastive_fwd(library, call, splits=1)
            (launch,) = [launch for launch in launches if "fwd_kernel" in launch.kernel]
            counted[width, tiles] = launch.counters.instructions
    more, less = (counted[width, 8] - counted[width, 4] for width in (d + 64, d))
    assert (more - less) / (4 * 4) <= most  # four tiles, four warps


@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_backward_does_what_its_header_says(library, case):
    n, m, d, dtype, tf32 = case
    _, backward = launches_of(library, *case)
    owners = [(n, n)] if m is None else [(n, m), (m, n)]
    assert len(backward) == len(owners)
    papers = [Backward(*sizes, d, dtype, tf32, library.arch, m is None) for sizes in owners]
    for launch, paper in zip(backward, papers, strict=True):
        assert launch.counters.mma == paper.mma()
        assert launch.shared == paper.shared_bytes()
        assert launch.counters.global_load_sectors == pytest.approx(paper.sectors(), rel=0.1)
        assert launch.counters.global_store_sectors == paper.n * d * 4 // SECTOR
    if m is None:
        assert backward[0].counters.shared_wavefronts == papers[0].wavefronts()
    if papers[0].tensor_cores:  # two units of 2 N M D flops for each operand's gradient
        depth = 2 * UNIT_BYTES // dtype.itemsize
        flops = sum(launch.counters.mma for launch in backward) * 2 * 16 * 8 * depth
        assert flops == 2 * len(backward) * 2 * n * (m or n) * d


@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_backward_of_wide_rows_does_what_its_headers_say(library, case):
    """Both gradients of a rectangle come from one unit of these kernels."""
    n, m, d, dtype, tf32 = case
    call = random_call(n, m, d, dtype, positives=1)
    _, _, launches = run(library, call, call.upstream(), splits=1, tf32=tf32)
    (launch,) = [launch for launch in launches if "coefficients_kernel" in launch.kernel]
    paper = WideBackward(n, m or n, d, dtype, tf32, library.arch, m is None)
    assert launch.counters.mma == paper.coefficient_mma()
    assert launch.shared == paper.coefficient_shared()
    assert launch.counters.global_load_sectors == pytest.approx(paper.coefficient_sectors(), rel=0.05)
    assert launch.counters.global_store_sectors == paper.coefficient_store_sectors()
    assert launch.counters.shared_wavefronts == launch.counters.shared_wavefronts_ideal
    if m is None:
        assert launch.counters.shared_wavefronts == paper.coefficient_wavefronts()
        if paper.tensor_cores:  # one unit of 2 N M D flops
            depth = 2 * UNIT_BYTES // dtype.itemsize
            assert launch.counters.mma * 2 * 16 * 8 * depth == 2 * n * n * d


@pytest.mark.parametrize(
    "dtype, tf32, narrow",
    [(torch.bfloat16, False, 255), (torch.float32, True, 127), (torch.float32, False, 32), (torch.float64, False, 63)],
    ids=str,
)  # fmt: skip
def test_widths_that_take_blocks_of_coefficients(library, dtype, tf32, narrow):
    """From 512 bytes on, with exact products of float32 from the second step on: where paper says it is faster."""
    for d, kernel, other in (
        (narrow, "contrastive_bwd_kernel", "coefficients_kernel"),
        (narrow + 1, "coefficients_kernel", "contrastive_bwd_kernel"),
    ):
        call = random_call(20, None, d, dtype)
        _, _, launches = run(library, call, call.upstream(), tf32=tf32, executes=False)
        assert any(kernel in launch.kernel for launch in launches), d
        assert not any(other in launch.kernel for launch in launches), d


@pytest.mark.parametrize("d", [64, 256], ids=["narrow", "wide"])
@pytest.mark.parametrize("both_directions", [False, True], ids=["square", "both directions"])
def test_exponentials_of_an_entry(library, both_directions, d):
    """One for both sides' sums, forward and backward, down to a temperature of 0.046; two below.

    And those of rows' and columns' sums as they grow and meet, which in so small a matrix are up to 0.3 an entry.
    """
    n = 128
    for temperature, expected in ((0.046, 1), (0.044, 2)):
        call = random_call(
            n, n if both_directions else None, d, torch.bfloat16, both_directions=both_directions,
            temperature=temperature,
        )  # fmt: skip
        _, _, launches = run(library, call, call.upstream(), splits=1)
        for launch in launches:
            if "contrastive_fwd_kernel" in launch.kernel:
                entries = n * n * (expected if both_directions else 1)
            elif "contrastive_bwd_kernel" in launch.kernel or "coefficients_kernel" in launch.kernel:
                entries = n * n * expected
            else:
                continue
            assert 0 <= launch.counters.special_functions - entries <= 0.3 * n * n, launch.kernel


def test_ids_of_columns_come_with_their_tile(library):
    """Each column's by one asynchronous copy, instead of one load per lane that has the column."""
    counters = {}
    for ids in (False, True):
        call = random_call(128, 640, 64, torch.bfloat16, ids=ids, positives=0)
        fwd, launches = contrastive_fwd(library, call, splits=1)
        grad = call.upstream()[0]
        _, more = contrastive_bwd(library, call, fwd, grad, columns_need_grad=False, splits=1)
        counters[ids] = {
            launch.kernel: launch.counters
            for launch in launches + more
            if re.search("contrastive_(fwd|bwd)_kernel", launch.kernel)
        }
    assert len(counters[True]) == 2
    for kernel, without in counters[False].items():
        found, tiles = counters[True][kernel], 640 // 64
        of_rows = tiles * (4 if "fwd" in kernel else 8) * 4  # a load of each warp for each of a lane's rows
        copies = found.async_copies - without.async_copies
        assert copies == tiles * 2, kernel
        assert found.global_load_requests - without.global_load_requests == of_rows + copies, kernel


def test_blocks_of_coefficients_are_bounded(library):
    """32 MB of them, what is summed up of a block's rows and of the columns, and normalised copies of both sides."""
    somewhere = 1 << 20
    for dtype, d in ((torch.bfloat16, 512), (torch.float32, 512), (torch.float16, 256)):
        size, acc = dtype.itemsize, 4
        for n, m in ((1 << 16, 1 << 16), (256, 1 << 20), (1 << 20, 1000), (1 << 20, 1 << 20)):
            common = Common(
                dtype=DTYPE_CODES[dtype], column_dtype=DTYPE_CODES[dtype], normalize_rows=True, normalize_columns=True,
                N=n, M=m, D=d, row_strides=(d, 1), column_strides=(d, 1), rows=somewhere, columns=somewhere,
                scale=somewhere,
            )  # fmt: skip
            args = BwdArgs(
                common=common, grad_lse=somewhere, lse=somewhere, row_rnorm=somewhere, column_rnorm=somewhere,
                grad_rows=somewhere, grad_columns=somewhere, grad_scale=somewhere,
            )  # fmt: skip
            found = ctypes.c_size_t()
            library.call("contrastive_bwd_workspace", ctypes.byref(args), ctypes.byref(found))
            block_rows = max(4096, (32 << 20) // size // m)
            sums = acc * d * (min(n, block_rows) + m)
            copies = size * d * (n + m)
            assert found.value <= (32 << 20) + sums + copies + 32 * (n + m) + 4096, (dtype, n, m)


@pytest.mark.parametrize("n, m, d, dtype, tf32", [case for case in CASES if case[1]] + [
    (256, 512, 128, torch.bfloat16, False),
    (128, 96, 64, torch.float32, False),
], ids=str)  # fmt: skip
def test_expectation_does_what_its_header_says(library, n, m, d, dtype, tf32):
    (launch,), backward = launches_of(library, n, m, d, dtype, tf32, expectation=True)
    paper = Expectation(n, m, d, dtype, tf32, library.arch, False)
    assert not backward
    assert launch.counters.mma == paper.mma()
    assert launch.shared == paper.shared_bytes()
    assert launch.counters.global_load_sectors == pytest.approx(paper.sectors(), rel=0.01)
    assert launch.counters.global_store_sectors == pytest.approx(
        n * (d + 2) * 4 // SECTOR + 8 * n // 8, rel=0.1
    )
    if dtype.itemsize == 2:
        assert launch.counters.shared_wavefronts == launch.counters.shared_wavefronts_ideal
        depth = 2 * UNIT_BYTES // dtype.itemsize
        assert launch.counters.mma * 2 * 16 * 8 * depth == 2 * 2 * n * m * d  # two units


@pytest.mark.parametrize("column_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_columns_are_read_as_they_are(library, column_dtype):
    """Beside float32 rows: half the sectors of their walk, and everything else as with float32 columns."""
    n, m, d = 128, 96, 64
    call = random_call(n, m, d, torch.float32, column_dtype=column_dtype)
    _, launches = contrastive_fwd(library, call, expectation=True, splits=1)
    (launch,) = [launch for launch in launches if "expectation_kernel" in launch.kernel]
    paper = Expectation(n, m, d, torch.float32, False, library.arch, False)
    walk = 8 * paper.blocks * m * paper.steps
    assert launch.shared == paper.shared_bytes()
    assert launch.counters.global_load_sectors == pytest.approx(paper.sectors() - walk / 2, rel=0.01)
    norms = [launch for launch in launches if "prepare_rows_kernel" in launch.kernel]
    assert sum(launch.counters.global_load_sectors for launch in norms) == (4 * n + 2 * m) * d // SECTOR
    assert sum(launch.counters.global_store_sectors for launch in norms) <= 4 * (n + m)  # no copies


@pytest.mark.parametrize("dtype, column_dtype", [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
], ids=str)  # fmt: skip
def test_scratch_of_moco_does_not_grow_with_the_queue(library, gpu, dtype, column_dtype):
    """128 x 128 sums per multiprocessor, whatever the queue's length and dtype: no copy of it, no logits."""
    n, d, multiprocessors = 256, 128, {"sm_80": 108, "sm_90": 132}[gpu.name]
    somewhere = 1 << 20

    def scratch(m):
        common = Common(
            dtype=DTYPE_CODES[dtype], column_dtype=DTYPE_CODES[column_dtype], normalize_rows=True, N=n, M=m, D=d,
            row_strides=(d, 1), column_strides=(d, 1), rows=somewhere, columns=somewhere, scale=somewhere,
        )  # fmt: skip
        args = FwdArgs(common=common, lse=somewhere, row_rnorm=somewhere, expectation=somewhere)
        size = ctypes.c_size_t()
        library.call("contrastive_fwd_workspace", ctypes.byref(args), ctypes.byref(size))
        return size.value

    parts = multiprocessors // 2
    assert scratch(65536) <= parts * n * (d + 2) * 4 + 512
    assert scratch(65536) == pytest.approx(scratch(1 << 20), rel=0.1)
    assert scratch(256) < scratch(65536) / 20


def test_moco_shape_fills_a_card(gpu, nvcc):
    """256 queries: every multiprocessor has a part of the queue."""
    library = gpu.cuda_library([SOURCES / "contrastive.cu"], multiprocessors=8)
    call = random_call(256, 1024, 8, torch.bfloat16, positives=0)
    _, launches = contrastive_fwd(library, call, expectation=True)
    (launch,) = [launch for launch in launches if "expectation_kernel" in launch.kernel]
    assert launch.grid == (2, 4, 1)


@pytest.mark.parametrize("multiprocessors, groups", [(1, 2), (2, 3)])
@pytest.mark.parametrize("d, dtype, tf32", [case[2:] for case in CASES], ids=str)
def test_both_directions_do_what_their_header_says(gpu, nvcc, d, dtype, tf32, multiprocessors, groups):
    """Each tile is visited once."""
    library = gpu.cuda_library([SOURCES / "contrastive.cu"], multiprocessors=multiprocessors)
    n, m = 384, 128
    call = random_call(n, m, d, dtype, both_directions=True)
    _, launches = contrastive_fwd(library, call, splits=1, tf32=tf32)
    (launch,) = [launch for launch in launches if "fwd_kernel" in launch.kernel]
    paper = BothDirections(n, m, d, dtype, tf32, library.arch, groups)
    assert launch.grid == (groups, 1, 1)
    assert launch.counters.mma == paper.mma()
    assert launch.shared == paper.shared_bytes()
    assert launch.counters.global_load_sectors == pytest.approx(paper.sectors(), rel=0.01)
    assert launch.counters.global_store_sectors == pytest.approx(paper.stored_sectors(), rel=0.01)
    assert launch.counters.shared_wavefronts == paper.wavefronts()
    assert launch.counters.shared_wavefronts == launch.counters.shared_wavefronts_ideal
    (merge,) = [launch for launch in launches if "merge_kernel" in launch.kernel]
    assert merge.counters.global_load_sectors == pytest.approx(8 * groups * m // SECTOR, abs=2 * m // 32)


def test_scratch_of_both_directions_does_not_grow_with_rows_times_columns(library, gpu):
    """Column sums for each group of row blocks, row sums for each part: both bounded by the card."""
    multiprocessors = {"sm_80": 108, "sm_90": 132}[gpu.name]
    somewhere = 1 << 20

    def scratch(n, m, d=128):
        common = Common(
            dtype=DTYPE_CODES[torch.bfloat16], column_dtype=DTYPE_CODES[torch.bfloat16], normalize_rows=True,
            normalize_columns=True, both_directions=True, N=n, M=m, D=d, row_strides=(d, 1), column_strides=(d, 1),
            rows=somewhere, columns=somewhere, scale=somewhere,
        )  # fmt: skip
        args = FwdArgs(
            common=common, lse=somewhere, column_lse=somewhere, row_rnorm=somewhere, column_rnorm=somewhere
        )
        size = ctypes.c_size_t()
        library.call("contrastive_fwd_workspace", ctypes.byref(args), ctypes.byref(size))
        return size.value

    groups = multiprocessors // 4
    for n in (1 << 12, 1 << 16, 1 << 20):
        for m in (1 << 6, 1 << 12, 1 << 16, 1 << 20):
            row_sums = 8 * 64 * n
            column_sums = max(8 * groups * m, 1 << 20)
            assert scratch(n, m) <= row_sums + column_sums + 512, (n, m)
    assert scratch(1 << 16, 1 << 16) <= (1 << 17) * 128 * 2  # less than the embeddings


def test_norms_read_the_operand_once(library):
    call = random_call(64, None, 128, torch.bfloat16)
    _, _, launches = run(library, call, call.upstream())
    assert "prepare_rows_kernel" in launches[0].kernel
    assert launches[0].counters.global_load_sectors == 64 * 128 * 2 // SECTOR


def test_few_rows_are_split_over_the_card(library, gpu):
    """1024 columns a part at least; the parts' results are merged and finished by the same launches."""
    call = random_call(100, 4096, 8, torch.bfloat16)
    _, _, launches = check_parity(library, call)
    grids = {launch.grid for launch in launches if "wd_kernel" in launch.kernel}
    assert grids == {(1, 16, 1), (32, 1, 1)}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_are_finished_as_the_header_says(library, dtype, parts):
    n, d = 192, 32  # wider, float32 goes by blocks
    call = random_call(n, None, d, dtype, positives=1)
    _, _, launches = run(library, call, call.upstream(), splits=parts)
    (finish,) = [launch for launch in launches if "finish_rows_kernel" in launch.kernel]
    acc, terms = max(dtype.itemsize, 4), 3 if dtype == torch.float16 else 2
    operands = 2 * (parts * acc + dtype.itemsize) * n * d // SECTOR
    assert finish.counters.global_load_sectors == operands + terms * n
    assert finish.counters.global_store_sectors == n * d * dtype.itemsize // SECTOR + n


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_expectation_is_merged_and_differentiated_as_the_headers_say(library, dtype, parts):
    n, m, d, count = 64, 192, 128, 2
    call = random_call(n, m, d, dtype, positives=count)
    _, _, launches = run(library, call, call.upstream(), expectation=True, splits=parts)
    (merge,) = [launch for launch in launches if "expectation_merge_kernel" in launch.kernel]
    (bwd,) = [launch for launch in launches if "expectation_bwd_kernel" in launch.kernel]
    acc, scales = max(dtype.itemsize, 4), 2 if dtype == torch.float16 else 1
    sums = acc * n * d // SECTOR
    assert merge.counters.global_load_sectors == parts * (sums + 2 * n) + scales * n
    assert merge.counters.global_store_sectors == sums + n
    rows = dtype.itemsize * n * d // SECTOR
    assert (
        bwd.counters.global_load_sectors == 2 * (sums + (1 + count) * rows + 3 * count * n * d // 32) + 3 * n
    )
    assert bwd.counters.global_store_sectors == rows + n
