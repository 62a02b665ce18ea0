#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0, gloo on the CPU: dist.reduce_scatter_tensor of a tensor of N bytes over W ranks needs each rank to
# send (W - 1) / W of them, half of an all-reduce; that is why FSDP and the gradient of a gather use it. Over gloo it sends as
# much as dist.all_reduce, 2 (W - 1) / W, while dist.all_to_all_single, followed by a sum of the W received parts, sends half.
#
# Seen, in tensors of N bytes sent by all ranks together, for 2, 4 and 8 ranks: reduce_scatter_tensor 2, 6, 14; all_reduce
# 2, 6, 14; all_to_all_single 1, 3, 7; all_gather_into_tensor 1, 3, 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

N = 1 << 20


def sent():
    """Bytes that the loopback device has sent so far."""
    with open("/proc/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith("lo:"))


def run(rank, ranks, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    whole, part = torch.ones(N), torch.ones(N // ranks)
    collectives = {
        "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(part, whole), 2),
        "all_reduce": (lambda: dist.all_reduce(whole), 2),
        "all_to_all_single": (lambda: dist.all_to_all_single(torch.empty(N), whole), 1),
        "all_gather_into_tensor": (lambda: dist.all_gather_into_tensor(whole, part), 1),
    }
    for name, (collective, share) in collectives.items():
        collective()
        dist.barrier()
        time.sleep(0.3)
        before = sent()
        dist.barrier()
        collective()
        dist.barrier()
        time.sleep(0.3)
        found = (sent() - before) / (4 * N)
        if rank == 0:
            print(f"{torch.__version__}, {ranks} ranks, {name}: {found:.1f} tensors", flush=True)
            assert abs(found - share * (ranks - 1)) < 0.3, f"{name} sends {found:.2f} tensors now"
        dist.barrier()


if __name__ == "__main__":
    for ranks in (2, 4, 8):
        processes.spawn(run, (ranks, f"{sys.argv[1]}-{ranks}"), nprocs=ranks)
PY
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6
  "$folder/$version/bin/python" -W ignore "$folder/try.py" "$folder/rendezvous-$version"
done
