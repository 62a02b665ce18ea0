"""Every recipe on the digits, over several seeds: `python -m benchmarks.recipes [--limit N] [--write]`.

Each run is stored as it ends, and what is stored is not run again; --write puts the tables of what is there into
docs/recipes.md.
"""

import argparse
import json
import os
import pathlib
import statistics
import time

import torch

from benchmarks import plain_losses
from ssl_kernels.recipes import data, engine, evaluation, experiment, presets, report
from ssl_kernels.recipes.baseline import plain_moco_loss, plain_nt_xent_loss
from ssl_kernels.recipes.files import write_whole
from ssl_kernels.recipes.finetuning import finetune
from ssl_kernels.recipes.methods import METHODS, find_method, options_of

SEEDS = (0, 1, 2)
EPOCHS = 15
BATCH_SIZE = 256
PARTS = (0.01, 0.1)  # of the labels
NOISE = 0.3
FINETUNED = ("simclr", "byol", "vicreg")
FINETUNING_STEPS = 100
MIXED = ("supervised", "mixup", "cutmix", "manifold-mixup")
PLAIN = {
    "simclr": plain_nt_xent_loss,
    "moco": plain_moco_loss,
    "byol": plain_losses.plain_byol_loss,
    "simsiam": plain_losses.plain_byol_loss,
    "supcon": plain_losses.plain_sup_con_loss,
    "imix": plain_losses.plain_imix_loss,
}
STORE = pathlib.Path(__file__).parent / "results" / "recipes.json"
DOCS = pathlib.Path(__file__).parent.parent / "docs" / "recipes.md"


def runs():
    """(key, function) of every run, the most telling first."""
    for seed in SEEDS:
        yield f"untouched {seed}", lambda seed=seed: untouched(seed)
        for method in METHODS:
            yield f"ours {method} {seed}", lambda method=method, seed=seed: train(method, seed)
        for method, loss in PLAIN.items():
            yield (
                f"plain {method} {seed}",
                lambda method=method, seed=seed, loss=loss: train(method, seed, loss),
            )


def settings_of(method, seed):
    options = options_of(find_method(method))
    chosen = presets.choose(method, "digits")
    options |= {name: chosen[name] for name in options if name in chosen}
    return engine.Settings(method, "digits", EPOCHS, BATCH_SIZE, 3e-3, seed=seed, options=options)


def load(method, seed):
    kind = find_method(method)
    return data.load_data("digits", BATCH_SIZE, seed, views=kind.views, crops=kind.crops)


def untouched(seed):
    """Raw pixels, both untrained encoders, and fine-tuning from scratch."""
    images = load("simclr", seed)
    found = {"raw pixels": judge(torch.nn.Flatten(), images)}
    for name, method in (("convolutional network", "simclr"), ("transformer", "mae")):
        found[name] = judge(experiment.build_encoder(images, seed, method), images)
    found["convolutional network"]["finetuned"] = finetuned(
        experiment.build_encoder(images, seed, "simclr"), images, seed
    )
    return found


def finetuned(encoder, images, seed):
    return [finetune(encoder, images, part, seed, steps=FINETUNING_STEPS) for part in PARTS]


def judge(encoder, images):
    features = [evaluation.extract_features(encoder, batches) for batches in (images.train, images.test)]
    return vars(evaluation.evaluate_features(*features))


def train(method, seed, loss=None):
    images = load(method, seed)
    training = experiment.prepare_trainings(images, {"run": loss}, settings_of(method, seed))["run"]
    start = time.process_time()
    engine.train([training], images.views, f"{method}, seed {seed}")
    found = judge(training.method.encoder, images) | {
        "seconds": time.process_time() - start,
        "loss": statistics.fmean(training.history.losses[-5:]),
        "spread": training.history.spreads[-1],
        "rank": training.history.ranks[-1],
    }
    if loss is None and method in FINETUNED:
        found["finetuned"] = finetuned(training.method.encoder, images, seed)
    if method in MIXED:
        logits, labels = evaluation.extract_features(training.method.online, images.test)
        noisy, _ = evaluation.extract_features(
            training.method.online, evaluation.with_noise(images.test, NOISE)
        )
        found |= {
            "accuracy": evaluation.accuracy_of(logits, labels),
            "calibration": evaluation.calibration_error(logits, labels),
            "noisy": evaluation.accuracy_of(noisy, labels),
        }
    return found


def run_all(store, limit):
    missing = [(key, function) for key, function in runs() if key not in store["runs"]]
    for key, function in missing[:limit]:
        store["runs"][key] = function()
        store["machine"] = report.describe_machine("cpu")
        write_whole(STORE, (json.dumps(store, indent=1) + "\n").encode())
        print(key, store["runs"][key], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="write the tables of docs/recipes.md, run nothing"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="runs to make at most; default all that are missing"
    )
    args = parser.parse_args()
    store = json.loads(STORE.read_text()) if STORE.exists() else {"epochs": EPOCHS, "runs": {}}
    if args.write:
        from benchmarks import recipes_tables

        recipes_tables.write(DOCS, store)
        return
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_all(store, args.limit)


if __name__ == "__main__":
    main()
