"""`grad_cache` on a small ResNet: time against embedding twice, memory against a plain step on a few images.

    python -m benchmarks.grad_cache [--batch-size 8192] [--mini-batch-size 128] [--plain-batch-size 256] [--rounds 3]

Embedding twice is what no such step can do without: all mini-batches once without a graph, and once with a graph and a
backward of given gradients. A plain step is one on the first images alone. Each runs in a process of its own;
the least seconds of the rounds are shown, of the clock and of the processor, and the memory that the first step adds to
the largest resident size of the process.
"""

import argparse
import resource
import time

import torch
from torch import multiprocessing
from torchvision.models.resnet import BasicBlock, ResNet

import ssl_kernels
from benchmarks.machine import describe_machine, machine_line

WIDTH, SIDE = 128, 32  # of the embeddings, of the images


def loss(embeddings):
    return ssl_kernels.nt_xent_loss(*embeddings.chunk(2))


def cached(model, images, size):
    ssl_kernels.grad_cache(loss, model, images, size)


def twice(model, images, size):
    with torch.no_grad():
        for part in images.split(size):
            model(part)
    for part in images.split(size):
        embedded = model(part)
        embedded.backward(torch.ones_like(embedded))


def plain(model, images, size):
    loss(model(images[:size])).backward()


STEPS = {"grad_cache": cached, "embedding twice": twice, "a plain step": plain}


def work(name, options, results):
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=WIDTH)
    images = torch.randn(options.batch_size, 3, SIDE, SIDE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    STEPS[name](model, images[:4], 2)  # what is loaded once is no part of a step
    size = options.plain_batch_size if STEPS[name] is plain else options.mini_batch_size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, added = [], None
    for _ in range(options.rounds):
        clock, processor = time.perf_counter(), time.process_time()
        STEPS[name](model, images, size)
        seconds.append((time.perf_counter() - clock, time.process_time() - processor))
        if added is None:
            added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.put((*map(min, zip(*seconds, strict=True)), added * 1024 / 1e6))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8192, help="images (%(default)s)")
    parser.add_argument("--mini-batch-size", type=int, default=128, help="images at once (%(default)s)")
    parser.add_argument("--plain-batch-size", type=int, default=256, help="images of a plain step")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each (%(default)s)")
    options = parser.parse_args(arguments)
    print(
        f"{options.batch_size} images of {SIDE} x {SIDE}, mini-batches of {options.mini_batch_size},"
        f" a plain step on {options.plain_batch_size},"
        f" {machine_line(describe_machine('cpu'))}"
    )
    print(f"{'':20}{'clock, s':>10}{'CPU, s':>10}{'added MB':>10}")
    context = multiprocessing.get_context("spawn")
    for name in STEPS:
        results = context.Queue()
        process = context.Process(target=work, args=(name, options, results))
        process.start()
        clock, processor, added = results.get()
        process.join()
        print(f"{name:20}{clock:10.2f}{processor:10.2f}{added:10.1f}", flush=True)


if __name__ == "__main__":
    main()
