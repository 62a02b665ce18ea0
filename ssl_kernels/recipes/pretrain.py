"""Pretrain an encoder with SimCLR or MoCo v2 and the loss of this library, then judge it on held-out images.

Prints a table and writes loss.png, embedding.png, results.json and the checkpoints to the output folder.
With --compare the same run is done with the loss in plain PyTorch too, from the same weights and on the same
views, step by step in turn. Ctrl-C ends the step and writes checkpoints; --resume goes on from them, bit for bit.
"""

import argparse
import functools
import importlib.util
import math
import pathlib
import time

import torch

import ssl_kernels
from ssl_kernels.cli import INTERRUPTED, usable_device

DEMO_PACKAGES = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "torchvision": "torchvision",
}

DEFAULTS = {
    "digits": {"epochs": 150, "batch_size": 1024, "temperature": 0.5, "learning_rate": 6e-3},
    "cifar10": {"epochs": 200, "batch_size": 512, "temperature": 0.5, "learning_rate": 1e-3},
    "folder": {"epochs": 100, "batch_size": 256, "temperature": 0.1, "learning_rate": 1e-3},
}
MOCO_DEFAULTS = {
    "digits": {"epochs": 150, "batch_size": 256, "temperature": 0.2, "learning_rate": 3e-3},
    "cifar10": {"epochs": 200, "batch_size": 256, "temperature": 0.2, "learning_rate": 1e-3},
    "folder": {"epochs": 100, "batch_size": 256, "temperature": 0.2, "learning_rate": 1e-3},
}
QUEUE = {
    "digits": {"queue_size": 1024, "momentum": 0.99},
    "cifar10": {"queue_size": 16384, "momentum": 0.99},
    "folder": {"queue_size": 65536, "momentum": 0.999},
}
SHORT = {
    "digits": {"epochs": 15, "batch_size": 256, "learning_rate": 3e-3},
    "cifar10": {"epochs": 1},
    "folder": {"epochs": 1},
}


def add_arguments(parser):
    for_digits = DEFAULTS["digits"]
    parser.add_argument(
        "--data",
        choices=DEFAULTS,
        default="digits",
        help="digits: 1797 handwritten digits that scikit-learn carries (default), with a small convolutional"
        " network; cifar10, folder: CIFAR-10 or one folder of images a class under --root, with a ResNet-18",
    )
    parser.add_argument(
        "--method",
        choices=("simclr", "moco"),
        default="simclr",
        help="simclr: each view against all others of the batch (default); moco: MoCo v2, against a queue of keys",
    )
    parser.add_argument("--root", metavar="DIR", help="where the images of cifar10 or folder are")
    parser.add_argument(
        "--epochs", type=_positive_int, metavar="N", help=f"default {for_digits['epochs']} for digits"
    )
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help=f"images a step, each seen in two views; default {for_digits['batch_size']} for digits",
    )
    parser.add_argument(
        "--temperature",
        type=_positive_float,
        metavar="T",
        help=f"default {for_digits['temperature']} for digits",
    )
    parser.add_argument(
        "--learning-rate", type=_positive_float, metavar="R", help="of AdamW, at the top of a cosine schedule"
    )
    parser.add_argument(
        "--queue-size",
        type=_positive_int,
        metavar="K",
        help=f"keys that moco's queue holds; default {QUEUE['digits']['queue_size']} for digits",
    )
    parser.add_argument(
        "--momentum",
        type=_share,
        metavar="M",
        help=f"of moco's key encoder, from 0 to 1; default {QUEUE['digits']['momentum']} for digits",
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of weights and views; default 0")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="native, triton, chunked or reference; default: the fastest that runs",
    )
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="run with the plain PyTorch loss too; default for digits",
    )
    parser.add_argument("--short", action="store_true", help="a few epochs only, to see that it works")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument(
        "--image-size",
        type=_positive_int,
        metavar="N",
        help="side of the crops of folder images; default 224",
    )
    parser.add_argument(
        "--workers",
        type=_count,
        default=2,
        metavar="N",
        help="processes that load cifar10 or folder images; default 2",
    )
    parser.add_argument(
        "--processes",
        type=_positive_int,
        default=1,
        metavar="N",
        help="train over so many processes of this machine, and hold the losses against those of one; default 1",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("out/pretrain"),
        metavar="DIR",
        help="default out/pretrain",
    )


def run(args, parser):
    missing = missing_packages()
    if missing:
        parser.error(f"{', '.join(missing)} must be installed for it: pip install {' '.join(missing)}")
    try:
        from ssl_kernels.recipes import experiment, report, simclr
    except (ImportError, OSError, RuntimeError) as error:
        parser.error(f"{', '.join(DEMO_PACKAGES.values())} must load for it: {error}")

    start = time.perf_counter()
    if args.processes > 1:
        return run_processes(args, parser)
    try:
        settings, device, images, trainings = set_up(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    machine = report.describe_machine(device)
    print(f"{machine}\n{settings}", flush=True)
    try:
        runs, contention = experiment.run_experiment(images, trainings, settings, device=device)
        labels = torch.cat([batch_labels for _, batch_labels in images.test])
        text = report.write_report(runs, labels, settings, machine, contention, args.out)
    except (OSError, simclr.Diverged) as error:
        parser.error(str(error).strip().splitlines()[-1])  # a worker process puts its traceback before
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted; --resume goes on from what is in {args.out}\n")
    print(text)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def run_processes(args, parser):
    """Train in one process and in several, and print both."""
    from ssl_kernels.recipes import processes, report, simclr

    start = time.perf_counter()
    try:
        for option, given in (
            ("--method", args.method != "simclr"),
            ("--resume", args.resume),
            ("--device", args.device not in (None, "cpu")),
            ("--backend", args.backend is not None),
        ):
            if given:
                raise ValueError(f"{option} must be left out with --processes")
        settings = choose_settings(args)
        if settings.batch_size < 2 * args.processes:
            raise ValueError(f"--batch-size must be at least 2 a process, got {settings.batch_size}")
        images = {
            "name": args.data,
            "batch_size": settings.batch_size,
            "seed": args.seed,
            "root": args.root,
            "image_size": args.image_size,
            "workers": args.workers,
        }
        print(f"{report.describe_machine(torch.device('cpu'))}\n{settings}", flush=True)
        print(processes.compare_with_one(args.processes, settings, images))
    except (ValueError, OSError, simclr.Diverged) as error:
        parser.error(str(error).strip().splitlines()[-1])
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def choose_settings(args):
    """The `simclr.Settings` of the command line; raises ValueError for options that do not go together."""
    from ssl_kernels.recipes import simclr

    with_queue = args.method == "moco"
    if not with_queue and (args.queue_size is not None or args.momentum is not None):
        raise ValueError("--queue-size and --momentum must come with --method moco")
    for option, value, data_sets in (
        ("--root", args.root, ("cifar10", "folder")),
        ("--image-size", args.image_size, ("folder",)),
    ):
        if value is not None and args.data not in data_sets:
            raise ValueError(f"{option} must come with --data {' or '.join(data_sets)}, got {args.data}")
    choices = MOCO_DEFAULTS[args.data] | QUEUE[args.data] if with_queue else DEFAULTS[args.data]
    choices = choices | (SHORT[args.data] if args.short else {})
    choices |= {name: getattr(args, name) for name in choices if getattr(args, name) is not None}
    return simclr.Settings(args.data, **choices, seed=args.seed, method=args.method)


def set_up(args):
    """(settings, device, images, trainings); raises ValueError or OSError for what cannot be done."""
    from ssl_kernels.recipes import data, experiment, report
    from ssl_kernels.recipes.files import check_folder

    settings = choose_settings(args)
    device = choose_device(args.device)
    compare = args.data == "digits" if args.compare is None else args.compare
    losses = choose_losses(settings, args.backend, compare, device)
    images = data.load_data(
        args.data,
        settings.batch_size,
        args.seed,
        root=args.root,
        image_size=args.image_size,
        workers=args.workers,
    )
    trainings = experiment.prepare_trainings(
        images, losses, settings, device=device, out=args.out, resume=args.resume
    )
    checkpoints = [training.checkpoint for training in trainings.values()]
    sizes = [training.bytes_of_checkpoint for training in trainings.values()]
    there = sum(path.stat().st_size for path in checkpoints if path.is_file())
    # One more, since each is written aside.
    check_folder(
        args.out, [*report.FILES, *(path.name for path in checkpoints)], sum(sizes) + max(sizes) - there
    )
    return settings, device, images, trainings


def missing_packages():
    """The packages of the extra `demo` that are not installed."""
    return [package for module, package in DEMO_PACKAGES.items() if importlib.util.find_spec(module) is None]


def choose_device(name):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)


def choose_losses(settings, backend, compare, device):
    """dict from a run's name to its loss. A backend that cannot run raises here, before training."""
    from ssl_kernels.recipes.baseline import plain_moco_loss, plain_nt_xent_loss

    temperature = settings.temperature
    sample = torch.ones(2, 8, device=device)
    ssl_kernels.nt_xent_loss(sample, sample, temperature, backend=backend)
    if backend is None:
        usable = ssl_kernels.backends_for(ssl_kernels.nt_xent_loss, sample, sample)
        backend = next(name for name, reason in usable.items() if reason is None)
    if settings.method == "moco":
        loss, plain = ssl_kernels.nn.MoCoLoss(temperature, symmetric=True, backend=backend), plain_moco_loss
    else:
        loss, plain = ssl_kernels.nn.NTXentLoss(temperature, backend=backend), plain_nt_xent_loss
    losses = {f"ssl_kernels ({backend})": loss}
    if compare:
        losses = {"plain PyTorch": functools.partial(plain, temperature=temperature)} | losses
    return losses


def _positive_int(text):
    return _number(text, int, lambda value: value >= 1, "a whole number from 1")


def _batch_size(text):
    return _number(text, int, lambda value: value >= 2, "a whole number from 2")


def _count(text):
    return _number(text, int, lambda value: value >= 0, "a whole number from 0")


def _seed(text):
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")


def _positive_float(text):
    return _number(text, float, lambda value: value > 0 and math.isfinite(value), "a finite number over 0")


def _share(text):
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text, kind, allowed, rule):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return value
