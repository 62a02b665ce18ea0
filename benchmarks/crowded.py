"""NT-Xent while other processes use the cores: steps of plain PyTorch and of ssl_kernels in turn, forward and backward.

    python benchmarks/crowded.py [--busy 1] [--threads 2] [--batch-size 256] [--steps 60]

Means over the steps, first as OpenMP waits by default and then with OMP_WAIT_POLICY=passive, each in a process of
its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys

WORKER = r"""
import json, sys, time
import torch
import ssl_kernels
from ssl_kernels.recipes.baseline import plain_nt_xent_loss
threads, batch_size, steps = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
views = [torch.randn(batch_size, 128, requires_grad=True) for _ in range(2)]
losses = {"plain": plain_nt_xent_loss, "ssl_kernels": ssl_kernels.nt_xent_loss}
seconds = dict.fromkeys(losses, 0.0)
for step in range(-3, steps):
    for name, loss in losses.items():
        begin = time.perf_counter()
        torch.autograd.grad(loss(*views, 0.5), views)
        if step >= 0:
            seconds[name] += (time.perf_counter() - begin) / steps
print(json.dumps(seconds))
"""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextlib.contextmanager
def busy_processes(count):
    """That many processes which use a core each, until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def mean_seconds(options, environment):
    """{"plain", "ssl_kernels"} of one process with `environment` added."""
    sizes = [str(size) for size in (options.threads, options.batch_size, options.steps)]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *sizes],
        env={**os.environ, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=1, help="other processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(%(default)s)")
    options = parser.parse_args(argv)
    print(f"{'mean milliseconds per step':<28} {'plain':>9} {'ssl_kernels':>12} {'ratio':>7}")
    with busy_processes(options.busy):
        for name, environment in (
            ("as it is", {}),
            ("OMP_WAIT_POLICY=passive", {"OMP_WAIT_POLICY": "passive"}),
        ):
            plain, ours = (1e3 * value for value in mean_seconds(options, environment).values())
            print(f"{name:<28} {plain:>9.2f} {ours:>12.2f} {plain / ours:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
