#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0, gloo on the CPU: collectives write into a tensor, and autograd refuses a backward pass through a
# tensor that was written to after it had been saved ("modified by an inplace operation"). A good guess is that all of them
# take part in this check, or none. all_gather, all_gather_into_tensor and reduce_scatter_tensor do. all_reduce, reduce,
# broadcast, scatter, all_to_all_single and recv do not: they leave the tensor's version as it was, and the backward pass uses
# the new values without a word. A centre, a running mean or a mask that is reduced over the ranks between the forward and the
# backward pass gives a wrong gradient on every rank, and the same line with all_gather raises.
#
# Seen: the gradient of (weight * saved).sum() is 1, the saved tensor, before a collective makes 2 of it. With the first three
# the backward pass raises; with the other six the gradient is 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

TWO = torch.full((2,), 2.0)


def receive(saved, rank):
    # Rank 0 receives, rank 1 sends; then the other way, so that both have written.
    for receiver in (0, 1):
        dist.recv(saved, 1 - rank) if rank == receiver else dist.send(TWO, 1 - rank)


COLLECTIVES = {
    "all_gather": lambda saved, rank: dist.all_gather([torch.zeros(2) if r != rank else saved for r in (0, 1)], TWO),
    "all_gather_into_tensor": lambda saved, rank: dist.all_gather_into_tensor(saved, TWO[:1]),
    "reduce_scatter_tensor": lambda saved, rank: dist.reduce_scatter_tensor(saved, torch.ones(4)),
    "all_reduce": lambda saved, rank: dist.all_reduce(saved),
    "reduce": lambda saved, rank: [dist.reduce(saved, 0) if rank == 0 else dist.reduce(TWO.clone() / 2, 0)],
    "broadcast": lambda saved, rank: [dist.broadcast(saved if rank else TWO.clone(), 0)],
    "scatter": lambda saved, rank: dist.scatter(saved, [TWO, TWO] if rank == 0 else None, 0),
    "all_to_all_single": lambda saved, rank: dist.all_to_all_single(saved, TWO),
    "recv": receive,
}
WRITES_ON = {"reduce": 0, "broadcast": 1}


def run(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for name, collective in COLLECTIVES.items():
        weight, saved = torch.ones(2, requires_grad=True), torch.ones(2)
        total = (weight * saved).sum()
        collective(saved, rank)
        if WRITES_ON.get(name, rank) != rank:
            continue
        assert saved.tolist() == [2, 2], (name, saved)
        try:
            total.backward()
            found = f"gradient {weight.grad[0].item():g}"
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), error
            found = "raises"
        if rank == WRITES_ON.get(name, 0):
            print(f"{torch.__version__} {name}: {found}", flush=True)
        sees = name in ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
        assert found == ("raises" if sees else "gradient 2"), f"{name} behaves differently now: {found}"


if __name__ == "__main__":
    processes.spawn(run, (sys.argv[1],), nprocs=2)
PY
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6
  "$folder/$version/bin/python" -W ignore "$folder/try.py" "$folder/rendezvous-$version"
done
