"""Losses of retrieval against sentence-transformers' own and plain PyTorch: forward and backward, interleaved.

    python -m benchmarks.retrieval [--threads 2] [--rounds 15]

Prints the least time of each over all rounds, in which the implementations take turns, and the memory of a step at
its worst moment. sentence-transformers is left out where it is not installed.
"""

import argparse
import importlib.util
import time

import torch
import torch.nn.functional as F

import ssl_kernels
from benchmarks import machine
from ssl_kernels.recipes.memory import peak_memory

ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


def rows(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).requires_grad_()


def ranking(pairs, width, directions, has_hard_negatives):
    """{name: a step} of sentence-transformers' loss on these embeddings, and of ours."""
    embeddings = [rows(pairs, width, seed) for seed in range(3 if has_hard_negatives else 2)]
    steps = {}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        theirs = MultipleNegativesRankingLoss(torch.nn.Module(), directions=directions)
        steps["sentence-transformers"] = lambda: theirs.compute_loss_from_embeddings(embeddings, None)
    steps["ssl_kernels"] = lambda: ssl_kernels.multiple_negatives_ranking_loss(
        *embeddings, directions=directions
    )
    return steps, embeddings


def sampled(queries, candidates, width):
    query, item, more = rows(queries, width, 0), rows(queries, width, 1), rows(candidates - queries, width, 2)
    log_q = torch.rand(candidates, generator=torch.Generator().manual_seed(3)).log()

    def plain():
        columns = F.normalize(torch.cat((item, more)), dim=1)
        logits = F.normalize(query, dim=1) @ columns.T / 0.05 - log_q
        return F.cross_entropy(logits, torch.arange(queries))

    def ours():
        return ssl_kernels.sampled_softmax_loss(query, item, more, temperature=0.05, log_q=log_q)

    return {"plain PyTorch": plain, "ssl_kernels": ours}, [query, item, more]


def measure(steps, leaves, rounds):
    """{name: (milliseconds, MB)}."""

    def run(step):
        return torch.autograd.grad(step(), leaves)

    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            run(step)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: (min(times[name]), peak_memory(lambda step=step: run(step)) / 1e6)
        for name, step in steps.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each loss (%(default)s)")
    parser.add_argument("--pairs", type=int, default=2048, help="queries with a document each (%(default)s)")
    parser.add_argument("--width", type=int, default=384, help="of the embeddings (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs, width = arguments.pairs, arguments.width
    print(f"{machine.cpu_name()}, {arguments.threads} threads")
    workloads = {
        f"four directions, {pairs} pairs with a hard negative": lambda: ranking(pairs, width, ALL, True),
        f"four directions, {pairs} pairs": lambda: ranking(pairs, width, ALL, False),
        f"one direction, {pairs} pairs with a hard negative": lambda: ranking(pairs, width, ALL[:1], True),
        f"one direction, {pairs} pairs": lambda: ranking(pairs, width, ALL[:1], False),
        f"sampled softmax, {2 * pairs} x {8 * pairs} with logQ": lambda: sampled(2 * pairs, 8 * pairs, width),
    }
    for title, make in workloads.items():
        steps, leaves = make()
        found = measure(steps, leaves, arguments.rounds)
        print(title)
        for name, (milliseconds, megabytes) in found.items():
            faster, smaller = milliseconds / found["ssl_kernels"][0], megabytes / found["ssl_kernels"][1]
            print(f"  {name:<22}{milliseconds:9.1f} ms ({faster:4.2f}) {megabytes:9.1f} MB ({smaller:5.2f})")


if __name__ == "__main__":
    main()
