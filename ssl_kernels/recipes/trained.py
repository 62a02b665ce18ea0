"""A method as a checkpoint holds it."""

import dataclasses
from types import SimpleNamespace

from ssl_kernels.recipes import data
from ssl_kernels.recipes.checkpoints import read_checkpoint
from ssl_kernels.recipes.engine import SHAPE, Settings
from ssl_kernels.recipes.experiment import build_method

FIELDS = {field.name for field in dataclasses.fields(Settings)} - {"options"}
BATCH_SIZE = 256  # of views of the images that it is judged on


def load_trained(path, device="cpu"):
    """(method, settings, history, shape) of a checkpoint: a `Method` in evaluation mode, its `Settings` and `History`,
    and what it knows of its images.

    Raises:
        ValueError: It is no checkpoint of `pretrain`, or cannot be read.
    """
    state = read_checkpoint(path, "CHECKPOINT")
    try:
        saved = state["settings"]
        options = {name: value for name, value in saved.items() if name not in FIELDS}
        settings = Settings(**{name: saved[name] for name in FIELDS}, options=options)
        shape = SimpleNamespace(**{name: state["images"][name] for name in SHAPE})
        method = build_method(shape, settings)
        method.load_state_dict(state["model"])
    except Exception as error:  # whatever a foreign file leads to
        raise ValueError(f"CHECKPOINT: {path} must hold a method that pretrain knows, got another") from error
    return method.to(device).eval(), settings, state["history"], shape


def load_images(args, settings, shape, views=2):
    """The `ImageData` of `--data`, by default that of the checkpoint.

    Raises:
        ValueError: It cannot be loaded, or the network cannot take its images.
    """
    name = args.data or settings.data
    images = data.load_data(
        name,
        2,
        settings.seed,
        root=args.root,
        image_size=args.image_size or (settings.image_size if name == settings.data else None),
        workers=args.workers,
        views=views,
    )
    images.views.batch_size = min(BATCH_SIZE, len(images.views.labels))
    if images.channels != shape.channels:
        raise ValueError(
            f"--data must have images of {shape.channels} channels as the checkpoint's, got {name} with"
            f" {images.channels}"
        )
    if settings.method == "mae" and images.image_size != shape.image_size:
        raise ValueError(
            f"--data must have images of side {shape.image_size}, which mae's network is made for, got {name} with"
            f" {images.image_size}"
        )
    return images
