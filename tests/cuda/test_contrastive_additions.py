"""CUDA kernels of `contrastive` with biases, limits and ids that have to be equal, against float64."""

import itertools

import pytest
import torch

from tests.cuda import edges
from tests.cuda.contrastive_calls import check_parity, contrastive_bwd, contrastive_fwd, run
from tests.cuda.mutations_additions import check_limits
from tests.cuda.test_contrastive import check_every_schedule, flavours
from tests.cuda.test_contrastive_traffic import Backward, Expectation, Forward, WideBackward
from tests.support.contrastive import random_call

SOURCE = ("contrastive_additions.cu", "contrastive.cu")  # the second has the backward from the expectation
EVERYTHING = "bias padding limit exempt"


@flavours
@pytest.mark.parametrize(
    "n, d, ids, additions",
    [
        (3, 3, False, "bias"),
        (65, 17, True, "bias limit only"),
        (128, 64, False, EVERYTHING),
        (63, 128, False, "limit"),
    ],
)
def test_square_matches_float64(library, gpu, n, d, ids, additions, dtype, tf32):
    call = random_call(n, None, d, dtype, ids=ids, positives=2, additions=additions, device=gpu.device)
    check_parity(library, call, tf32=tf32)


@flavours
@pytest.mark.parametrize(
    "n, m, d, additions",
    [
        (63, 64, 40, EVERYTHING),
        (3, 300, 17, "bias limit only"),
        (127, 65, 128, "limit exempt"),
        (66, 33, 8, "bias"),
    ],
)
def test_rectangle_matches_float64(library, gpu, n, m, d, additions, dtype, tf32):
    call = random_call(
        n, m, d, dtype, ids="only" in additions, both_directions=True, keep_diagonal=n == 65, positives=2,
        additions=additions, device=gpu.device,
    )  # fmt: skip
    check_parity(library, call, tf32=tf32, splits=2)


@flavours
@pytest.mark.parametrize(
    "n, m, d, additions", [(65, 150, 40, EVERYTHING), (20, 70, 130, "bias"), (6, 70, 8, "only")]
)
def test_expectation_matches_float64(library, gpu, n, m, d, additions, dtype, tf32):
    """It takes the biases in; its backward is the one without additions."""
    call = random_call(n, m, d, dtype, ids="only" in additions, additions=additions, device=gpu.device)
    _, _, launches = check_parity(library, call, tf32=tf32, splits=2, expectation=True)
    if gpu.emulated:
        assert not any("contrastive_bwd_kernel" in launch.kernel for launch in launches)


@pytest.mark.parametrize("dtype, d", [(torch.bfloat16, 200), (torch.float32, 100)], ids=str)
@pytest.mark.parametrize("m", [None, 70])
def test_wider_accumulators(library, gpu, m, dtype, d):
    call = random_call(
        70, m, d, dtype, both_directions=m is not None, additions=EVERYTHING, device=gpu.device
    )
    check_parity(library, call)


@pytest.mark.parametrize(
    "dtype, tf32, d",
    [
        (torch.float64, False, 64),
        (torch.float32, True, 130),
        (torch.float16, False, 260),
        (torch.bfloat16, False, 256),
    ],
    ids=["float64", "tf32", "float16", "bfloat16"],
)  # fmt: skip
@pytest.mark.parametrize("m", [None, 131])
def test_blocks_of_wide_rows(library, gpu, m, dtype, tf32, d):
    """The gradient of a bias is summed by the walk that owns its rows, so that the columns' needs one of their own."""
    call = random_call(
        150,
        m,
        d,
        dtype,
        both_directions=m is not None,
        positives=2,
        additions=EVERYTHING,
        device=gpu.device,
    )
    _, _, launches = check_parity(library, call, tf32=tf32, splits=2, blocks=(100, 1))
    if gpu.emulated:
        assert sum("coefficients_kernel" in launch.kernel for launch in launches) == (4 if m is None else 8)
    if m is not None:
        call = call.replace(column_bias=None, row_bias=None)
        _, _, launches = check_parity(library, call, tf32=tf32, blocks=(100, 1))
        if gpu.emulated:
            assert sum("coefficients_kernel" in launch.kernel for launch in launches) == 4


@pytest.mark.slow
@flavours
@pytest.mark.parametrize("d", [1, 17, 64, 123, 257])
def test_every_combination_matches_float64(library, gpu, d, dtype, tf32):
    words = ("bias", "bias padding", "limit", "limit exempt", "only", EVERYTHING, EVERYTHING + " only")
    for i, (n, additions, square) in enumerate(itertools.product((3, 65, 130), words, (False, True))):
        # Rows of one number with a norm of 1 have two logits, both limits at once.
        call = random_call(
            n, None if square else 133 - n, d, dtype, ids="only" in additions or i % 3 == 0,
            both_directions=not square and i % 4 < 3, keep_diagonal=not square and i % 5 > 2, positives=i % 3,
            normalize=min(i % 7, d - 1) > 0, temperature=0.1 if i % 7 else 5.0,
            additions=additions, seed=i, device=gpu.device,
        )  # fmt: skip
        check_parity(library, call, tf32=tf32, splits=i % 4)


@pytest.mark.parametrize("d", [1, 9, 16])
def test_coefficients_of_tiles_of_one_step(library, gpu, d):
    """The terms of three tiles are there at once. Doubles with additions take coefficients at any width."""
    call = random_call(130, None, d, torch.float64, additions="bias", device=gpu.device)
    check_parity(library, call, splits=1)


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e4])
@pytest.mark.parametrize("m", [None, 21])
def test_any_scale(library, gpu, m, scale):
    call = random_call(
        20, m, 8, torch.float32, both_directions=m is not None, additions="bias", device=gpu.device
    )
    call.scale.fill_(scale)
    check_parity(library, call)
    limits = torch.full((20,), -1.0 if scale == 0 else 0.3 * scale, device=gpu.device)
    check_parity(library, call.replace(row_limit=limits))


def test_limits_are_strict_and_nan_is_none(gpu, library):
    if not gpu.emulated:
        pytest.skip("its tensors lie in memory of the host")
    check_limits(library)


def test_positives_and_exempt_columns_stay(library, gpu):
    """Of logits 0, 1, 2 and 3."""
    rows, columns = torch.ones(3, 4, device=gpu.device), torch.zeros(4, 4, device=gpu.device)
    columns[:, 0] = torch.arange(4)
    limits = torch.tensor([2.0, torch.nan, -torch.inf], device=gpu.device)
    exempt = torch.tensor([False, True, False, False], device=gpu.device)
    call = random_call(3, 4, 4, torch.float32, normalize=False, temperature=1.0, device=gpu.device)
    call.positives.copy_(torch.tensor([3, 3, -2]))
    fwd, _ = contrastive_fwd(
        library, call.replace(rows=rows, columns=columns, row_limit=limits, exempt=exempt)
    )
    logits = torch.arange(4.0, dtype=torch.float64)
    expected = torch.stack([logits.logsumexp(0), logits.logsumexp(0), logits[1:3].logsumexp(0)])
    torch.testing.assert_close(fwd.lse.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [8, 256])
@pytest.mark.parametrize("m", [None, 7])
def test_rows_without_any_column(library, gpu, m, d):
    """By padding alone, by a limit alone: a sum of -inf, and gradients of 0."""
    call = random_call(9, m, d, torch.float16, positives=0, both_directions=m is not None, device=gpu.device)
    bias = torch.full((m or 9,), -torch.inf, device=gpu.device)
    row_bias = torch.full((9,), -torch.inf, device=gpu.device) if m else None
    limit = torch.full((9,), -100.0, device=gpu.device)
    for emptied in (call.replace(column_bias=bias, row_bias=row_bias), call.replace(row_limit=limit)):
        fwd, bwd, _ = run(library, emptied, call.upstream())
        assert torch.isneginf(fwd.lse).all()
        assert all((grad == 0).all() for grad in bwd if grad is not None)


def test_nan_reaches_the_results(library, gpu):
    call = random_call(6, 7, 8, torch.float32, additions="bias limit", device=gpu.device)
    call.rows[1, 2] = torch.nan
    fwd, bwd, _ = run(library, call, call.upstream())
    assert fwd.lse.isnan().tolist() == [False, True, False, False, False, False]
    assert bwd.grad_rows[1].isnan().all() and bwd.grad_scale.isnan() and not bwd.grad_rows[0].isnan().any()
    call.column_bias[3] = torch.nan
    assert contrastive_fwd(library, call)[0].lse.isnan().any()
    left_out = call.replace(
        column_bias=call.column_bias.clone(), row_limit=torch.full_like(call.row_limit, -100.0)
    )
    fwd, _ = contrastive_fwd(library, left_out.replace(positives=torch.zeros_like(call.positives)))
    assert not fwd.lse[[0, 2, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("d", [24, 256])
def test_gradients_that_are_not_needed(library, gpu, d):
    """A bias' gradient alone, the vectors' alone, that of scale without any."""
    call = random_call(
        20, 33, d, torch.float16, both_directions=True, additions=EVERYTHING, device=gpu.device
    )
    upstream = call.upstream()
    fwd, everything, _ = run(library, call, upstream)
    for rows, columns, biases in itertools.product((False, True), repeat=3):
        some, _ = contrastive_bwd(
            library,
            call,
            fwd,
            *upstream,
            rows_need_grad=rows,
            columns_need_grad=columns,
            biases_need_grad=biases,
        )
        for name, ours in some._asdict().items():
            if ours is not None and name != "grad_scale":
                full = getattr(everything, name)  # of wide rows with other norms in the coefficients
                tolerance = (
                    {"rtol": 1e-2, "atol": 1e-4}
                    if d == 256 and "bias" not in name
                    else {"rtol": 0, "atol": 0}
                )
                torch.testing.assert_close(ours, full, **tolerance)
        torch.testing.assert_close(some.grad_scale, everything.grad_scale, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype, d", [(torch.bfloat16, 72), (torch.float32, 130)], ids=str)
def test_every_schedule_gives_the_same_bits(library, gpu, dtype, d):
    call = random_call(130, 70, d, dtype, both_directions=True, additions=EVERYTHING, device=gpu.device)
    check_every_schedule(library, call, splits=2, blocks=(1, 1))


def test_calls_can_be_captured(library, gpu):
    if not gpu.emulated:
        pytest.skip("tests/test_card.py captures the operators on a card")
    call = random_call(20, 300, 17, torch.float16, both_directions=True, additions=EVERYTHING)
    _, _, launches = run(library, call, call.upstream(), capturing=True, stream=7)
    assert {launch.stream for launch in launches} == {7}


@pytest.fixture
def emulated(gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")


CASES = [  # n, m, d, dtype, tf32
    (256, None, 128, torch.bfloat16, False),
    (128, 256, 192, torch.float16, False),
    (128, None, 64, torch.float32, False),
]
NARROW_CASES = [*CASES[:-1], (128, None, 32, torch.float32, False)]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def launches_of(library, case, additions, **options):
    n, m, d, dtype, tf32 = case
    call = random_call(n, m, d, dtype, additions=additions)
    _, _, launches = run(library, call, call.upstream(), splits=1, tf32=tf32, **options)
    return launches


@cases
def test_forward_reads_what_the_header_says(library, emulated, case):
    n, m, d, dtype, tf32 = case
    for additions, terms in (("bias", 1), ("bias limit", 2)):
        (forward,) = [
            launch for launch in launches_of(library, case, additions) if "fwd_kernel" in launch.kernel
        ]
        paper = Forward(n, m or n, d, dtype, tf32, library.arch)
        tiles = paper.blocks * paper.tiles
        columns, rows, positives = 32 * tiles * terms, 16 * paper.blocks * terms, 32 * tiles * (terms - 1)
        assert forward.counters.mma == paper.mma()
        assert forward.shared == paper.shared_bytes()
        assert forward.counters.shared_wavefronts == paper.wavefronts()
        expected = paper.sectors() + columns + rows + positives
        assert forward.counters.global_load_sectors == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_backward_reads_what_the_header_says(library, emulated, case):
    n, m, d, dtype, tf32 = case
    launches = launches_of(library, case, "bias limit")
    backward = [launch for launch in launches if "contrastive_bwd_kernel" in launch.kernel]
    owners = [(n, n)] if m is None else [(n, m), (m, n)]
    column_terms = [3] if m is None else [2, 1]
    for launch, sizes, terms in zip(backward, owners, column_terms, strict=True):
        paper = Backward(*sizes, d, dtype, tf32, library.arch, m is None, one_exponential=False)
        tiles, warps_n = paper.blocks * paper.tiles, 8 * 32 // paper.block_m
        columns = 8 * tiles * terms * paper.block_n // warps_n // 8
        row_terms = 3 if m is None or sizes == (m, n) else 2  # no row_bias
        rows, positives = 8 * tiles * 4 * row_terms, 64 * tiles * (2 if m is None else 1)
        assert launch.counters.mma == paper.mma()
        assert launch.shared == paper.shared_bytes()
        expected = paper.sectors() + columns + rows + positives
        assert launch.counters.global_load_sectors == pytest.approx(expected, rel=0.1)
    if m is None:
        assert backward[0].counters.shared_wavefronts == paper.wavefronts()


def test_wide_backward_and_expectation_multiply_as_without(library, emulated):
    case = 128, 192, 576, torch.float16, False
    first, _ = [
        launch for launch in launches_of(library, case, EVERYTHING) if "coefficients_kernel" in launch.kernel
    ]
    paper = WideBackward(*case, library.arch, square=False, most_steps={80: 7, 90: 11})  # one block anywhere
    assert first.counters.mma == paper.coefficient_mma() and first.shared == paper.coefficient_shared()
    case = 128, 256, 192, torch.float16, False
    launches = launches_of(library, case, EVERYTHING, expectation=True)
    (kept,) = [launch for launch in launches if "expectation_kernel" in launch.kernel]
    paper = Expectation(*case, library.arch, False)
    assert kept.counters.mma == paper.mma() and kept.shared == paper.shared_bytes()


@pytest.mark.slow
def test_sizes_beside_those_of_tiles(gpu, library):
    if not gpu.emulated:
        pytest.skip("its tensors lie in memory of the host")
    edges.check_contrastive_additions(library)
