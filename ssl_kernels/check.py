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
        for call, inputs in CALLS[op](n, d, dtype, torch.Generator().manual_seed(seed)):
            inputs = [tensor.to(device) for tensor in inputs]
            wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
            truth = value_and_gradients(call, "reference", wide)
            for name, errors in worst.items():
                found = value_and_gradients(call, name, inputs)
                errors[:] = [
                    max(error, relative_error(got, true))
                    for error, got, true in zip(errors, found, truth, strict=True)
                ]
    return worst[backend], worst["reference"]


def value_and_gradients(call, backend, inputs):
    """([result], gradients of the floating inputs that the result depends on), by the sum of the result's squares."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result = call(backend, *leaves)
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


# For each operation a function (n, d, dtype, generator) that yields (call(backend, *inputs), inputs).


def contrastive_calls(n, d, dtype, generator):
    z0, z1, others = rows_of(3, n, d, dtype, generator)
    for temperature in TEMPERATURES if d <= 128 else TEMPERATURES[1:2]:
        yield (
            lambda backend, z0, z1, t=temperature: ssl_kernels.nt_xent_loss(z0, z1, t, backend=backend),
            (z0, z1),
        )
        yield (
            lambda backend, q, k, negatives, t=temperature: ssl_kernels.info_nce_loss(
                q, k, negatives, t, backend=backend
            ),
            (z0, z1, others[: n // 2]),
        )
        yield (
            lambda backend, q, k, t=temperature: ssl_kernels.clip_loss(q, k, 1 / t, backend=backend),
            (z0, z1),
        )
        yield (
            lambda backend, q, k, queue, t=temperature: ssl_kernels.moco_loss(
                q, k, queue.detach(), t, backend=backend
            ),
            (z0, z1, F.normalize(others, dim=1)),
        )
    if dtype == torch.float32:  # a queue in half the memory, where the backend takes it
        yield (
            lambda backend, q, k, queue: ssl_kernels.moco_loss(
                q,
                k,
                queue.detach().to(q.dtype) if backend == "triton" and d > 256 else queue.detach(),
                0.1,
                backend=backend,
            ),
            (z0, z1, F.normalize(others, dim=1).bfloat16()),
        )
    yield from calls_with_additions(z0, z1, generator)


def calls_with_additions(rows, columns, generator):
    """Biases, limits and ids, of a rectangle in both directions and of the rows among themselves."""
    n = len(rows)
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    biases = torch.randn(2, n, generator=generator).to(acc)
    biases[:, ::5] = -torch.inf  # padding
    exempt = torch.rand(n, generator=generator) < 0.3
    ids = torch.randint(3 * n, (n,), generator=generator)
    unit, unit_columns = (F.normalize(x.double(), dim=1) for x in (rows, columns))

    def both_directions(backend, rows, columns, biases, limit, exempt, ids):
        positives = torch.arange(n, device=rows.device)
        lse, column_lse, logits = contrastive(
            rows, columns, biases.new_tensor(10.0), positives=positives, row_ids=ids, column_ids=ids,
            keep_diagonal=True, both_directions=True, column_bias=biases[0], row_bias=biases[1],
            row_limit=limit.detach(), exempt=exempt, backend=backend,
        )  # fmt: skip
        return lse.logaddexp(column_lse) - logits

    def square(backend, rows, biases, limit, ids):
        lse, *_ = contrastive(
            rows, None, biases.new_tensor(10.0), row_ids=ids % 2, only_equal_ids=True, column_bias=biases[0],
            row_limit=limit.detach(), backend=backend,
        )  # fmt: skip
        return lse

    limit = limits_between(10 * unit @ unit_columns.T).to(acc)
    yield both_directions, (rows, columns, biases, limit, exempt, ids)
    yield square, (rows, biases, limits_between(10 * unit @ unit.T).to(acc), ids)


def sigmoid_pairs_calls(n, d, dtype, generator):
    rows, columns = rows_of(2, n, d, dtype, generator)
    for scale in (1.0, 10.0):
        yield (
            lambda backend, rows, columns, s=scale: ssl_kernels.siglip_loss(
                rows, columns, s, -s, backend=backend
            ),
            (rows, columns),
        )
    ids = torch.randint(n // 2, (n,), generator=generator)
    for marks in ("ids", "image_index"):
        yield (
            lambda backend, rows, columns, ids, name=marks: ssl_kernels.siglip_loss(
                rows, columns, 5.0, -2.0, **{name: ids}, backend=backend
            ),
            (rows, columns, ids),
        )


def batch_hard_calls(n, d, dtype, generator):
    (rows,) = rows_of(1, n, d, dtype, generator)
    labels = torch.randint(n // 4, (n,), generator=generator)
    for distance in ("euclidean", "cosine"):
        yield (
            lambda backend, rows, labels, by=distance: ssl_kernels.triplet_loss(
                rows, labels, distance=by, backend=backend
            ),
            (rows, labels),
        )


def row_pairs_calls(n, d, dtype, generator):
    rows = rows_of(3, n, d, dtype, generator)
    yield lambda backend, p, t: ssl_kernels.byol_loss(p, t, backend=backend), rows[:2]
    for distance, normalize in itertools.product(("euclidean", "cosine"), (True, False)):
        yield (
            lambda backend, *rows, by=distance, unit=normalize: ssl_kernels.triplet_margin_loss(
                *rows, 1.5, distance=by, normalize=unit, backend=backend
            ),
            rows,
        )


def mixup_calls(n, d, dtype, generator):
    (x,) = rows_of(1, n, d, dtype, generator)
    lam, permutation = draw(n, generator)

    def in_place(backend, x, permutation):
        return ssl_kernels.mixup_(x.detach().clone(), lam.to(x.device), permutation, backend=backend)

    yield (
        lambda backend, x, p: ssl_kernels.mixup(x, lam.to(x.device), p, backend=backend),
        (x, permutation),
    )
    yield in_place, (x, permutation)


def cutmix_calls(n, d, dtype, generator):
    (x,) = rows_of(1, n, d, dtype, generator)
    low, high = torch.randint(0, d + 1, (2, n), generator=generator).sort(0).values
    boxes = torch.stack((torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64), low, high), 1)
    yield (
        lambda backend, x, p, boxes: ssl_kernels.cutmix(x[:, None], boxes, p, backend=backend),
        (x, draw(n, generator)[1], boxes),
    )


def mixup_normalize_calls(n, d, dtype, generator):
    images = torch.randint(0, 256, (n, 3, 4, d), dtype=torch.uint8, generator=generator)
    lam, permutation = draw(n, generator)
    yield (
        lambda backend, x, p: ssl_kernels.mixup_normalize(
            x, lam.to(x.device), p, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype, backend=backend
        ),
        (images, permutation),
    )


def mixup_cross_entropy_calls(n, d, dtype, generator):
    (logits,) = rows_of(1, n, d, dtype, generator)
    lam, permutation = draw(n, generator)
    yield (
        lambda backend, logits, target, p: ssl_kernels.mixup_cross_entropy(
            logits, target, p, lam.to(logits.device), label_smoothing=0.1, backend=backend
        ),
        (logits, torch.randint(d, (n,), generator=generator), permutation),
    )


def queue_push_calls(n, d, dtype, generator):
    storage, keys = rows_of(2, n, d, dtype, generator)

    def push(backend, storage, keys):
        storage = storage.detach().clone()
        counters = torch.zeros((2,), dtype=torch.int64, device=storage.device)
        queue_push_(storage, keys.detach()[: n // 3], counters[0], counters[1], backend=backend)
        queue_push_(storage, keys.detach()[n // 3 :], counters[0], counters[1], backend=backend)
        return storage

    yield push, (storage, keys)


def momentum_update_calls(n, d, dtype, generator):
    start, *sources = rows_of(3, n, d, dtype, generator)

    def update(backend, start, *sources):
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

    yield update, (start, *sources)


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
    return torch.rand(n, generator=generator), torch.randperm(n, generator=generator)
