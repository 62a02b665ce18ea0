"""Every recipe over several seeds: `python -m benchmarks.recipes [--limit N] [--methods NAMES] [--write]`.

Each training is stored as it ends, a line a run, and what is stored is not run again; --write puts the tables of what
is there into docs/recipes.md.
"""

import argparse
import csv
import io
import math
import os
import pathlib
import time

import torch

from benchmarks.machine import describe_machine
from benchmarks.recipes_plain import PLAIN
from ssl_kernels.recipes import data, engine, evaluation, experiment, presets
from ssl_kernels.recipes.files import write_whole
from ssl_kernels.recipes.finetuning import finetune
from ssl_kernels.recipes.methods import METHODS, find_method, options_of

SEEDS = (0, 1, 2)
EPOCHS = {"digits": 100, "mnist5k": 8}
BATCH_SIZE = 256
PARTS = {"finetuned_1": 0.01, "finetuned_3": 0.03, "finetuned_10": 0.1}  # of the labels
NOISE = 0.3
FINETUNED = ("simclr", "byol")
MIXED = ("supervised", "mixup", "cutmix", "manifold-mixup")
FEATURES = ("knn", "linear", "few")
CLASSIFIER = ("accuracy", "calibration", "noisy")
TIME = ("seconds", "machine")  # of the training alone: seconds of one core of this processor
COLUMNS = ("run", "name", "seed", *FEATURES, "rank", *PARTS, *CLASSIFIER, *TIME)
STORE = pathlib.Path(__file__).parent / "results" / "recipes.csv"
DOCS = pathlib.Path(__file__).parent.parent / "docs" / "recipes.md"


def pieces(methods=None):
    """(run, name, seed, function) of the first line of everything that is run together; the function gives its lines,
    dictionaries without the seed. Ours come first, of all seeds."""
    for seed in SEEDS:
        if methods is None:
            yield "untrained", "raw pixels", seed, untrained
            yield "on mnist5k", "untrained", seed, transfer
        for method in methods or METHODS:
            yield "ours", method, seed, lambda seed, method=method: train(method, seed)
    for seed in SEEDS:
        for method in methods or METHODS:
            if method in PLAIN:
                yield "plain", method, seed, lambda seed, method=method: train_plain(method, seed)


def settings_of(method, seed, images="digits"):
    """As `pretrain` has them, but with batches and epochs alike for all."""
    chosen = presets.choose(method, images)
    known = options_of(find_method(method))
    # Of another batch: AdamW's rate goes with the root of its size.
    rate = chosen["learning_rate"] * math.sqrt(BATCH_SIZE / chosen["batch_size"])
    options = known | {name: chosen[name] for name in known if name in chosen}
    return engine.Settings(method, images, EPOCHS[images], BATCH_SIZE, rate, seed=seed, options=options)


def load(method, seed, images="digits"):
    kind = find_method(method)
    return data.load_data(images, BATCH_SIZE, seed, views=kind.views, crops=kind.crops)


def untrained(seed):
    """Raw pixels, both untrained encoders, and the convolutional one fine-tuned."""
    images = load("simclr", seed)
    network, transformer = (experiment.build_encoder(images, seed, method) for method in ("simclr", "mae"))
    name = {"run": "untrained"}
    return [
        name | {"name": "raw pixels"} | judge(torch.nn.Flatten(), images),
        name
        | {"name": "convolutional network"}
        | judge(network, images)
        | finetuned(network, images, seed, from_scratch=True),
        name | {"name": "transformer"} | judge(transformer, images),
    ]


def train(method, seed):
    training, images, seconds = trained(method, seed, "digits", None)
    line = {"run": "ours", "name": method, **judge(training.method.encoder, images)}
    line |= {"rank": training.history.ranks[-1], "seconds": seconds, "machine": processor()}
    if method in FINETUNED:
        line |= finetuned(training.method.encoder, images, seed)
    if method in MIXED:
        line |= judge_classifier(training.method.online, images)
    return [line]


def train_plain(method, seed):
    """With plain PyTorch's loss, from the same weights and on the same views as `train`."""
    training, images, seconds = trained(method, seed, "digits", PLAIN[method])
    line = {"run": "plain", "name": method, **judge(training.method.encoder, images)}
    return [line | {"seconds": seconds, "machine": processor()}]


def trained(method, seed, name, loss):
    """(a `Training` at its end, the `ImageData` called name, the processor's seconds that it took); loss None is the
    method's own. The processor's, since other work on the machine adds little to these."""
    images = load(method, seed, name)
    training = experiment.prepare_trainings(images, {"run": loss}, settings_of(method, seed, name))["run"]
    start = time.process_time()
    engine.train([training], images.views, f"{method} of {name}, seed {seed}")
    return training, images, time.process_time() - start


def processor():
    """Its name and instruction set, such as "AMD EPYC, avx512": generations may share a name."""
    machine = describe_machine("cpu")
    return ", ".join(filter(None, (machine["cpu"], machine["instruction_set"])))


def transfer(seed):
    """SimCLR's encoders of either image set on the other, and on MNIST's digits beside an untrained one."""
    encoders, sets = {}, {}
    for name in EPOCHS:
        training, sets[name], _ = trained("simclr", seed, name, None)
        encoders[f"from {name}"] = training.method.encoder
    encoders["untrained"] = experiment.build_encoder(sets["digits"], seed, "simclr")
    pairs = [("mnist5k", "untrained"), ("mnist5k", "from digits"), ("mnist5k", "from mnist5k")]
    return [
        {"run": f"on {judged}", "name": name}
        | judge(encoders[name], sets[judged])
        | finetuned(encoders[name], sets[judged], seed, from_scratch=name == "untrained")
        for judged, name in [*pairs, ("digits", "from mnist5k")]
    ]


def judge(encoder, images):
    features = [evaluation.extract_features(encoder, batches) for batches in (images.train, images.test)]
    return vars(evaluation.evaluate_features(*features))


def finetuned(encoder, images, seed, from_scratch=False):
    return {
        column: finetune(encoder, images, part, seed, from_scratch=from_scratch)
        for column, part in PARTS.items()
    }


def judge_classifier(network, images):
    logits, labels = evaluation.extract_features(network, images.test)
    noisy, _ = evaluation.extract_features(network, evaluation.with_noise(images.test, NOISE))
    return {
        "accuracy": evaluation.accuracy_of(logits, labels),
        "calibration": evaluation.calibration_error(logits, labels),
        "noisy": evaluation.accuracy_of(noisy, labels),
    }


def read_lines():
    """What is stored: dictionaries from each column that has something to its text."""
    if not STORE.exists():
        return []
    with open(STORE, newline="") as file:
        return [{name: text for name, text in line.items() if text} for line in csv.DictReader(file)]


def write_lines(lines):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_whole(STORE, text.getvalue().encode())


def run_missing(limit, methods):
    """Another process may do the same: what it has stored meanwhile is left to it."""
    missing = [piece for piece in pieces(methods) if not is_stored(*piece[:3])]
    for run, name, seed, function in missing[:limit]:
        if is_stored(run, name, seed):
            continue
        lines = []
        for line in function(seed):
            numbers = {column: f"{value:.4f}" for column, value in line.items() if isinstance(value, float)}
            lines.append(line | {"seed": str(seed)} | numbers)
            print(*lines[-1].values(), flush=True)
        write_lines(read_lines() + lines)


def is_stored(run, name, seed):
    return any((line["run"], line["name"], line["seed"]) == (run, name, str(seed)) for line in read_lines())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="write the tables of docs/recipes.md, run nothing"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="trainings to make at most; default all that are missing"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help="default all")
    args = parser.parse_args()
    if args.write:
        from benchmarks import recipes_tables

        recipes_tables.write(DOCS, read_lines())
        return
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_missing(args.limit, args.methods)


if __name__ == "__main__":
    main()
