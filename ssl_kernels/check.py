"""Run every kernel that this machine can run against float64 and print the errors.

A kernel passes when its error is at most three times that of plain PyTorch in the same dtype, or a few
units in the last place. Exit code 1 if one fails.
"""

import itertools

import torch
import torch.nn.functional as F

from ssl_kernels import backends
from ssl_kernels.ops.contrastive import contrastive

SHAPES = [(64, None, 128), (513, None, 123), (130, 700, 64)]  # N, M (None: square), D
TEMPERATURES = [0.005, 0.1, 10.0]


def add_arguments(parser):
    parser.add_argument("--device", help="cpu or cuda (default: both where there is a GPU)")


def run(args, parser):
    """Print one line a kernel and dtype; returns 0 if all pass."""
    devices = [args.device] if args.device else ["cpu", *["cuda"] * torch.cuda.is_available()]
    failures = 0
    print(f"{'device':<8}{'backend':<11}{'dtype':<10}{'value':>10}{'plain':>10}{'gradient':>10}{'plain':>10}")
    for device, dtype in itertools.product(devices, ["float64", "float32", "float16", "bfloat16"]):
        for backend in ("native", "triton", "chunked"):
            rows = torch.zeros(2, 128, device=device, dtype=getattr(torch, dtype))
            reason = backends.backends_for("contrastive", rows)[backend]
            if reason:
                print(f"{device:<8}{backend:<11}{dtype:<10}  cannot run: {reason}")
                continue
            ours, plain = _worst_errors(backend, device, getattr(torch, dtype))
            passed = all(error <= 3 * other + 1e-6 for error, other in zip(ours, plain, strict=True))
            failures += not passed
            numbers = (ours[0], plain[0], ours[1], plain[1])
            cells = "".join(f"{number:>10.1e}" for number in numbers)
            print(f"{device:<8}{backend:<11}{dtype:<10}{cells}  {'ok' if passed else 'FAILED'}")
    return 1 if failures else 0


def _worst_errors(backend, device, dtype):
    """((value, gradient) of the backend, the same of plain PyTorch), the worst over shapes and temperatures.

    Relative to the largest entry of the float64 result.
    """
    worst = [[0.0, 0.0], [0.0, 0.0]]
    generator = torch.Generator().manual_seed(0)
    for (n, m, d), temperature in itertools.product(SHAPES, TEMPERATURES):
        inputs = [torch.randn(n, d, generator=generator)]
        if m is not None:
            inputs.append(torch.randn(m, d, generator=generator))
        inputs = [tensor.to(device, dtype) for tensor in inputs]
        positives = torch.randint(m or n, (n,), generator=generator).to(device)
        truth = _value_and_gradients(_plain, [x.double() for x in inputs], temperature, positives)
        for row, loss in zip(worst, (_through(backend), _plain), strict=True):
            got = _value_and_gradients(loss, inputs, temperature, positives)
            row[0] = max(row[0], _relative_error(got[:1], truth[:1]))
            row[1] = max(row[1], _relative_error(got[1:], truth[1:]))
    return worst


def _plain(rows, columns, temperature, positives):
    """Mean loss as plain PyTorch code computes it, in the dtype of rows."""
    unit = F.normalize(rows, dim=1)
    logits = unit @ (unit if columns is None else F.normalize(columns, dim=1)).T / temperature
    wanted = logits.gather(1, positives[:, None]).squeeze(1)
    if columns is None:
        logits = logits.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), -torch.inf)
    return (torch.logsumexp(logits, 1) - wanted).mean()


def _through(backend):
    def loss(rows, columns, temperature, positives):
        acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
        scale = torch.full((), 1 / temperature, dtype=acc, device=rows.device)
        result = contrastive(rows, columns, scale, positives=positives, backend=backend)
        return (result.lse - result.positive_logits).mean()

    return loss


def _value_and_gradients(loss, inputs, temperature, positives):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(leaves[0], leaves[1] if len(leaves) > 1 else None, temperature, positives)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _relative_error(got, truth):
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True))
