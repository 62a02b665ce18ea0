"""Measures implementations of one loss on the same inputs, in one process, by one timer.

First every implementation computes the loss and its gradients, which are compared with the expected ones:
one that disagrees is not timed. Then rounds: in each, every implementation and a matrix product run once, in
an order shuffled anew, so that a change of the machine's pace meets all of them. A ratio is taken within each
round.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ssl_kernels.recipes.memory import peak_memory

LARGEST_CALLS = 1000
PRODUCT_SHARE = 0.25  # of a case's time at most, after the first rounds
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass
class Implementation:
    """One way to compute a loss.

    Args:
        name: As tables and figures show it.
        function: `function(*inputs)` returns the loss, 0-d.
        baseline: Ratios are taken to it.
        missing: Why it cannot run here, or None.
        extra_bytes: What a step may take beyond inputs and gradients; it is left out where less is free.
    """

    name: str
    function: Callable | None
    baseline: bool = False
    missing: str | None = None
    extra_bytes: int = 0


@dataclass
class Workload:
    """One case: the inputs of a loss and what computes it.

    Args:
        loss: Name of the loss.
        sizes: Named sizes, such as {"B": 64, "D": 128}. The first is the figure's axis.
        inputs: Tensors; those that require grad get their gradient in each step.
        implementations: At least one.
        expected: `expected()` returns the loss and the tuple of gradients that all have to agree with.
        tolerance: On |loss - expected| / max(1, |expected|), and on the largest error of a gradient over its
            largest value.
        operations: Floating-point operations of a step at least, or None.
        bytes_moved: Bytes a step reads and writes at least, or None.
    """

    loss: str
    sizes: dict
    inputs: tuple
    implementations: list
    expected: Callable
    tolerance: float
    operations: int | None = None
    bytes_moved: int | None = None


@dataclass
class Budget:
    """How long a case is measured: rounds until `seconds` have passed, `least_rounds` at least."""

    seconds: float = 10.0
    least_rounds: int = 7
    sample_seconds: float = 2e-3  # a sample repeats a short step until it lasts as long


class Disagreement(Exception):
    """An implementation computes something else."""


class CPUClock:
    """Marks are points in time, in seconds."""

    def mark(self):
        return time.perf_counter()

    def seconds_between(self, start, end):
        return end - start


class CUDAClock:
    """Marks are events in the current stream: the time between two is the device's."""

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start, end):
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device):
    return CUDAClock() if torch.device(device).type == "cuda" else CPUClock()


def spread(values):
    """{"median", "q1", "q3"} of some numbers."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def loss_and_gradients(function, inputs):
    """(loss, gradients of those inputs that require grad)."""
    loss = function(*inputs)
    return loss, gradients_of(loss, inputs)


def gradients_of(loss, inputs):
    """Of those inputs that require grad; none where none does."""
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(loss, wanted) if wanted else ()


def check_agreement(implementation, inputs, expected, tolerance):
    """The errors of loss and gradients as `Workload` defines them; raises Disagreement above tolerance."""
    loss, gradients = loss_and_gradients(implementation.function, inputs)
    expected_loss, expected_gradients = expected
    expected_value = expected_loss.item()
    errors = {
        "loss": abs(loss.item() - expected_value) / max(1.0, abs(expected_value)),
        "gradients": max(map(_largest_error, gradients, expected_gradients), default=0.0),
    }
    for quantity, error in errors.items():
        if not error <= tolerance:  # NaN disagrees too
            raise Disagreement(f"error of the {quantity} {error:.2g}, tolerance {tolerance:.2g}")
    return errors


def _largest_error(gradient, expected):
    expected = expected.double()
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((gradient.double() - expected).abs().max() / largest).item()


class StepTimer:
    """Times steps of one implementation: a forward as in training, and its backward."""

    def __init__(self, function, inputs, clock, sample_seconds):
        self.function, self.inputs, self.clock = function, inputs, clock
        self.forwards, self.steps = [], []  # seconds, a number per sample
        self.calls = 1
        _, step = self._sample()
        if step < sample_seconds:  # short enough to be doubled by an interruption
            step = min(step, self._sample()[1], self._sample()[1])
        self.calls = min(max(1, math.ceil(sample_seconds / max(step, 1e-9))), LARGEST_CALLS)

    def measure(self):
        forward, step = self._sample()
        self.forwards.append(forward)
        self.steps.append(step)

    def _sample(self):
        """Mean seconds of the forward and of the whole step over `calls` steps."""
        if self.calls > 1:  # the caches still hold what another one has left there
            self._step()
        marks = [self._step() for _ in range(self.calls)]
        forward = sum(self.clock.seconds_between(start, middle) for start, middle, _ in marks)
        step = sum(self.clock.seconds_between(start, end) for start, _, end in marks)
        return forward / self.calls, step / self.calls

    def _step(self):
        start = self.clock.mark()
        loss = self.function(*self.inputs)
        middle = self.clock.mark()
        gradients = gradients_of(loss, self.inputs)
        del loss, gradients
        return start, middle, self.clock.mark()


class ProductTimer:
    """Times the yardstick: a square matrix product, float32 on the CPU and in the inputs' dtype on a GPU."""

    def __init__(self, like, clock, size=None):
        self.size = size or PRODUCT_SIZE[like.device.type]
        self.dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self.clock = clock
        self.left = torch.randn(self.size, self.size, device=like.device).to(self.dtype)
        self.right = torch.randn(self.size, self.size, device=like.device).to(self.dtype)
        self.out = torch.empty_like(self.left)
        self.operations = 2 * self.size**3
        self.seconds = []
        torch.mm(self.left, self.right, out=self.out)

    def measure(self):
        start = self.clock.mark()
        torch.mm(self.left, self.right, out=self.out)
        self.seconds.append(self.clock.seconds_between(start, self.clock.mark()))


@dataclass
class Case:
    """A workload with the implementations that agree and fit, ready to be timed."""

    workload: Workload
    implementations: list = field(default_factory=list)
    errors: dict = field(default_factory=dict)  # by name
    left_out: dict = field(default_factory=dict)  # reason by name
    faults: list = field(default_factory=list)  # names of those that ran and were wrong or failed


def admit(workload, free_bytes=math.inf):
    """Run each implementation once; the Case of those that agree with what is expected."""
    case = Case(workload)
    inputs, tolerance = workload.inputs, workload.tolerance
    can_run = any(one.missing is None for one in workload.implementations)
    expected = workload.expected() if can_run else None
    for implementation in workload.implementations:
        name = implementation.name
        if implementation.missing is not None:
            case.left_out[name] = implementation.missing
        elif implementation.extra_bytes > free_bytes:
            needed, free = implementation.extra_bytes / 1e9, free_bytes / 1e9
            case.left_out[name] = f"it needs about {needed:.1f} GB, {free:.1f} GB are free"
        else:
            try:
                case.errors[name] = check_agreement(implementation, inputs, expected, tolerance)
                case.implementations.append(implementation)
            except Exception as error:
                reason = str(error) if isinstance(error, Disagreement) else _first_line(error)
                case.left_out[name] = f"refused: {reason}"
                case.faults.append(name)
    return case


def _first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def measure(case, budget, clock=None, product=None):
    """Time every implementation of `case` and its memory; the record that is stored.

    Args:
        clock, product: Those of the inputs' device, unless given.
    """
    workload = case.workload
    inputs = workload.inputs
    clock = clock or clock_of(inputs[0].device)
    product = product or ProductTimer(inputs[0], clock)
    extra_bytes = {one.name: measure_extra_bytes(one.function, inputs) for one in case.implementations}
    timers = run_rounds(case, budget, clock, product)
    product_spread = spread(product.seconds)
    product_rate = product.operations / product_spread["median"]
    record = {
        "loss": workload.loss,
        "sizes": workload.sizes,
        "dtype": str(workload.inputs[0].dtype).removeprefix("torch."),
        "tolerance": workload.tolerance,
        "operations": workload.operations,
        "bytes_moved": workload.bytes_moved,
        "product": {
            "size": product.size,
            "dtype": str(product.dtype).removeprefix("torch."),
            "seconds": product_spread,
            "samples": len(product.seconds),
            "operations_per_second": product_rate,
        },
        "left_out": case.left_out,
        "implementations": {},
    }
    baselines = {one.name: timers[one.name].steps for one in case.implementations if one.baseline}
    for implementation in case.implementations:
        name, timer = implementation.name, timers[implementation.name]
        step = spread(timer.steps)
        rate = workload.operations and workload.operations / step["median"]
        record["implementations"][name] = {
            "baseline": implementation.baseline,
            "forward_seconds": spread(timer.forwards),
            "step_seconds": step,
            "samples": len(timer.steps),
            "calls_in_a_sample": timer.calls,
            "ratio_to": {
                other: ratio(theirs, timer.steps) for other, theirs in baselines.items() if other != name
            },
            "operations_per_second": rate,
            "fraction_of_product": rate and rate / product_rate,
            "bytes_per_second": workload.bytes_moved and workload.bytes_moved / step["median"],
            "extra_bytes": extra_bytes[name],
            "errors": case.errors[name],
        }
    return record


def run_rounds(case, budget, clock, product):
    """{name: StepTimer} after all rounds, with `product` timed among them."""
    inputs = case.workload.inputs
    timers = {
        one.name: StepTimer(one.function, inputs, clock, budget.sample_seconds)
        for one in case.implementations
    }
    order = [*timers.values(), product]
    shuffle = random.Random(0).shuffle
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock.mark()
        rounds = elapsed = 0
        while rounds < budget.least_rounds or elapsed < budget.seconds:
            shuffle(order)
            product_due = rounds < budget.least_rounds or sum(product.seconds) < PRODUCT_SHARE * elapsed
            for timer in order:
                if timer is not product or product_due:
                    timer.measure()
            rounds += 1
            elapsed = clock.seconds_between(start, clock.mark())
    finally:
        if collects:
            gc.enable()
    return timers


def ratio(baseline, ours):
    """How many times as fast as `baseline`: the spread of the ratio within each round."""
    return spread([theirs / own for theirs, own in zip(baseline, ours, strict=True)])


def measure_extra_bytes(function, inputs):
    """Bytes a step allocates at its worst moment, beyond its inputs and the gradients that it returns."""
    gradient_bytes = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad)

    def step():
        loss_and_gradients(function, inputs)

    return max(0, peak_memory(step, inputs[0].device) - gradient_bytes)
