"""Several processes on this machine over gloo, for tests."""

import datetime
import functools
import os
import tempfile
import traceback

import torch
from torch import distributed as dist
from torch import multiprocessing

TIMEOUT = datetime.timedelta(seconds=60)


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")  # imports torch once for all tests
    context.set_forkserver_preload(["tests.distributed.preload"])
    return context


def _main(rank, world, path, function, arguments, results, group_timeout, together):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=group_timeout
        )
        results.put((rank, function(rank, world, *arguments), None))
        if together:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # a thread of torch's may still run, with which the process can abort as it ends


def run(world, function, *arguments, timeout=300, missing=(), group_timeout=TIMEOUT):
    """function(rank, world, *arguments) in `world` processes; what they return, by rank. An error is raised.

    missing: Ranks that leave without a word.
    """
    context = _context()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_main,
                args=(
                    rank,
                    world,
                    f"{folder}/meeting",
                    function,
                    arguments,
                    results,
                    group_timeout,
                    not missing,
                ),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        returned = {}
        try:
            for _ in range(world - len(missing)):
                rank, value, error = results.get(timeout=timeout)
                if error:
                    raise AssertionError(f"rank {rank} of {world}:\n{error}")
                returned[rank] = value
        finally:
            for process in processes:
                process.join(0.1 if len(returned) < world else 10)
                if process.is_alive():
                    process.kill()
    return [returned.get(rank) for rank in range(world)]
