"""What the launchers ask of the runtime: grids that a card takes at every size, shared memory that no thread lowers."""

import ctypes
import itertools

import pytest
import torch

from tests.cuda import batch_hard_calls, contrastive_calls, mixing_calls, row_pairs_calls, sigmoid_pairs_calls
from tests.cuda import queue_push_calls as queue_calls
from tests.cuda.launching import MultiplyMatrices
from tests.gpu_emulation import STREAM
from tests.support import sigmoid_pairs as pairs
from tests.support.contrastive import Call

ADDRESS = 1 << 20  # of tensors that no kernel reads, as none runs
MOST_SAMPLES = 2**30 - 1
MOST_ROWS = 2**33
WIDEST = 2**22
MULTIPLY = MultiplyMatrices(lambda product, stream: 0)  # nothing


@pytest.fixture
def launched(gpu, library_of):
    """launched(operation, function, args): the launches, of which no kernel ran."""
    if not gpu.emulated:
        pytest.skip("a card would run them")

    def run(operation, function, args):
        return library_of(f"{operation}.cu").call(function, ctypes.byref(args), STREAM, executes=False)

    return run


def at_address(structure, **values):
    """A structure whose pointers are `ADDRESS` and whose other fields are `values`, or 0."""
    args = structure()
    for name, kind in structure._fields_:
        if kind is ctypes.c_void_p:
            setattr(args, name, values.pop(name, ADDRESS))
        elif isinstance(getattr(args, name), ctypes.Structure):
            setattr(args, name, values.pop(name))
        elif isinstance(getattr(args, name), ctypes.Array):
            given = values.pop(name, None)
            default = ADDRESS if kind._type_ is ctypes.c_void_p else 1
            setattr(args, name, kind(*(given or [default] * kind._length_)))
        else:
            setattr(args, name, values.pop(name, 0))
    assert not values, values
    return args


@pytest.mark.parametrize("samples", [16 * 65535, 16 * 65535 + 1, MOST_SAMPLES])
@pytest.mark.parametrize("features", [1, 4096, 4097])
@pytest.mark.parametrize("function", ["cutmix_fwd", "cutmix_bwd"])
def test_cutmix_of_many_samples(launched, function, features, samples):
    args = at_address(
        mixing_calls.CutmixArgs, element_bytes=4, dtype=1, B=samples, F=features, H=1, W=features,
        row_stride=features, column_stride=1, x_stride=features, out=2 * ADDRESS, out_stride=features,
        box_strides=(4, 1), permutation_stride=1,
    )  # fmt: skip
    *_, last = launched("cutmix", function, args)
    assert last.grid[1:] == (1, 1) and last.grid[0] >= -(-samples // 16)


def _mixing(structure, samples, features, **more):
    return at_address(
        structure, dtype=1, B=samples, F=features, x_stride=features, out=2 * ADDRESS, out_stride=features,
        lam_stride=1, permutation_stride=1, **more,
    )  # fmt: skip


MIXED = [(MOST_SAMPLES, 1), (MOST_SAMPLES, 4096), (3, 2**36), (3, 2**36 + 3)]


@pytest.mark.parametrize("samples, features", MIXED)
def test_mixing_of_many_samples_and_features(launched, samples, features):
    args = _mixing(mixing_calls.MixupArgs, samples, features)
    assert launched("mixup", "mixup_fwd", args)
    args.out = args.x
    assert launched("mixup", "mixup_fwd", args)
    common = _mixing(mixing_calls.MixupArgs, samples, features)
    assert launched(
        "mixup", "mixup_bwd", at_address(mixing_calls.MixupBwdArgs, common=common, x_stride=features)
    )
    args = _mixing(
        mixing_calls.MixupNormalizeArgs, samples, features, C=1, channel_stride=features, mean_stride=1,
        std_stride=1,
    )  # fmt: skip
    assert launched("mixup_normalize", "mixup_normalize", args)


@pytest.mark.parametrize("rows, classes", [(2**31 - 1, 1), (2**31 - 1, 10**6), (1, 2**36)])
def test_cross_entropy_of_many_rows_and_classes(launched, rows, classes):
    common = at_address(
        mixing_calls.MixupCrossEntropyArgs, dtype=1, N=rows, C=classes, row_stride=classes,
        partner_stride=1, lam_stride=1,
    )  # fmt: skip
    args = at_address(mixing_calls.MixupCrossEntropyFwdArgs, common=common)
    assert launched("mixup_cross_entropy", "mixup_cross_entropy_fwd", args)
    args = at_address(mixing_calls.MixupCrossEntropyBwdArgs, common=common, grad_loss_stride=1)
    assert launched("mixup_cross_entropy", "mixup_cross_entropy_bwd", args)


@pytest.mark.parametrize("dtype", [0, 1, 3])
@pytest.mark.parametrize(
    "rows, width", [(MOST_ROWS, 1), (MOST_ROWS, 32), (300, WIDEST), (2**17, WIDEST)], ids=str
)
def test_pairwise_losses_of_many_and_wide_rows(launched, rows, width, dtype):
    """Wide rows in blocks, of which 2³³ rows would have too many to count."""
    multiply = ctypes.cast(MULTIPLY, ctypes.c_void_p).value
    strides = {"row_strides": (width, 1), "column_strides": (width, 1), "multiply": multiply}
    without = contrastive_calls.Additions(), {"grad_column_bias": None, "grad_row_bias": None}
    each = contrastive_calls.Additions(ADDRESS, ADDRESS, ADDRESS, ADDRESS, 0), {}
    for (both, square, kept), (additions, bias_grads) in itertools.product(
        ((True, False, False), (False, True, False), (False, False, True)), (without, each)
    ):
        common = at_address(
            contrastive_calls.Common, dtype=dtype, column_dtype=dtype, normalize_rows=1, normalize_columns=1,
            both_directions=both, N=rows, M=rows, D=width, P=1, additions=additions, **strides,
            columns=None if square else ADDRESS, row_ids=None, column_ids=None,
        )  # fmt: skip
        more = {} if kept else {"expectation": None}
        args = at_address(contrastive_calls.FwdArgs, common=common, **more)
        assert launched("contrastive", "contrastive_fwd", args)
        args = at_address(contrastive_calls.BwdArgs, common=common, **bias_grads, **more)
        assert launched("contrastive", "contrastive_bwd", args)
    common = at_address(
        sigmoid_pairs_calls.Common, dtype=dtype, normalize_rows=1, normalize_columns=1, N=rows, M=rows, D=width,
        **strides,
    )  # fmt: skip
    for keep in (0, 1):
        args = at_address(sigmoid_pairs_calls.FwdArgs, common=common, total=1, keep=keep)
        assert launched("sigmoid_pairs", "sigmoid_pairs_fwd", args)
    assert launched(
        "sigmoid_pairs", "sigmoid_pairs_bwd", at_address(sigmoid_pairs_calls.BwdArgs, common=common)
    )
    rows = min(rows, 2**31 - 2)  # what the operator takes
    common = at_address(
        batch_hard_calls.Common, dtype=dtype, normalize=1, N=rows, D=width, strides=(width, 1)
    )
    assert launched("batch_hard", "batch_hard", at_address(batch_hard_calls.Args, common=common))


@pytest.mark.parametrize("dtype", [0, 3])
@pytest.mark.parametrize("rows, width", [(2**33, 1), (2**31 - 1, 5000), (300, WIDEST)], ids=str)
def test_rows_of_many_and_wide_rows(launched, rows, width, dtype):
    common = at_address(
        row_pairs_calls.Operands, dtype=dtype, pairs=2, normalize=1, N=rows, D=width,
        row_strides=(width,) * 3, column_strides=(1,) * 3,
    )  # fmt: skip
    for name in ("fwd", "bwd"):
        structure = getattr(row_pairs_calls, f"{name.title()}Args")
        assert launched("row_pairs", f"row_pairs_{name}", at_address(structure, common=common))
    args = at_address(
        queue_calls.Args, storage_dtype=dtype, key_dtype=dtype, normalize=1, K=rows, B=rows, D=width,
        key_strides=(width, 1),
    )  # fmt: skip
    assert launched("queue_push", "queue_push", args)


# --- shared memory ----------------------------------------------------------------------------------------


def _contrastive(library, d, **options):
    launches, limits = [], []
    for dtype, expectation in itertools.product((torch.float32, torch.float16), (False, True)):
        call = Call(torch.ones(3, d, dtype=dtype), torch.ones(5, d, dtype=dtype), torch.tensor(1.0))
        fwd, some = contrastive_calls.contrastive_fwd(library, call, expectation=expectation, **options)
        limits += library.shared_limits()
        grad = torch.ones(3, dtype=torch.float64)
        _, more = contrastive_calls.contrastive_bwd(library, call, fwd, grad, **options)
        limits += library.shared_limits()
        launches += some + more
    return launches, limits


def _contrastive_additions(library, d, **options):
    call = Call(torch.ones(3, d), torch.ones(5, d), torch.tensor(1.0), column_bias=torch.zeros(5))
    fwd, launches = contrastive_calls.contrastive_fwd(library, call, **options)
    limits = library.shared_limits()
    _, more = contrastive_calls.contrastive_bwd(
        library, call, fwd, torch.ones(3, dtype=torch.float64), **options
    )
    return launches + more, limits + library.shared_limits()


def _sigmoid_pairs(library, d, **options):
    call = pairs.random_call(3, 5, d, torch.float32)
    *_, launches = sigmoid_pairs_calls.total_with_gradients(library, call, **options)
    limits = library.shared_limits()
    _, more = sigmoid_pairs_calls.losses(library, call, **options)
    return launches + more, limits + library.shared_limits()


def _batch_hard(library, d, **options):
    x = torch.ones(3, d)
    _, launches = batch_hard_calls.batch_hard(
        library, x, torch.zeros(3, dtype=torch.int64), True, "cosine", **options
    )
    return launches, library.shared_limits()


@pytest.mark.parametrize("call", [_contrastive, _contrastive_additions, _sigmoid_pairs, _batch_hard])
def test_shared_memory_is_allowed_once_for_every_width(gpu, library_of, call):
    """The limit belongs to a kernel on a device: another thread's narrower call must not lower it."""
    if not gpu.emulated:
        pytest.skip("a card does not tell")
    library = library_of(f"{call.__name__[1:]}.cu")
    for device in (7, 8):  # of which no other test has heard
        allowed = {}
        for width in (8, 250, 8, 100, 600):
            launches, limits = call(library, width, device=device, executes=False)
            for kernel, where, size in limits:
                assert where == device and kernel not in allowed, "set twice"
                allowed[kernel] = size
            for launch in launches:
                assert launch.shared <= allowed.get(launch.kernel, 48 * 1024)
        assert allowed
