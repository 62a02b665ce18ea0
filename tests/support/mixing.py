"""Batches of every layout, permutations, shares and boxes for the mixing operations, and how their results are judged.

Truth is float64 by the definition; an error is one rounding of the result and a few of its terms.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from ssl_kernels.reference import mixup_cross_entropy as reference

LAYOUTS = ("contiguous", "channels_last", "rotated", "batch_last", "every_other_sample", "cropped", "strided")
CANARY = 77.0
PERMUTATIONS = ("random", "identity", "one cycle", "flip", "roll", "fixed points")


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_layout(values, layout):
    """(view with these values, the memory it is a view of); what the view leaves free holds `CANARY`."""
    shape = values.shape
    inner = tuple(range(1, values.dim()))
    if layout == "channels_last" and inner:
        order = (0, *inner[1:], 1)
    elif layout == "rotated" and inner:
        order = (0, inner[-1], *inner[:-1])
    elif layout == "batch_last":
        order = (*inner, 0)
    else:
        order = tuple(range(values.dim()))
    room = [shape[dim] for dim in order]
    cut = [slice(None)] * len(room)
    if layout == "every_other_sample":
        room[0] = 2 * room[0]
        cut[0] = slice(0, None, 2)
    elif layout == "cropped":
        room = [size + 3 for size in room]
        cut = [slice(1, 1 + shape[dim]) for dim in order]
    elif layout == "strided":
        room[-1] = 3 * room[-1]
        cut[-1] = slice(1, None, 3)
    memory = torch.full(room, CANARY, dtype=torch.float64).to(values.dtype)
    view = memory[tuple(cut)].permute([order.index(dim) for dim in range(len(order))])
    view.copy_(values)
    return view, memory


def untouched_outside(view, memory):
    """Whether the canaries around a view still hold their value."""
    view.fill_(CANARY)
    return bool((memory == torch.tensor(CANARY).to(memory.dtype)).all())


def random_batch(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    return torch.randint(120, shape, generator=generator).to(dtype)


def shares_of(count, dtype=torch.float32, seed=0):
    """(count,) shares in [0, 1], some exactly 0 or 1, in the accumulation dtype of `dtype`."""
    generator = torch.Generator().manual_seed(seed + 3)
    lam = torch.rand(count, generator=generator, dtype=torch.float64).to(accumulation(dtype))
    kind = torch.randint(6, (count,), generator=generator)
    return lam.masked_fill(kind == 0, 0).masked_fill(kind == 1, 1)


def permutation_of(kind, count, seed=0):
    """(count,) int64 of one of PERMUTATIONS, or "pairs" of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "identity":
        return torch.arange(count)
    if kind == "flip":
        return torch.arange(count).flip(0)
    if kind == "roll":
        return torch.arange(count).roll(1)
    if kind == "pairs":
        return torch.arange(count) ^ (torch.arange(count) < count // 2 * 2).long()
    order = torch.randperm(count, generator=generator)
    if kind == "one cycle":
        permutation = torch.empty_like(order)
        permutation[order] = order.roll(-1)
        return permutation
    if kind == "fixed points":
        moved = order[: count // 2]
        permutation = torch.arange(count)
        permutation[moved] = moved.roll(1)
        return permutation
    return order


def random_permutation(count, seed=0):
    return permutation_of("random", count, seed)


def boxes_of(count, height, width, seed=0):
    """(count, 4) int64 boxes (y0, y1, x0, x1) that overlap often; some empty, some the whole image."""
    generator = torch.Generator().manual_seed(seed + 2)
    ends = [torch.randint(0, size + 1, (count, 2), generator=generator) for size in (height, width)]
    boxes = torch.cat([end.sort(1).values for end in ends], 1)
    boxes[torch.rand(count, generator=generator) < 0.15] = torch.tensor([0, height, 0, width])
    boxes[torch.rand(count, generator=generator) < 0.1] = 0
    return boxes


def statistics(channels):
    """Mean and deviation of each channel."""
    generator = torch.Generator().manual_seed(channels)
    return torch.rand(channels, generator=generator), 0.1 + torch.rand(channels, generator=generator)


@st.composite
def calls(draw, least_dims=1, most_dims=5, largest_batch=9):
    """(shape, layout, seed): small batches of any number of dimensions."""
    dims = draw(st.integers(least_dims, most_dims))
    shape = [draw(st.integers(1, largest_batch)), *(draw(st.integers(1, 19)) for _ in range(dims - 1))]
    return tuple(shape), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 1000))


def per_sample(values, x):
    return values.view(-1, *[1] * (x.dim() - 1))


def check_rounded_once(found, truth, term_sums):
    """Each number is off by its last rounding and a few roundings of its terms in the accumulation dtype."""
    info, acc = torch.finfo(found.dtype), accumulation(found.dtype)
    stored = 0 if found.dtype == acc else info.eps / 2
    allowed = 2 * torch.finfo(acc).eps * term_sums + stored * (1 + 1e-3) * truth.abs()
    errors = (found.double() - truth).abs() / (allowed + info.smallest_normal * info.eps)
    assert (errors <= 1).all(), f"error {errors.max().item():.2f} times the allowed"


def on_cpu(*tensors):
    return [tensor.detach().cpu() for tensor in tensors]


def mixup_definition(x, lam, permutation):
    """(λ_i x_i + (1 − λ_i) x_p(i), the sum of its terms' absolute values), float64, sample by sample."""
    mixed, sums = [], []
    for i, partner in enumerate(permutation.tolist()):
        own = lam[i].double() * x[i].double()
        other = (1 - lam[i].double()) * x[partner].double()
        mixed.append(own + other)
        sums.append(own.abs() + other.abs())
    return torch.stack(mixed), torch.stack(sums)


def check_mixup(found, x, lam, permutation):
    """A result of `mixup`, of the dtype of x; what has no partner or weight is a copy to the bit."""
    found, x, lam, permutation = on_cpu(found, x, lam, permutation)
    assert found.dtype == x.dtype
    check_rounded_once(found, *mixup_definition(x, lam, permutation))
    copied = (lam == 1) | (permutation == torch.arange(len(x)))
    assert torch.equal(found[copied], x[copied])


def check_mixup_gradients(grad_x, grad_lam, grad, x, lam, permutation):
    """By x and by lam."""
    assert (grad_x.dtype, grad_lam.dtype) == (x.dtype, lam.dtype)
    grad_x, grad_lam, grad, x, lam, permutation = on_cpu(grad_x, grad_lam, grad, x, lam, permutation)
    grad, x, wide = grad.double(), x.double(), lam.double()
    own, other = per_sample(wide, x) * grad, per_sample(1 - wide, x) * grad
    inverse = permutation.argsort()
    check_rounded_once(grad_x, own + other[inverse], own.abs() + other[inverse].abs())
    exact = (grad * (x - x[permutation])).reshape(len(x), -1).sum(1)
    sums = (grad.abs() * (x.abs() + x[permutation].abs())).reshape(len(x), -1).sum(1)
    assert ((grad_lam.double() - exact).abs() <= 8 * torch.finfo(lam.dtype).eps * sums).all()


def check_mixup_normalize(found, x, lam, permutation, mean, std, dtype):
    """Of bytes x (B, C, H, W)."""
    assert found.dtype == dtype
    found, x, lam, permutation, mean, std = on_cpu(found, x, lam, permutation, mean, std)
    share, mean, std = lam.double().view(-1, 1, 1, 1), *(v.double().view(1, -1, 1, 1) for v in (mean, std))
    mixed = (share * x + (1 - share) * x[permutation]) / 255
    check_rounded_once(found, (mixed - mean) / std, 2 * (mixed + mean) / std)


@dataclass
class CrossEntropyCall:
    """The operands of `mixup_cross_entropy`, and the gradient of each row's loss."""

    logits: torch.Tensor
    target: torch.Tensor
    permutation: torch.Tensor
    lam: torch.Tensor
    grad_loss: torch.Tensor
    label_smoothing: float = 0.0
    weight: torch.Tensor | None = None
    ignore_index: int = -100

    @property
    def operands(self):
        return (self.logits, self.target, self.permutation, self.lam, self.grad_loss)


def cross_entropy_call(rows, classes, dtype, *, seed=0, spread=3.0, kind="random", **options):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    grad_loss = torch.randn(rows, generator=generator, dtype=torch.float64)
    lam = shares_of(rows, dtype, seed)
    return CrossEntropyCall(logits, target, permutation_of(kind, rows, seed), lam, grad_loss, **options)


def exact_cross_entropy(call):
    """Losses, gradients by logits and lam, and the weights of the rows in a mean, float64."""
    z, lam = call.logits.double().requires_grad_(), call.lam.double().requires_grad_()
    weight = None if call.weight is None else call.weight.double()
    operands = (call.target, call.permutation, lam, weight)
    if weight is None and (call.target != call.ignore_index).all():
        one_hot = F.one_hot(call.target, z.shape[1]).double()
        dense = lam[:, None] * one_hot + (1 - lam[:, None]) * one_hot[call.permutation]
        losses = F.cross_entropy(z, dense, reduction="none", label_smoothing=call.label_smoothing)
    else:
        losses = reference.mixup_cross_entropy(z, *operands, call.label_smoothing, call.ignore_index)
    counted = reference.target_terms(*operands, call.ignore_index, False).counted
    return (losses.detach(), *torch.autograd.grad(losses, (z, lam), call.grad_loss), counted.detach())


def check_cross_entropy(call, loss, grad_logits, grad_lam=None, counted=None, *, plain=False):
    """Each row's loss, the gradients of their weighted sum, and the weights in a mean where they are given.

    Differences of logits enter, so that their size does not count but in the mean that smoothing takes; in `plain`
    PyTorch each is as wrong as its logit is large.
    """
    exact, exact_logits, exact_lam, exact_counted = exact_cross_entropy(call)
    acc = call.lam.dtype
    eps, info = torch.finfo(acc).eps, torch.finfo(call.logits.dtype)
    heaviest = 1 if call.weight is None else max(1, call.weight.abs().max().item())
    upstream = heaviest * call.grad_loss.abs()
    largest = call.logits.double().abs().amax(1)
    size = 2 + (1 if plain else call.label_smoothing) * largest
    loss, grad_logits = on_cpu(loss, grad_logits)
    of_truth = torch.finfo(torch.float64).eps * call.logits.shape[1] ** 0.5  # it sums over the classes
    rounding = (8 if plain else 4) * eps + of_truth
    assert ((loss.double() - exact).abs() <= rounding * size * heaviest + eps * exact.abs()).all()
    assert grad_logits.dtype == call.logits.dtype
    stored = 0 if call.logits.dtype == acc else info.eps / 2 * 1.001
    allowed = (
        stored * exact_logits.abs() + ((8 * eps * (size if plain else 1) + of_truth) * upstream)[:, None]
    )
    errors = (grad_logits.double() - exact_logits).abs()
    assert (errors <= allowed + info.smallest_normal * info.eps).all()
    if grad_lam is not None:
        assert grad_lam.dtype == acc
        assert ((grad_lam.double() - exact_lam).abs() <= 8 * eps * (2 + largest) * upstream).all()
    if counted is not None:
        assert ((counted.cpu() - exact_counted).abs() <= eps * heaviest).all()
