"""Pretrain an encoder with one of the methods, then judge it on held-out images.

Prints a table and writes loss.png, embedding.png, results.json, the log (.csv) and the checkpoint (.pt) to the output
folder. With --compare the same run is done with the loss in plain PyTorch too, from the same weights and on the same
views, step by step in turn. Ctrl-C ends the step and writes checkpoints; --resume goes on from them, bit for bit.
torchrun starts it over several processes.

methods: METHODS
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import time

import torch

import ssl_kernels
from ssl_kernels.cli import INTERRUPTED, last_line, usable_device
from ssl_kernels.recipes import arguments, presets
from ssl_kernels.recipes.methods import METHODS

__doc__ = __doc__.replace("METHODS", ", ".join(METHODS))

DEMO_PACKAGES = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "torchvision": "torchvision",
}
COMPARED = ("simclr", "moco")  # methods whose loss the recipes have in plain PyTorch


def add_arguments(parser):
    for_digits = presets.choose("simclr", "digits")
    arguments.add_data(parser)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="simclr",
        metavar="NAME",
        help="one of those above; default simclr",
    )
    parser.add_argument(
        "--epochs",
        type=arguments.positive_int,
        metavar="N",
        help=f"default {for_digits['epochs']} for simclr on the digits",
    )
    parser.add_argument(
        "--batch-size",
        type=arguments.batch_size,
        metavar="N",
        help="images per step, each seen in as many views as the method asks for; default"
        f" {for_digits['batch_size']} for simclr on the digits",
    )
    parser.add_argument(
        "--learning-rate", type=arguments.positive_float, metavar="R", help="at the top of a cosine schedule"
    )
    parser.add_argument("--optimizer", choices=presets.OPTIMIZERS, default="adamw", help="default adamw")
    parser.add_argument(
        "--weight-decay", type=arguments.not_negative, metavar="W", default=1e-4, help="default 0.0001"
    )
    parser.add_argument(
        "--warmup",
        type=arguments.share,
        metavar="PART",
        default=0.05,
        help="part of the steps over which the learning rate rises; default 0.05",
    )
    parser.add_argument(
        "--temperature", type=arguments.positive_float, metavar="T", help="of methods that have one"
    )
    parser.add_argument(
        "--queue-size",
        type=arguments.positive_int,
        metavar="K",
        help="keys that the queue of moco or mixco holds",
    )
    parser.add_argument(
        "--momentum",
        type=arguments.share,
        metavar="M",
        help="of the average of moco, byol and others, from 0 to 1",
    )
    parser.add_argument(
        "--option",
        type=arguments.named_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another option of the method, such as width=256; may be repeated",
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, metavar="S", help="of weights and views; default 0"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the networks; losses are in float32",
    )
    parser.add_argument(
        "--accumulate",
        type=arguments.positive_int,
        default=1,
        metavar="N",
        help="compute a batch in so many parts, each with a loss of its own; default 1",
    )
    parser.add_argument("--compile", action="store_true", help="compile the encoder with torch.compile")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="native, triton, chunked or reference; default: the fastest that runs",
    )
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="run with the plain PyTorch loss too; default for simclr and moco on the digits",
    )
    parser.add_argument("--short", action="store_true", help="a few epochs only, to see that it works")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--tensorboard", action="store_true", help="write a log for TensorBoard too")
    parser.add_argument(
        "--processes",
        type=arguments.positive_int,
        default=1,
        metavar="N",
        help="train simclr over so many processes of this machine, and hold the losses against those of one",
    )
    arguments.add_output(parser, "pretrain")


def run(args, parser):
    check_packages(parser)
    try:
        from ssl_kernels.recipes import engine, experiment, ranks, report
    except (ImportError, OSError, RuntimeError) as error:
        parser.error(f"{', '.join(DEMO_PACKAGES.values())} must load for it: {error}")

    start = time.perf_counter()
    if args.processes > 1:
        return run_processes(args, parser)
    try:
        settings, device, images, trainings = set_up(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    together = next(iter(trainings.values())).ranks
    is_first = together.rank == 0
    machine = report.describe_machine(device)
    if is_first:
        print(f"{machine}\n{settings}", flush=True)
        if args.resume and not any(training.history.losses for training in trainings.values()):
            print(f"nothing to go on from in {args.out}: the training begins", flush=True)
    try:
        if not is_first:
            engine.train(list(trainings.values()), images.views)
            return 0
        runs, contention = experiment.run_experiment(images, trainings, settings, device=device)
        labels = torch.cat([batch_labels for _, batch_labels in images.test])
        text = report.write_report(runs, labels, settings, machine, contention, args.out)
        close_boards(trainings)
    except (OSError, engine.Diverged) as error:
        parser.error(last_line(error))
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted; --resume goes on from what is in {args.out}\n")
    finally:
        with contextlib.suppress(OSError):  # what a full disk leads to has been told
            close_boards(trainings)
        ranks.leave()
    print(text)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def run_processes(args, parser):
    """Train in one process and in several, and print both."""
    from ssl_kernels.recipes import engine, processes, report

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
            raise ValueError(f"--batch-size must be at least 2 per process, got {settings.batch_size}")
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
    except (ValueError, OSError, engine.Diverged) as error:
        parser.error(last_line(error))
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


def choose_settings(args):
    """The `engine.Settings` of the command line; raises ValueError for options that do not go together."""
    from ssl_kernels.recipes import engine
    from ssl_kernels.recipes.methods import find_method, options_of

    arguments.check_data(args, args.data)
    values = presets.choose(args.method, args.data, args.short)
    typed = {name: value for name, value in vars(args).items() if value is not None}
    common = ("epochs", "batch_size", "learning_rate")
    values |= {name: typed[name] for name in common if name in typed}
    known = options_of(find_method(args.method))
    given = {name: typed[name] for name in ("temperature", "queue_size", "momentum") if name in typed}
    for name in given:
        if name not in known:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must come with a --method that has it, got {args.method}")
    given |= arguments.read_options(args.method, known, args.option)
    options = known | {name: values.pop(name) for name in list(values) if name in known} | given
    rest = {name: values[name] for name in common}
    if args.accumulate > rest["batch_size"] // 2:
        raise ValueError(
            f"--accumulate must leave at least 2 images in each part of --batch-size, got {args.accumulate}"
        )
    names = {field.name for field in dataclasses.fields(engine.Settings)}
    as_typed = {name: value for name, value in vars(args).items() if name in names}
    return engine.Settings(**as_typed | rest, options=options)


def set_up(args):
    """(settings, device, images, trainings); raises ValueError or OSError for what cannot be done."""
    from ssl_kernels.recipes import data, experiment, ranks, report
    from ssl_kernels.recipes.files import check_folder
    from ssl_kernels.recipes.methods import find_method

    settings = choose_settings(args)
    together, device = ranks.join(choose_device(args.device))
    if settings.batch_size % together.size:
        raise ValueError(
            f"--batch-size must be a multiple of the {together.size} processes, got {settings.batch_size}"
        )
    losses = choose_losses(args, settings, together, device)
    method = find_method(args.method)
    images = data.load_data(
        args.data,
        settings.batch_size,
        args.seed,
        root=args.root,
        image_size=args.image_size,
        workers=args.workers,
        views=method.views,
        crops=method.crops,
    )
    trainings = experiment.prepare_trainings(
        images, losses, settings, device=device, out=args.out, resume=args.resume, ranks=together
    )
    for training in trainings.values():
        experiment.rehearse(training, images)
    checkpoints = [training.checkpoint for training in trainings.values()]
    sizes = [training.bytes_of_checkpoint for training in trainings.values()]
    there = sum(path.stat().st_size for path in checkpoints if path.is_file())
    names = [path.with_suffix(ending).name for path in checkpoints for ending in (".pt", ".csv")]
    # One more, since each is written aside.
    check_folder(args.out, [*report.FILES, *names], sum(sizes) + max(sizes) - there)
    if args.tensorboard and together.rank == 0:
        open_boards(trainings, args.out)
    return settings, device, images, trainings


def open_boards(trainings, out):
    from ssl_kernels.recipes.logs import TensorBoard

    for training in trainings.values():
        try:
            training.board = TensorBoard(out / "tensorboard" / training.checkpoint.stem, training.history)
        except ImportError as error:
            raise ValueError(
                "--tensorboard must have tensorboard installed: pip install tensorboard"
            ) from error


def close_boards(trainings):
    for training in trainings.values():
        if training.board is not None:
            training.board.close()


def check_packages(parser):
    missing = missing_packages()
    if missing:
        parser.error(f"{', '.join(missing)} must be installed for it: pip install {' '.join(missing)}")


def missing_packages():
    """The packages of the extra `demo` that are not installed."""
    return [package for module, package in DEMO_PACKAGES.items() if importlib.util.find_spec(module) is None]


def choose_device(name):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)


def choose_losses(args, settings, together, device):
    """dict from a run's name to its loss. A backend that cannot run raises here, before training."""
    from ssl_kernels.recipes.baseline import plain_moco_loss, plain_nt_xent_loss
    from ssl_kernels.recipes.methods import find_method
    from ssl_kernels.recipes.ranks import over_ranks

    loss, backend = find_method(settings.method).criterion, args.backend
    takes_backend = "backend" in inspect.signature(loss).parameters
    if backend is not None and not takes_backend:
        raise ValueError(
            f"--backend must come with a --method whose loss is of ssl_kernels, got {args.method}"
        )
    if together.size > 1:
        loss = over_ranks(loss)
    name = "ssl_kernels"
    if takes_backend:
        sample = torch.ones(2, 8, device=device)
        ssl_kernels.nt_xent_loss(sample, sample, backend=backend)
        if backend is None:
            usable = ssl_kernels.backends_for(ssl_kernels.nt_xent_loss, sample, sample)
            backend = next(name for name, reason in usable.items() if reason is None)
        else:
            loss = functools.partial(loss, backend=backend)
        name = f"ssl_kernels ({backend})"
    can_compare = settings.method in COMPARED and together.size == 1
    if args.compare and not can_compare:
        raise ValueError(f"--compare must come with --method {' or '.join(COMPARED)} in one process")
    if can_compare and (args.data == "digits" if args.compare is None else args.compare):
        plain = {"simclr": plain_nt_xent_loss, "moco": plain_moco_loss}[settings.method]
        return {"plain PyTorch": plain, name: loss}
    return {name: loss}
