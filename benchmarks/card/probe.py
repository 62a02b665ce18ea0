"""Times calls and tries edges on a GPU: `python -m benchmarks.card.probe SECTION... [--dry]`.

Each finding is printed as a line of JSON at once. A failure is a finding too. Run by `guard`, an attempt that hangs,
crashes or leaves the GPU's context unusable costs only itself.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time

import torch
import torch.nn.functional as F

import ssl_kernels
from benchmarks.card.cases import HALF, SINGLE, cases
from benchmarks.card.guard import LOST
from benchmarks.harness import clock_of, gradients_of, spread
from benchmarks.machine import describe_machine, free_memory
from benchmarks.peers import MATRICES_OF_LOGITS
from ssl_kernels.nn import MoCoQueue

CASE_SECONDS = 1.0  # of rounds, after a first call of each
LEAST_ROUNDS, MOST_ROUNDS = 3, 30


class Probe:
    """Where the sections run, and what they share.

    Args:
        dry: Tiny sizes on the CPU, once each, to try the sections themselves.
        first: Number of the first attempt that is made.
        progress: A file descriptor that is told of each attempt before it is made, or None.
    """

    def __init__(self, dry, first=0, progress=None):
        self.first, self.progress = first, progress
        self.attempts = 0
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.backends = ("native", "chunked") if dry else ("native", "triton")
        self.clock = clock_of(self.device)
        self.start = time.monotonic()

    def say(self, section, **finding):
        line = {"section": section, **finding, "after_seconds": round(time.monotonic() - self.start, 1)}
        print(json.dumps(line), flush=True)

    def attempt(self, section, name, function):
        """Say the result of `function` unless it is None, or how it failed; ends the process where the GPU is lost."""
        number, self.attempts = self.attempts, self.attempts + 1
        if number < self.first:
            return
        if self.progress is not None:
            os.write(self.progress, f"{number}\t{section}\t{name}\n".encode())
        try:
            result = function()
            self.synchronize()
            if result is not None:
                self.say(section, name=name, result=result)
        except Exception as error:
            self.say(section, name=name, error=_in_short(error))
            if self.is_lost():
                sys.exit(LOST)

    def is_lost(self):
        """Whether an error of a kernel has made every further call of this process fail."""
        try:
            self.synchronize()
        except Exception:
            return True
        return False

    def synchronize(self):
        if not self.dry:
            torch.cuda.synchronize()

    def rounds(self, functions, seconds=CASE_SECONDS):
        """{name: median seconds of a call}, interleaved; a function that fails has its error in place of a number."""
        results, samples = {}, {}
        for name, function in functions.items():
            try:
                function()
                self.synchronize()
                samples[name] = []
            except Exception as error:
                if self.is_lost():
                    raise RuntimeError(f"{name}: {_in_short(error)}") from error
                results[name] = _in_short(error)
        end = time.monotonic() + seconds
        for count in range(1 if self.dry else MOST_ROUNDS):
            if count >= LEAST_ROUNDS and time.monotonic() > end:
                break
            for name in samples:
                before = self.clock.mark()
                functions[name]()
                samples[name].append(self.clock.seconds_between(before, self.clock.mark()))
        return results | {name: statistics.median(times) for name, times in samples.items()}

    def seconds(self, function):
        """Median seconds of a call of one function, whose error is raised."""
        found = self.rounds({"it": function})["it"]
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def host_seconds(self, function):
        """Until a call returns that waits for nothing: what a step costs the processor that launches it."""
        self.synchronize()
        times = []
        for _ in range(1 if self.dry else 5):
            before = time.perf_counter()
            function()
            times.append(time.perf_counter() - before)
            self.synchronize()
        return spread(times)["median"]


def _in_short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _step(loss, leaves):
    return lambda: gradients_of(loss(), leaves)


def section_machine(probe):
    """The machine and its yardsticks: cuBLAS, attention, a copy through memory and through the L2 cache."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None

    def describe():
        probe.say("machine", machine=describe_machine(probe.device), triton=version)
        extension = ssl_kernels.backends.extension
        probe.say("machine", build=extension.build_info() if extension else None)

    probe.attempt("machine", "description", describe)
    size = 64 if probe.dry else 8192
    for dtype in (HALF, SINGLE):

        def product(dtype=dtype):
            left, right = (torch.randn(size, size, device=probe.device).to(dtype) for _ in range(2))
            seconds = probe.seconds(lambda: left @ right)
            probe.say("machine", name=f"product {size} {dtype}", tflops=2e-12 * size**3 / seconds)

        probe.attempt("machine", f"product {size} {dtype}", product)
    for name, count in (("copy through memory", 2**30), ("copy through l2", 2**22)):

        def copy(name=name, count=count):
            source = torch.empty(count // (2**16 if probe.dry else 1), device=probe.device)
            target = torch.empty_like(source)
            seconds = probe.seconds(lambda: target.copy_(source))
            probe.say("machine", name=name, terabytes_per_second=2e-12 * source.nbytes / seconds)

        probe.attempt("machine", name, copy)

    def attention():
        length = 16 if probe.dry else 4096
        operands = (torch.randn(4, 16, length, 128, device=probe.device, dtype=HALF) for _ in range(3))
        query, key, value = operands
        seconds = probe.seconds(lambda: F.scaled_dot_product_attention(query, key, value))
        probe.say("machine", name="attention forward", tflops=1e-12 * 4 * 4 * 16 * length**2 * 128 / seconds)

    probe.attempt("machine", "attention forward", attention)


def section_losses(probe):
    """Every case: native, Triton and plain PyTorch, forward and step, interleaved."""
    for case in cases(probe.dry):
        probe.attempt("losses", case.name, lambda case=case: _time_case(probe, case))
        if not probe.dry:
            torch.cuda.empty_cache()


def _time_case(probe, case):
    ours, plain, leaves = case.make(probe.device)
    losses = {backend: lambda backend=backend: ours(backend) for backend in probe.backends}
    plain_bytes = MATRICES_OF_LOGITS * case.logits * max(case.dtype.itemsize, 4)
    if plain_bytes < free_memory(probe.device):
        losses["plain"] = plain
    with torch.no_grad():
        forwards = probe.rounds(losses, CASE_SECONDS / 3)
    steps = probe.rounds({name: _step(loss, leaves) for name, loss in losses.items()})
    found = {}
    for name, step in steps.items():
        if isinstance(step, str):
            found[name] = {"error": step}
            continue
        found[name] = {"forward_seconds": forwards[name], "step_seconds": step}
        found[name]["host_seconds"] = probe.host_seconds(_step(losses[name], leaves))
        if name != "plain":
            found[name]["forward_tflops"] = 1e-12 * case.forward_operations / forwards[name]
            found[name]["step_tflops"] = 1e-12 * case.step_operations / step
    return found


def section_compiled(probe):
    """torch.compile of plain PyTorch beside the kernels: of each formulation the first size with static shapes."""
    for case in cases(probe.dry):
        if MATRICES_OF_LOGITS * case.logits * 4 > free_memory(probe.device):
            continue

        def run(case=case):
            ours, plain, leaves = case.make(probe.device)
            compiled = torch.compile(plain, backend="eager" if probe.dry else "inductor")
            functions = {"native": lambda: ours("native"), "torch.compile": compiled}
            times = probe.rounds({name: _step(loss, leaves) for name, loss in functions.items()}, 0.3)
            return {
                name: {"error" if isinstance(time, str) else "step_seconds": time}
                for name, time in times.items()
            }

        probe.attempt("compiled", case.name, run)


def section_compile_triton(probe, part, parts):
    """Compile the Triton kernels of every `parts`-th case, from number `part` on, into Triton's cache."""
    for case in cases(probe.dry)[part::parts]:

        def run(case=case):
            ours, _, leaves = case.make(probe.device)
            with torch.no_grad():
                ours(probe.backends[1])
            gradients_of(ours(probe.backends[1]), leaves)
            probe.synchronize()
            return "compiled"

        probe.attempt("compile_triton", case.name, run)


def section_mixing(probe):
    """Mixing operations: bytes that a perfect kernel reads and writes, over the time."""
    batch, side = (8, 16) if probe.dry else (256, 224)
    device = probe.device
    permutation, lam = torch.randperm(batch, device=device), torch.rand(batch, device=device)
    quarter = side // 4
    boxes = torch.tensor([[quarter, 3 * quarter, quarter, 3 * quarter]], device=device).repeat(batch, 1)

    def measure(name, moved_bytes, call):
        def run():
            times = probe.rounds({backend: lambda b=backend: call(b) for backend in probe.backends}, 0.3)
            for backend, seconds in times.items():
                if isinstance(seconds, str):
                    probe.say("mixing", name=name, backend=backend, error=seconds)
                    continue
                rate = 1e-12 * moved_bytes / seconds
                host = probe.host_seconds(lambda backend=backend: call(backend))
                probe.say(
                    "mixing",
                    name=name,
                    backend=backend,
                    seconds=seconds,
                    terabytes_per_second=rate,
                    host_seconds=host,
                )

        probe.attempt("mixing", name, run)

    for dtype in (SINGLE, HALF):
        x = torch.randn(batch, 3, side, side, device=device).to(dtype)

        def in_place(backend, x=x):
            return ssl_kernels.mixup_(x, lam, permutation, backend=backend)

        def pasted(backend, x=x):
            return ssl_kernels.cutmix_(x, boxes, permutation, backend=backend)

        measure(f"mixup_ {dtype}", 2 * x.nbytes, in_place)
        measure(f"cutmix_ {dtype}", x.nbytes // 2, pasted)
    small = torch.randn(batch, 3, 32, 32, device=device)
    measure(
        "mixup_ of 32 x 32",
        2 * small.nbytes,
        lambda backend: ssl_kernels.mixup_(small, lam, permutation, backend=backend),
    )
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    mean, std = (0.48, 0.46, 0.41), (0.23, 0.22, 0.22)
    measure(
        "mixup_normalize bfloat16",
        4 * images.nbytes,
        lambda backend: ssl_kernels.mixup_normalize(
            images, lam, permutation, mean, std, HALF, backend=backend
        ),
    )
    for n, classes in ((16, 50), (24, 80)) if probe.dry else ((4096, 1000), (1024, 100_000)):
        logits = torch.randn(n, classes, device=device, dtype=HALF, requires_grad=True)
        target, partner = torch.randint(classes, (n,), device=device), torch.randperm(n, device=device)
        shares = torch.rand(n, device=device)

        def cross_entropy(backend, logits=logits, target=target, partner=partner, shares=shares):
            loss = ssl_kernels.mixup_cross_entropy(logits, target, partner, shares, backend=backend)
            return torch.autograd.grad(loss, logits)

        measure(f"mixup_cross_entropy {n} x {classes}", 3 * logits.nbytes, cross_entropy)


def section_edges(probe):
    """What the emulator cannot show: new switches, same bits, odd memory, widths, many rows, threads, graphs."""
    device, dry = probe.device, probe.dry

    def rows(n, d, dtype=HALF, grad=False):
        return torch.randn(n, d, device=device).to(dtype).requires_grad_(grad)

    def attempt(name, function):
        probe.attempt("edges", name, function)

    for backend in probe.backends:

        def with_tf32(backend=backend):
            before = torch.backends.fp32_precision
            torch.backends.fp32_precision = "tf32"
            try:
                x, y = rows(64, 64, SINGLE), rows(64, 64, SINGLE)
                return ssl_kernels.nt_xent_loss(x, y, backend=backend).item()
            finally:
                torch.backends.fp32_precision = before

        attempt(f"{backend}: TF32 by fp32_precision", with_tf32)

        def same_bits(backend=backend):
            n = 30 if dry else 3000
            x, y = rows(n, 128, grad=True), rows(n, 128, grad=True)

            def gradients():
                loss = ssl_kernels.clip_loss(x, y, 14.0, backend=backend)
                return torch.autograd.grad(loss + ssl_kernels.nt_xent_loss(x, y, backend=backend), (x, y))

            first = gradients()
            return all(torch.equal(a, b) for _ in range(20) for a, b in zip(first, gradients(), strict=True))

        attempt(f"{backend}: same bits twenty times", same_bits)

        def odd_memory(backend=backend):
            whole, worst = rows(400, 161), 0.0
            for offset in (0, 1, 3, 8):
                columns = whole[:, offset : offset + 128]
                transposed = whole.T[offset : offset + 128, :128]
                for name, x, y in (
                    ("nt_xent_loss", columns[:200], columns[200:]),
                    ("info_nce_loss", transposed, transposed.flip(0)),
                ):
                    loss = getattr(ssl_kernels, name)
                    expected = loss(x.float(), y.float(), backend="reference")
                    worst = max(worst, (loss(x, y, backend=backend) - expected).abs().item())
            return worst

        attempt(f"{backend}: error with odd offsets and strides", odd_memory)
        for d in (1, 7, 300, 2048, 8192):

            def of_width(backend=backend, d=d):
                x, y = rows(300, d), rows(300, d)
                expected = ssl_kernels.clip_loss(x.float(), y.float(), 5.0, backend="reference")
                return (ssl_kernels.clip_loss(x, y, 5.0, backend=backend) - expected).abs().item()

            attempt(f"{backend}: error at D = {d}", of_width)

        def many_samples(backend=backend):
            batch = 33 if dry else 1_048_577
            x = torch.zeros(batch, 1, 2, 2, dtype=torch.uint8, device=device)
            boxes = torch.zeros(batch, 4, dtype=torch.long, device=device)
            partner = torch.arange(batch, device=device)
            return ssl_kernels.cutmix(x, boxes, partner, backend=backend).sum().item()

        attempt(f"{backend}: cutmix of a million samples", many_samples)

        def many_keys(backend=backend):
            query, count = rows(256, 128), 1024 if dry else 2**23
            keys = F.normalize(rows(count, 128), dim=1)
            return ssl_kernels.moco_loss(query, query.detach(), keys, backend=backend).item()

        attempt(f"{backend}: moco with 8 million keys", many_keys)

    def two_threads():
        """Two widths at once from two host threads, whose launches set limits of the same kernels."""
        failures = []

        def launch(d):
            x, y = rows(64, d), rows(64, d)
            try:
                for _ in range(20 if dry else 4000):
                    ssl_kernels.nt_xent_loss(x, y, backend="native")
            except Exception as error:
                failures.append(_in_short(error))

        threads = [threading.Thread(target=launch, args=(d,)) for d in (128, 256)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        probe.synchronize()
        return failures or "no failure"

    attempt("two threads, two widths", two_threads)
    if dry:
        return
    for backend in probe.backends:

        def cold_graph(backend=backend):
            x = rows(128, 96 if backend == "native" else 80, torch.float16)
            scale, graph = torch.tensor(3.0, device=device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = ssl_kernels.siglip_loss(x, x.flip(0), scale, -scale, backend=backend)
            graph.replay()
            probe.synchronize()
            return loss.item()

        attempt(f"{backend}: a graph of kernels never launched before", cold_graph)


def section_once(probe):
    """One step of the main kernels, for a profiler."""
    device, rows = probe.device, 64 if probe.dry else 8192

    def pair(n, d):
        return [torch.randn(n, d, device=device).to(HALF).requires_grad_() for _ in range(2)]

    x, y = pair(rows, 128)
    for backend in probe.backends:
        gradients_of(ssl_kernels.nt_xent_loss(x, y, backend=backend), (x, y))
    for d in (512, 520):  # on both sides of the switch to products by a library of their own
        x, y = pair(rows, d)
        gradients_of(ssl_kernels.clip_loss(x, y, 9.0, backend="native"), (x, y))
    query, keys = pair(256, 128)
    queue = MoCoQueue(rows * 8, 128, dtype=HALF, device=device)
    queue.push_(keys.detach())
    gradients_of(ssl_kernels.moco_loss(query, keys.detach(), queue, backend="native"), (query,))
    probe.synchronize()
    probe.say("once", name="launched", result="one step of each")


SECTIONS = {
    name.removeprefix("section_"): function
    for name, function in globals().items()
    if name.startswith("section_") and name != "section_compile_triton"
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card.probe", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--compile-triton", metavar="I/N", help="only compile: the I-th of N shares of the cases"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to try this file")
    parser.add_argument(
        "--first", type=int, default=0, metavar="NUMBER", help="of the first attempt that is made"
    )
    parser.add_argument(
        "--progress", type=int, metavar="FD", help="file descriptor that is told of each attempt"
    )
    options = parser.parse_args(argv)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"section must be one of {', '.join(SECTIONS)}, got {unknown[0]}")
    probe = Probe(options.dry, options.first, options.progress)
    torch.manual_seed(0)
    if options.compile_triton:
        part, parts = map(int, options.compile_triton.split("/"))
        section_compile_triton(probe, part, parts)
    for name in options.sections:
        try:
            SECTIONS[name](probe)
        except Exception as error:
            probe.say(name, error=_in_short(error))


if __name__ == "__main__":
    main()
