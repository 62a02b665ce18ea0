"""A method over several processes of one machine, beside the same run in one: what `pretrain --processes` does."""

import os
import pathlib
import tempfile

import torch
from torch import distributed as dist
from torch import multiprocessing

from ssl_kernels.recipes import data, engine, experiment
from ssl_kernels.recipes.checkpoints import History
from ssl_kernels.recipes.evaluation import evaluate_features, extract_features
from ssl_kernels.recipes.ranks import Ranks, over_ranks, with_global_batch_norm


def run_in_processes(processes, settings, images, *, dtype=torch.float32):
    """Train over so many processes on this machine and return (method, `History`) of their first.

    Every process makes the same views and takes its part of the rows. All losses are those of the whole batch.

    Args:
        settings: `engine.Settings`.
        images: Arguments by name of `data.load_data`.
        dtype: Of weights and views.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (processes, folder, settings, images, dtype), nprocs=processes)
        state = torch.load(pathlib.Path(folder) / "trained.pt", weights_only=True)
    method = experiment.build_method(data.load_data(**images), settings).to(dtype)
    method.load_state_dict(state["model"])
    return method, History(**state["history"])


def _work(rank, world, folder, settings, images, dtype):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    loaded = data.load_data(**images)
    method = with_global_batch_norm(experiment.build_method(loaded, settings)).to(dtype)
    training = engine.Training(
        method,
        settings,
        settings.epochs * len(loaded.views),
        loss=over_ranks(method.criterion),
        ranks=Ranks(rank, world),
    )
    engine.train([training], loaded.views, title=f"{world} processes")
    if rank == 0:
        history = {name: list(values) for name, values in vars(training.history).items()}
        state = {"model": training.method.state_dict(), "history": history}
        torch.save(state, pathlib.Path(folder) / "trained.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, with which the process can abort as it ends


def compare_with_one(processes, settings, images):
    """Text that holds a run over `processes` against the same run in one process."""
    loaded = data.load_data(**images)
    one = experiment.prepare_trainings(loaded, {"one": None}, settings)["one"]
    engine.train([one], loaded.views, title="1 process")
    method, history = run_in_processes(processes, settings, images)
    lines = [f"{'':14}{'first loss':>12}{'last loss':>12}{'k-NN':>8}{'linear':>8}{'ms per step':>13}"]
    runs = {"1 process": (one.method, one.history), f"{processes} processes": (method, history)}
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
