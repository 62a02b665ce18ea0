"""The methods, one file each: what a batch's loss is, and what follows a step."""

import importlib
import inspect

# name: class, in the module of the name
METHODS = {
    "simclr": "SimCLR",
    "moco": "MoCo",
    "mocov3": "MoCoV3",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "swav": "SwAV",
    "dino": "DINO",
    "barlow": "BarlowTwins",
    "vicreg": "VICReg",
    "mae": "MAE",
    "supcon": "SupCon",
    "triplet": "Triplet",
    "imix": "IMix",
    "mixco": "MixCo",
    "clip": "CLIP",
    "rotation": "Rotation",
    "jigsaw": "Jigsaw",
    "supervised": "Supervised",
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "manifold-mixup": "ManifoldMixup",
}


def find_method(name):
    """The class of the method called `name`."""
    module = importlib.import_module(f"ssl_kernels.recipes.methods.{name.replace('-', '_')}")
    return getattr(module, METHODS[name])


def options_of(method):
    """dict from the names of the method's own options to their defaults: its keyword arguments."""
    parameters = inspect.signature(method.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
