"""The optimizers of the recipes and their schedule."""

import math

import torch

MOMENTUM = 0.9  # of SGD and LARS


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are in proportion to the weights they change, layer by layer.

        g ← ∇ + weight_decay · w;  g ← g · trust · ‖w‖ / ‖g‖;  v ← momentum · v + g;  w ← w − lr · v

    Vectors (biases, weights of normalisations) are neither decayed nor scaled, and neither is a tensor whose weights or
    gradient are all 0.

    Source: You et al., arXiv:1708.03888; the exceptions as in Grill et al., BYOL, arXiv:2006.07733, appendix J.
    """

    def __init__(self, parameters, lr, *, momentum=MOMENTUM, weight_decay=0.0, trust=1e-3):
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight, group):
        change = weight.grad
        if weight.dim() > 1:
            change = change.add(weight, alpha=group["weight_decay"])
            size, change_size = weight.norm(), change.norm()
            ratio = group["trust"] * size / change_size
            change = change * torch.where((size > 0) & (change_size > 0), ratio, 1)
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].mul_(group["momentum"]).add_(change)
        weight.sub_(group["lr"] * state["momentum_buffer"])


def make_optimizer(parameters, settings):
    """The optimizer that a `Settings` names."""
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=MOMENTUM, **options)
    return LARS(parameters, **options)


def make_schedule(optimizer, warmup, steps):
    """A linear rise over the part `warmup` of the steps, times half a cosine to zero over all of them."""

    def factor(step):
        rise = min(1.0, (step + 1) / (warmup * steps + 1))
        return rise * 0.5 * (1 + math.cos(math.pi * step / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
