"""A clock that moves only when told to, and losses whose cost on it is known."""

import torch

from benchmarks.harness import Implementation, Workload, loss_and_gradients


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds_between(self, start, end):
        return end - start


class FakeProduct:
    """Stands for `harness.ProductTimer`: 1024 operations in `each` seconds."""

    size, dtype, operations = 8, torch.float32, 1024

    def __init__(self, clock, each=0.5):
        self.clock, self.each, self.seconds = clock, each, []

    def measure(self):
        self.clock.now += self.each
        self.seconds.append(self.each)


class _SquareSum(torch.autograd.Function):
    """Sum of squares times `factor`; its forward and backward take given times on the clock."""

    @staticmethod
    def forward(ctx, x, clock, forward_seconds, backward_seconds, factor):
        clock.now += forward_seconds()
        ctx.save_for_backward(x)
        ctx.clock, ctx.seconds, ctx.factor = clock, backward_seconds, factor
        return factor * x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.seconds()
        (x,) = ctx.saved_tensors
        return grad * 2 * ctx.factor * x, None, None, None, None


def constantly(value):
    return lambda: value


def square_sum(name, clock, forward_seconds, backward_seconds, factor=1.0, **about):
    """An Implementation of the sum of squares; the times are numbers or functions without arguments."""
    times = [t if callable(t) else constantly(t) for t in (forward_seconds, backward_seconds)]
    return Implementation(name, lambda x: _SquareSum.apply(x, clock, *times, factor), **about)


def square_sum_workload(implementations, rows=4, **about):
    x = torch.linspace(-1, 2, rows).requires_grad_()
    return Workload(
        loss="square_sum",
        sizes={"B": rows, "D": 1},
        inputs=(x,),
        implementations=implementations,
        expected=lambda: loss_and_gradients(lambda x: x.square().sum(), (x,)),
        tolerance=1e-5,
        **about,
    )
