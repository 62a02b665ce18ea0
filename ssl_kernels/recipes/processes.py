"""SimCLR over several processes of one machine, beside the same run in one: what `pretrain --processes` does."""

import os
import pathlib
import tempfile

import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kernels import distributed
from ssl_kernels.distributed.groups import all_reduce
from ssl_kernels.nn import NTXentLoss
from ssl_kernels.recipes import data, experiment, simclr
from ssl_kernels.recipes.evaluation import evaluate_features, extract_features
from ssl_kernels.recipes.simclr import read_clock


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of the rows of all ranks, on any device."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        name = dist.group.WORLD.group_name
        over = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        rows = all_reduce(x.new_tensor([x.numel() / x.shape[1]]), name)
        mean = all_reduce(x.sum(over), name) / rows
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over), name) / rows
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape))


def with_global_batch_norm(model):
    """`model` itself, whose batch normalisation looks at the rows of all ranks from now on."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GlobalBatchNorm
    return model


def run_in_processes(processes, settings, images, *, dtype=torch.float32):
    """Train over so many processes on this machine and return (model, `History`) of their first.

    Every process makes the same views and takes its part of the rows. All losses are those of the whole batch.

    Args:
        settings: `simclr.Settings` of the method "simclr".
        images: Arguments by name of `data.load_data`.
        dtype: Of weights and views.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (processes, folder, settings, images, dtype), nprocs=processes)
        state = torch.load(pathlib.Path(folder) / "trained.pt", weights_only=True)
    model = experiment.build_model(data.load_data(**images), settings.seed).to(dtype)
    model.load_state_dict(state["model"])
    return model, simclr.History(**state["history"])


def _work(rank, world, folder, settings, images, dtype):
    torch.set_num_threads(1)
    if rank:
        os.environ["TQDM_DISABLE"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    loaded = data.load_data(**images)
    model = with_global_batch_norm(experiment.build_model(loaded, settings.seed)).to(dtype)

    def step(model, loss, optimizer, view0, view1):
        rows = len(view0)
        own = slice(rows * rank // world, rows * (rank + 1) // world)
        z0, z1 = parallel(torch.cat([view0[own], view1[own]]).to(dtype)).chunk(2)
        start = read_clock(z0.device)
        value = loss(z0, z1)
        seconds = read_clock(z0.device) - start
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        value = value.detach()
        dist.all_reduce(value)
        return value.item() / world, seconds

    training = simclr.Training(model, distributed.NTXentLoss(settings.temperature), settings, step=step)
    parallel = nn.parallel.DistributedDataParallel(training.model)
    simclr.train([training], loaded.views, title=f"{world} processes")
    if rank == 0:
        history = {name: list(values) for name, values in vars(training.history).items()}
        torch.save(
            {"model": training.model.state_dict(), "history": history}, pathlib.Path(folder) / "trained.pt"
        )
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, with which the process can abort as it ends


def compare_with_one(processes, settings, images):
    """Text that holds a run over `processes` against the same run in one process."""
    loaded = data.load_data(**images)
    one = experiment.prepare_trainings(loaded, {"one": NTXentLoss(settings.temperature)}, settings)["one"]
    simclr.train([one], loaded.views, title="1 process")
    model, history = run_in_processes(processes, settings, images)
    lines = [f"{'':14}{'first loss':>12}{'last loss':>12}{'k-NN':>8}{'linear':>8}{'ms per step':>13}"]
    runs = {"1 process": (one.model, one.history), f"{processes} processes": (model, history)}
    for name, (trained, of_run) in runs.items():
        features = [extract_features(trained.encoder, batches) for batches in (loaded.train, loaded.test)]
        accuracy = evaluate_features(*features)
        seconds = sorted(of_run.step_seconds)[len(of_run.step_seconds) // 2]
        lines.append(
            f"{name:14}{of_run.losses[0]:12.6f}{of_run.losses[-1]:12.6f}{accuracy.knn:8.1%}{accuracy.linear:8.1%}"
            f"{seconds * 1e3:13.1f}"
        )
    pairs = list(zip(one.history.losses, history.losses, strict=True))
    for count in (10, len(pairs)):
        largest = max(abs(a - b) for a, b in pairs[:count])
        lines.append(
            f"largest difference of the losses in the first {min(count, len(pairs))} steps: {largest:.1e}"
        )
    return "\n".join(lines)
