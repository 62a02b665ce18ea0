"""Losses over processes against one process with as many threads, and against lightly and open_clip.

    python -m benchmarks.distributed [--processes 2] [--batch-size 4096] [--dim 128] [--rounds 20] [--out FILE]

One step is forward and backward of the loss on embeddings that are there already, float32, over gloo on this machine.
A round's time is that of its slowest process; the least and the median of the rounds are shown, the least of the
processor's time, which other work on the machine changes less, and the memory that a step adds to the largest resident
size of a process of its own.
"""

import argparse
import json
import pathlib
import resource
import statistics
import tempfile
import time

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

import ssl_kernels
from benchmarks.machine import describe_machine, machine_line
from ssl_kernels import distributed


def lightly_nt_xent(rank, world):
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.5, gather_distributed=True)


def open_clip_clip(rank, world):
    from open_clip.loss import ClipLoss

    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    normalize = nn.functional.normalize
    return lambda x, y: loss(normalize(x, dim=1), normalize(y, dim=1), torch.tensor(10.0))


def over_processes(call, strategy):
    """`call(x, y, **options)` of a world whose ranks know that they have equal numbers of rows."""

    def make(rank, world):
        options = {"strategy": strategy, "check": False}
        return lambda x, y: call(x, y, **options, rows_per_rank=[len(x)] * world)

    return make


def sup_con(x, y, rows_per_rank, **options):
    labels = torch.arange(len(x)).repeat(2) % 100
    rows = [2 * count for count in rows_per_rank]
    return distributed.sup_con_loss(torch.cat((x, y)), labels, rows_per_rank=rows, **options)


OVER_PROCESSES = {
    f"{name}, {strategy}": over_processes(call, strategy)
    for strategy in ("gather", "ring")
    for name, call in {
        "nt_xent_loss": distributed.nt_xent_loss,
        "clip_loss": lambda x, y, **options: distributed.clip_loss(x, y, 10.0, **options),
        "sup_con_loss": sup_con,
        "siglip_loss": lambda x, y, **options: distributed.siglip_loss(x, y, 10.0, -10.0, **options),
    }.items()
} | {"lightly NTXentLoss": lightly_nt_xent, "open_clip ClipLoss": open_clip_clip}
IN_ONE = {
    "nt_xent_loss": lambda x, y: ssl_kernels.nt_xent_loss(x, y),
    "clip_loss": lambda x, y: ssl_kernels.clip_loss(x, y, 10.0),
    "sup_con_loss": lambda x, y: ssl_kernels.sup_con_loss(
        torch.cat((x, y)), torch.arange(len(x)).repeat(2) % 100
    ),
    "siglip_loss": lambda x, y: ssl_kernels.siglip_loss(x, y, 10.0, -10.0),
}
SLOW = ("lightly", "open_clip")  # rounds of these are few


def views(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=generator).requires_grad_() for _ in range(2)]


def step_seconds(loss, x, y, meet):
    """(of the clock, of the processor)."""
    meet()
    start, cpu = time.perf_counter(), time.process_time()
    loss(x, y).backward()
    seconds = time.perf_counter() - start, time.process_time() - cpu
    x.grad = y.grad = None
    return seconds


def peak_kilobytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(rank, options, folder, name, results):
    torch.set_num_threads(1)
    world = options.processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    x, y = views(options.batch_size // world, options.dim, rank)
    try:
        loss = OVER_PROCESSES[name](rank, world)
    except ImportError as error:
        results.put((rank, None, str(error)))
        return
    warm_up(loss, options.dim)
    before = peak_kilobytes()
    dist.barrier()
    step_seconds(loss, x, y, dist.barrier)
    added = peak_kilobytes() - before
    rounds = 3 if name.startswith(SLOW) else options.rounds
    seconds = torch.tensor([step_seconds(loss, x, y, dist.barrier) for _ in range(rounds)])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    results.put((rank, seconds.tolist(), added))
    results.close()
    results.join_thread()
    dist.barrier()
    dist.destroy_process_group()


def warm_up(loss, dim):
    """A small step: what is loaded and allocated once is no part of the memory of a step."""
    x, y = views(64, dim, 0)
    loss(x, y).backward()


def one_process(options, name, results):
    torch.set_num_threads(options.processes)
    x, y = views(options.batch_size, options.dim, 0)
    loss = IN_ONE[name]
    warm_up(loss, options.dim)
    before = peak_kilobytes()
    step_seconds(loss, x, y, lambda: None)
    added = peak_kilobytes() - before
    results.put((0, [step_seconds(loss, x, y, lambda: None) for _ in range(options.rounds)], added))


def measure(name, options):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        if name in IN_ONE:
            processes = [context.Process(target=one_process, args=(options, name, results))]
        else:
            arguments = (options, folder, name, results)
            processes = [
                context.Process(target=work, args=(rank, *arguments)) for rank in range(options.processes)
            ]
        for process in processes:
            process.start()
        returned = [results.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    _, rounds, added = min(returned)
    if rounds is None:
        return {"missing": added}
    seconds, cpu = zip(*rounds, strict=True)
    return {
        "least_cpu_seconds": min(cpu),
        "least_seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "rounds": len(seconds),
        "added_megabytes": max(of_rank[2] for of_rank in returned) * 1024 / 1e6,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="over gloo (%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=4096, help="pairs of the global batch (%(default)s)"
    )
    parser.add_argument("--dim", type=int, default=128, help="width of the rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of each strategy (%(default)s)")
    parser.add_argument("--only", nargs="+", help="names of the table to measure")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    machine = describe_machine("cpu")
    print(
        f"{options.batch_size} pairs, D = {options.dim}, {options.processes} processes, {machine_line(machine)}"
    )
    print(f"{'':28}{'least ms':>10}{'median ms':>10}{'CPU ms':>10}{'added MB':>10}")
    cases = {}
    for name in [*IN_ONE, *OVER_PROCESSES]:
        if options.only and name not in options.only:
            continue
        case = cases[name] = measure(name, options)
        if "missing" in case:
            print(f"{name:28}{case['missing']}")
            continue
        print(
            f"{name:28}{case['least_seconds'] * 1e3:10.1f}{case['median_seconds'] * 1e3:10.1f}"
            f"{case['least_cpu_seconds'] * 1e3:10.1f}"
            f"{case['added_megabytes']:10.1f}",
            flush=True,
        )
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k not in ("out", "only")}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"machine": machine, "settings": settings, "cases": cases}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
