"""Run every kernel that this machine can run against float64 and print the errors.

A kernel passes when its error is at most three times that of the plain PyTorch reference in the same dtype, or a few
units in the last place. Errors are relative to the largest entry of the float64 result, the worst over all calls and
shapes of an operation. Exit code 1 if a kernel fails.
"""

import itertools
import math

import torch
import torch.nn.functional as F

import ssl_kernels
from ssl_kernels import backends
from ssl_kernels.checks import DTYPES
from ssl_kernels.cli import usable_device
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.momentum_update import momentum_update_
from ssl_kernels.ops.queue_push import queue_push_

# N, D: whole tiles; ragged ones, whose walk over columns is split; rows wider than one tile of a kernel holds.
SHAPES = ((64, 128), (513, 123), (65, 200), (33, 520))
TEMPERATURES = (0.005, 0.1, 10.0)


def add_arguments(parser):
    parser.add_argument("--device", help="cpu or cuda (default: both where there is a GPU)")
    parser.add_argument("op", nargs="*", help=f"of {', '.join(CALLS)}; all without any")


def run(args, parser):
    """Print a line for each kernel and dtype; returns 0 if all pass."""
    unknown = [op for op in args.op if op not in CALLS]
    if unknown:
        parser.error(f"op must be of {', '.join(CALLS)}, got {unknown[0]}")
    if args.device is not None:
        try:
            device = usable_device(args.device)
        except ValueError as error:
            parser.error(str(error))
        if device.type not in ("cpu", "cuda"):
            parser.error(f"--device must be on cpu or cuda, got {args.device}")
    devices = [args.device] if args.device is not None else ["cpu", *["cuda"] * torch.cuda.is_available()]
    failures = 0
    print(
        f"{'operation':<22}{'device':<7}{'backend':<9}{'dtype':<10}{'value':>9}{'plain':>9}{'gradient':>10}{'plain':>9}"
    )
    for op, device, backend in itertools.product(args.op or CALLS, devices, ("native", "triton", "chunked")):
        head = f"{op:<22}{device:<7}{backend:<9}"
        reason = backends.backends_for(op, torch.zeros(2, 128, device=device))[backend]
        if reason:
            print(f"{head}cannot run: {reason}")
            continue
        for dtype in DTYPES:
            if op in ("mixup_normalize", "momentum_update") and dtype == torch.float64:
                continue  # images and masters are float32 at the widest
            ours, plain = worst_errors(op, backend, device, dtype)
            # The reference in float64 is the truth itself.
            floor = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
            passed = all(
                math.isfinite(error) and error <= 3 * other + floor
                for error, other in zip(ours, plain, strict=True)
            )
            failures += not passed
            cells = f"{ours[0]:>9.1e}{plain[0]:>9.1e}{ours[1]:>10.1e}{plain[1]:>9.1e}"
            print(f"{head}{str(dtype).removeprefix('torch.'):<10}{cells}  {'ok' if passed else 'FAILED'}")
    return 1 if failures else 0


def worst_errors(op, backend, device, dtype):
    """((value, gradient) of the backend, the same of "reference")."""
    worst = {backend: [0.0, 0.0], "reference": [0.0, 0.0]}
    for seed, (n, d) in enumerate(SHAPES):
        for function, *operands in CALLS[op](n, d, dtype, torch.Generator().manual_seed(seed)):
            inputs, options = on_tensors(lambda tensor: tensor.to(device), *operands)
            wide = on_tensors(lambda x: x.double() if x.is_floating_point() else x, inputs, options)
            truth = value_and_gradients("reference", function, *wide)
            for name, errors in worst.items():
                found = value_and_gradients(name, function, inputs, options)
                errors[:] = [
                    max(error, relative_error(got, true))
                    for error, got, true in zip(errors, found, truth, strict=True)
                ]
    return worst[backend], worst["reference"]


def on_tensors(change, inputs, options):
    """Both with change(tensor) in place of each tensor."""
    changed = {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return [change(tensor) for tensor in inputs], changed


def value_and_gradients(backend, function, inputs, options):
    """([result], gradients of the floating inputs that the result depends on), by the sum of the result's squares."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result = function(*leaves, **options, backend=backend)
    if not result.requires_grad:
        return [result], []
    grads = torch.autograd.grad(
        result.double().square().sum(), [x for x in leaves if x.requires_grad], allow_unused=True
    )
    return [result.detach()], [grad for grad in grads if grad is not None]


def relative_error(got, truth):
    """The largest over tensors; 0 without any."""
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(got, truth, strict=True)
    ]
    return max((float("inf") if error != error else error for error in errors), default=0.0)


# For each operation a function (n, d, dtype, generator) that yields calls (function, inputs, options). The call is
# function(*inputs, **options, backend=...), and the floating inputs are what it is differentiated by. The functions are
# those that users call, with the short paths of small batches, and one rule judges them all; the tests hold the
# operators below them to stricter rules, one for each operation, which are many times as long and not installed.


def contrastive_calls(n, d, dtype, generator):
    z0, z1, others = rows_of(3, n, d, dtype, generator)
    queue = F.normalize(others, dim=1)
    for temperature in TEMPERATURES if d <= 128 else TEMPERATURES[1:2]:
        at = {"temperature": temperature}
        yield ssl_kernels.nt_xent_loss, (z0, z1), at
        yield ssl_kernels.info_nce_loss, (z0, z1, others[: n // 2]), at
        yield ssl_kernels.clip_loss, (z0, z1), {"logit_scale": 1 / temperature}
        yield ssl_kernels.moco_loss, (z0, z1), at | {"queue": queue}
    if dtype == torch.float32:
        yield moco_with_narrow_queue, (z0, z1), {"queue": queue.bfloat16()}
    yield from calls_with_additions(z0, z1, generator)


def moco_with_narrow_queue(query, key, *, queue, backend):
    """A queue in half the memory, where the backend takes it."""
    if backend == "triton" and query.shape[1] > 256:
        queue = queue.to(query.dtype)
    return ssl_kernels.moco_loss(query, key, queue, 0.1, backend=backend)


def calls_with_additions(rows, columns, generator):
    """Biases, limits and ids, of a rectangle in both directions and of the rows among themselves."""
    n = len(rows)
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    biases = torch.randn(2, n, generator=generator).to(acc)
    biases[:, ::5] = -torch.inf  # padding
    exempt = torch.rand(n, generator=generator) < 0.3
    ids = torch.randint(3 * n, (n,), generator=generator)
    unit, unit_columns = (F.normalize(x.double(), dim=1) for x in (rows, columns))
    limit, square_limit = (limits_between(10 * unit @ other.T).to(acc) for other in (unit_columns, unit))
    yield (
        both_directions_with_additions,
        (rows, columns, biases),
        {"limit": limit, "exempt": exempt, "ids": ids},
    )
    yield square_with_additions, (rows, biases), {"limit": square_limit, "ids": ids}


def both_directions_with_additions(rows, columns, biases, *, limit, exempt, ids, backend):
    lse, column_lse, logits = contrastive(
        rows, columns, biases.new_tensor(10.0), positives=torch.arange(len(rows), device=rows.device),
        row_ids=ids, column_ids=ids, keep_diagonal=True, both_directions=True, column_bias=biases[0],
        row_bias=biases[1], row_limit=limit, exempt=exempt, backend=backend,
    )  # fmt: skip
    return lse.logaddexp(column_lse) - logits


def square_with_additions(rows, biases, *, limit, ids, backend):
    lse, *_ = contrastive(
        rows, None, biases.new_tensor(10.0), row_ids=ids % 2, only_equal_ids=True, column_bias=biases[0],
        row_limit=limit, backend=backend,
    )  # fmt: skip
    return lse


def sigmoid_pairs_calls(n, d, dtype, generator):
    rows = rows_of(2, n, d, dtype, generator)
    for scale in (1.0, 10.0):
        yield ssl_kernels.siglip_loss, rows, {"logit_scale": scale, "logit_bias": -scale}
    ids = torch.randint(n // 2, (n,), generator=generator)
    for marks in ("ids", "image_index"):
        yield ssl_kernels.siglip_loss, rows, {"logit_scale": 5.0, "logit_bias": -2.0, marks: ids}


def batch_hard_calls(n, d, dtype, generator):
    rows = rows_of(1, n, d, dtype, generator)
    labels = torch.randint(n // 4, (n,), generator=generator)
    for distance in ("euclidean", "cosine"):
        yield ssl_kernels.triplet_loss, rows, {"labels": labels, "distance": distance}


def row_pairs_calls(n, d, dtype, generator):
    rows = rows_of(3, n, d, dtype, generator)
    yield ssl_kernels.byol_loss, rows[:2], {}
    for distance, normalize in itertools.product(("euclidean", "cosine"), (True, False)):
        options = {"margin": 1.5, "distance": distance, "normalize": normalize}
        yield ssl_kernels.triplet_margin_loss, rows, options


def mixup_calls(n, d, dtype, generator):
    x = rows_of(1, n, d, dtype, generator)
    yield ssl_kernels.mixup, x, draw(n, generator)
    yield mixup_in_place, x, draw(n, generator)


def mixup_in_place(x, *, lam, permutation, backend):
    return ssl_kernels.mixup_(x.detach().clone(), lam, permutation, backend=backend)


def cutmix_calls(n, d, dtype, generator):
    (x,) = rows_of(1, n, d, dtype, generator)
    low, high = torch.randint(0, d + 1, (2, n), generator=generator).sort(0).values
    boxes = torch.stack((torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64), low, high), 1)
    yield (
        ssl_kernels.cutmix,
        (x[:, None],),
        {"boxes": boxes, "permutation": draw(n, generator)["permutation"]},
    )


def mixup_normalize_calls(n, d, dtype, generator):
    images = torch.randint(0, 256, (n, 3, 4, d), dtype=torch.uint8, generator=generator)
    scaling = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "dtype": dtype}
    yield ssl_kernels.mixup_normalize, (images,), draw(n, generator) | scaling


def mixup_cross_entropy_calls(n, d, dtype, generator):
    logits = rows_of(1, n, d, dtype, generator)
    target = torch.randint(d, (n,), generator=generator)
    options = {"target": target, "label_smoothing": 0.1}
    yield ssl_kernels.mixup_cross_entropy, logits, draw(n, generator) | options


def queue_push_calls(n, d, dtype, generator):
    yield pushed_twice, rows_of(2, n, d, dtype, generator), {}


def pushed_twice(storage, keys, *, backend):
    """The ring after a push of a third of the keys and one of the others."""
    storage, third = storage.detach().clone(), len(keys) // 3
    position, filled = torch.zeros((2,), dtype=torch.int64, device=storage.device)
    for part in (keys.detach()[:third], keys.detach()[third:]):
        queue_push_(storage, part, position, filled, backend=backend)
    return storage


def momentum_update_calls(n, d, dtype, generator):
    yield updated_average, rows_of(3, n, d, dtype, generator), {}


def updated_average(start, *sources, backend):
    """The master, and how far the shadow is from it rounded."""
    if start.dtype == torch.float64:  # the truth: masters are float32
        for source in sources:
            start = 0.9 * start + 0.1 * source
        return torch.cat((start, torch.zeros_like(start))).detach()
    master = start.detach().float()
    shadow = master.to(torch.float16 if start.dtype == torch.float16 else torch.bfloat16)
    for source in sources:
        momentum_update_([master], [shadow], [source.detach()], 0.9, backend=backend)
    return torch.cat((master, shadow.float() - master.to(shadow.dtype).float()))


CALLS = {
    "contrastive": contrastive_calls,
    "sigmoid_pairs": sigmoid_pairs_calls,
    "batch_hard": batch_hard_calls,
    "row_pairs": row_pairs_calls,
    "mixup": mixup_calls,
    "cutmix": cutmix_calls,
    "mixup_normalize": mixup_normalize_calls,
    "mixup_cross_entropy": mixup_cross_entropy_calls,
    "queue_push": queue_push_calls,
    "momentum_update": momentum_update_calls,
}


def rows_of(count, n, d, dtype, generator):
    return [torch.randn(n, d, generator=generator).to(dtype) for _ in range(count)]


def limits_between(logits):
    """A limit for each row in the widest gap among the middle of its logits, so that no rounding crosses it."""
    logits = logits.sort(dim=1).values
    middle = logits[:, logits.shape[1] // 4 : logits.shape[1] - logits.shape[1] // 4 + 1]
    at = middle.diff(dim=1).argmax(dim=1, keepdim=True)
    return (middle.gather(1, at) + middle.gather(1, at + 1)).flatten() / 2


def draw(n, generator):
    """λ (n,) and a permutation."""
    return {
        "lam": torch.rand(n, generator=generator),
        "permutation": torch.randperm(n, generator=generator),
    }
