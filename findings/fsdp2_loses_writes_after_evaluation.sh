#!/usr/bin/env bash
# torch 2.14.1, fully_shard (FSDP2), two gloo processes on the CPU: after a forward without gradients the root module's
# parameters stay gathered, and what is then written into them in place (an averaged model, a re-initialisation) is lost:
# state_dict() and the next forward have the old numbers, without a warning. Written before any forward, or after
# module.reshard(), it stays. Expected the write to last, or the parameters to be shards again after the forward, as
# they are after a backward.
#
# Seen, after filling with 7: before a forward state 7, result 784; after one under no_grad state 1, result 16; after
# reshard() 7 and 784 again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$folder/try.py" <<'PY'
import os

import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard


def filled(module, value):
    """The first number of the state and of a result after every parameter was filled."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
        first = next(iter(module.state_dict().values())).full_tensor()[0, 0].item()
        return first, module(torch.ones(1, 4))[0, 0].item()


def work(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(2)]
    module = fully_shard(torch.nn.Sequential(*layers), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    before = filled(module, 7.0)
    module.reshard()
    filled(module, 1.0)  # ends with a forward without gradients
    after = filled(module, 7.0)
    module.reshard()
    resharded = filled(module, 7.0)
    if rank == 0:
        print("before a forward", before, "after one", after, "after reshard()", resharded)
    assert before == resharded == (7, 784)
    assert after == (1, 16), "torch behaves differently now"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, nprocs=2)
PY
"$folder/env/bin/python" "$folder/try.py"
