"""What the methods take unless told otherwise, for each image set."""

OPTIMIZERS = ("adamw", "sgd", "lars")
DATA = ("digits", "mnist5k", "cifar10", "folder")

# The settings of every method, and where a method has others, those.
PRESETS = {
    "digits": {
        None: {"epochs": 100, "batch_size": 256, "learning_rate": 3e-3},
        "simclr": {"epochs": 150, "batch_size": 1024, "temperature": 0.5, "learning_rate": 6e-3},
        "moco": {"epochs": 150, "batch_size": 256, "temperature": 0.2, "learning_rate": 3e-3},
    },
    "mnist5k": {None: {"epochs": 30, "batch_size": 256, "learning_rate": 3e-3}},
    "cifar10": {
        None: {"epochs": 200, "batch_size": 256, "learning_rate": 1e-3, "queue_size": 16384},
        "simclr": {"batch_size": 512},
    },
    "folder": {
        None: {
            "epochs": 100,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "queue_size": 65536,
            "momentum": 0.999,
        },
        "simclr": {"temperature": 0.1},
    },
}
SHORT = {
    "digits": {"epochs": 15, "batch_size": 256, "learning_rate": 3e-3},
    "mnist5k": {"epochs": 1},
    "cifar10": {"epochs": 1},
    "folder": {"epochs": 1},
}


def choose(method, data, short=False):
    """dict of epochs, batch_size, learning_rate, and options of the method that differ from its own defaults; it may
    name options that the method does not have."""
    of_data = PRESETS[data]
    return of_data[None] | of_data.get(method, {}) | (SHORT[data] if short else {})
