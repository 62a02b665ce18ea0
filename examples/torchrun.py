"""SimCLR over several processes: each has its own images, and the loss and its gradients are those of the global batch.

torchrun --nproc-per-node 2 examples/torchrun.py --epochs 60
"""

import digits
import torch
from torch.distributed import destroy_process_group, get_rank, get_world_size, init_process_group
from torch.nn.parallel import DistributedDataParallel

from ssl_kernels.distributed import nt_xent_loss


def main(epochs):
    init_process_group("gloo")  # or "nccl", with a GPU for each process
    torch.manual_seed(0)  # the same weights on every rank
    train, test = digits.load()
    encoder = digits.make_encoder()
    projector = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(64, 32))
    model = DistributedDataParallel(torch.nn.Sequential(encoder, projector))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before, losses = digits.few_label_accuracy(encoder, train, test), []

    rank, world = get_rank(), get_world_size()
    own = [part[rank::world] for part in train]
    torch.manual_seed(rank)  # other views on every rank
    for _ in range(epochs):
        for images, _ in digits.batches(*own, size=256 // world):
            both = model(torch.cat([digits.augment(images) for _ in range(2)]))
            loss = nt_xent_loss(*both.chunk(2), temperature=0.2)
            optimizer.zero_grad()
            loss.backward()  # DistributedDataParallel averages: exactly the gradient of the global loss
            optimizer.step()
        mean = loss.detach()
        torch.distributed.all_reduce(mean)  # the mean over the ranks is the global loss
        losses.append(mean.item() / world)
    after = digits.few_label_accuracy(encoder, train, test)
    result = digits.report(losses, before, after) if rank == 0 else None
    destroy_process_group()
    return result


if __name__ == "__main__":
    main(digits.epochs(default=60))
