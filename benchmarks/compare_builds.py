"""Steps (forward and backward) of this checkout, another one and plain PyTorch, interleaved, float32 and bfloat16.

    python benchmarks/compare_builds.py OTHER_CHECKOUT [--threads 1] [--rounds 6] [case ...]

Each checkout runs in a process of its own; a round times one after the other, and the fastest step of all rounds
counts. A case is named by any part of its name, e.g. "clip" or "bf16". Where the processor has AMX, "clip4096x512" in
both dtypes shows what it gives.
"""

import argparse
import json
import os
import subprocess
import sys

WORKER = r"""
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
os.chdir(sys.argv[1])
import torch
import torch.nn.functional as F
torch.set_num_threads(int(sys.argv[2]))
import ssl_kernels

def nt_xent(a, b):
    z = F.normalize(torch.cat([a, b]))
    s = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(len(z)).roll(len(a)))

def clip(a, b, scale):
    s = F.normalize(a) @ F.normalize(b).T * scale.to(a.dtype)
    own = torch.arange(len(s))
    return (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2

def moco(q, k, queue):
    q, k = F.normalize(q), F.normalize(k)
    s = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.07
    return F.cross_entropy(s, torch.zeros(len(q), dtype=torch.long))

def rows(n, d, dtype, grad=True):
    return torch.randn(n, d).to(dtype).requires_grad_(grad)

def operands(name, dtype):
    torch.manual_seed(0)
    if name.startswith("nt_xent"):
        return [rows(int(name[7:]), 128, dtype) for _ in range(2)]
    if name.startswith("clip"):
        n, d = map(int, name[4:].split("x"))
        return [rows(n, d, dtype), rows(n, d, dtype), torch.tensor(20.0, requires_grad=True)]
    queue = F.normalize(torch.randn(65536, 128)).to(dtype)
    return [rows(256, 128, dtype), rows(256, 128, dtype, False), queue]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
cached = {}
for line in sys.stdin:
    name, dtype, who = line.split()
    if cached.get("of") != (name, dtype):
        cached = {"of": (name, dtype), "operands": operands(name, DTYPES[dtype])}
    values = cached["operands"]
    base = name.rstrip("0123456789x")
    function = globals()[base] if who == "plain" else getattr(ssl_kernels, base + "_loss")
    leaves = [value for value in values if value.requires_grad]
    best = float("inf")
    for step in range(4):
        begin = time.perf_counter()
        torch.autograd.grad(function(*values), leaves)
        if step:
            best = min(best, time.perf_counter() - begin)
    print(json.dumps(best), flush=True)
"""
CASES = ("nt_xent64", "nt_xent256", "nt_xent1024", "nt_xent4096", "clip4096x512", "clip2048x1024", "moco")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", help="folder of the other checkout, with its extension built")
    parser.add_argument(
        "cases", nargs="*", help="words of a case or its dtype, such as clip or bfloat16; all without any"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="per case (%(default)s)")
    arguments = parser.parse_intermixed_args()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def start(checkout):
        command = [sys.executable, "-c", WORKER, os.path.abspath(checkout), str(arguments.threads)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    ours, other = start(here), start(arguments.other)
    print(f"{'milliseconds per step':<22} {'this':>9} {'other':>9} {'plain':>9}  other/this plain/this")
    for case in CASES:
        for dtype in ("f32", "bf16"):
            if arguments.cases and not any(part in f"{case} {dtype}" for part in arguments.cases):
                continue
            best = dict.fromkeys(("this", "other", "plain"), float("inf"))
            for _ in range(arguments.rounds):
                for who, process in (("this", ours), ("other", other), ("plain", ours)):
                    process.stdin.write(f"{case} {dtype} {'plain' if who == 'plain' else 'loss'}\n")
                    process.stdin.flush()
                    best[who] = min(best[who], json.loads(process.stdout.readline()))
            this, that, plain = (1e3 * best[who] for who in ("this", "other", "plain"))
            ratios = f"{that / this:10.2f} {plain / this:10.2f}"
            print(f"{case + ' ' + dtype:<22} {this:9.2f} {that:9.2f} {plain:9.2f}  {ratios}", flush=True)
    for process in (ours, other):
        process.stdin.close()


if __name__ == "__main__":
    main()
