"""Train with three libraries' losses and again under `ssl_kernels.patch`, and write docs/parity.md with pictures.

    python -m benchmarks.parity [--steps 40] [--seeds 3] [--docs docs]

Each training is the library's own way of doing it, with its class asked for by its own name; the patch is the one
difference. The same seed gives the same weights and batches. Then time and memory of each loss on embeddings of the
training's shape are measured in turn, in seconds of the processor. Needs what `make test-peers` installs, datasets,
scikit-learn and matplotlib.
"""

import argparse
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

import ssl_kernels
from benchmarks import harness, machine
from benchmarks.results import markdown_table
from benchmarks.sentence_transformers_run import run as run_sentence_transformers
from benchmarks.sentence_transformers_run import text_pairs

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
BATCH = 256
PAIRS = 128
TEXTS = 32


def digits():
    """Scikit-learn's images of handwritten digits, (N, 1, 8, 8) from 0 to 1, and what they show."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target)


def simclr_by_lightly(steps, seed):
    """SimCLR of digits, views made by shifts and noise, with lightly's projection head and loss."""
    import lightly.loss
    from lightly.models.modules import SimCLRProjectionHead

    images, _ = digits()
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(encoder, SimCLRProjectionHead(512, 128, 64))
    criterion = lightly.loss.NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)

    def view(batch):
        shifts = torch.randint(-1, 2, (2,)).tolist()
        return batch.roll(shifts, (2, 3)) + 0.2 * torch.randn_like(batch)

    losses = []
    for _ in range(steps):
        batch = images[torch.randperm(len(images))[:BATCH]]
        loss = criterion(model(view(batch)), model(view(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def clip_by_open_clip(steps, seed):
    """A small CLIP on digits and captions that say the digit and how much ink each row has."""
    import open_clip

    images, labels = digits()
    ink = (images.mean((1, 3)) * 9.99).long()  # (N, 8), 0 to 9
    captions = torch.cat((labels[:, None] + 1, ink + 11, torch.full((len(labels), 1), 31)), 1)
    images = nn.functional.interpolate(images, size=16).expand(-1, 3, -1, -1)
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        text_cfg={"context_length": 10, "vocab_size": 32, "width": 64, "heads": 2, "layers": 2},
        output_dict=True,
    )
    settings = {"local_loss": False, "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False}
    create_loss = open_clip.create_loss
    criterion = create_loss(SimpleNamespace(distill=False, model="small", siglip=False, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(images))[:PAIRS]
        (loss,) = criterion(**model(images[chosen], captions[chosen]), output_dict=True).values()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ranking_by_sentence_transformers(steps, seed):
    """A BERT of two layers on docstrings of the standard library, by the library's trainer."""
    from sentence_transformers.sentence_transformer import losses

    return run_sentence_transformers(
        lambda model: losses.MultipleNegativesRankingLoss(model), text_pairs(256), steps, TEXTS, seed
    )[0]


def ranking_loss():
    from sentence_transformers.sentence_transformer import losses

    loss = losses.MultipleNegativesRankingLoss(nn.Sequential(nn.Identity()))
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def clip_loss():
    import open_clip

    loss = open_clip.ClipLoss()
    return lambda images, texts: loss(images, texts, 14.3)


def simclr_loss():
    import lightly.loss

    return lightly.loss.NTXentLoss(temperature=0.5)


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        library: The adapter's name, for `patch`.
        title: Of the section and the picture.
        run: `run(steps, seed)` gives the loss of each step.
        loss: Makes the loss by the library's name for it, of two tensors of `shape`.
        unit: Whether the loss takes unit rows.
    """

    library: str
    title: str
    run: object
    loss: object
    shape: tuple
    unit: bool = False


TRAININGS = (
    Training("lightly", "SimCLR with lightly's NTXentLoss", simclr_by_lightly, simclr_loss, (BATCH, 64)),
    Training("open_clip", "CLIP with open_clip's ClipLoss", clip_by_open_clip, clip_loss, (PAIRS, 64), True),
    Training(
        "sentence_transformers",
        "sentence-transformers' trainer with MultipleNegativesRankingLoss",
        ranking_by_sentence_transformers,
        ranking_loss,
        (TEXTS, 128),
    ),
)


def curves(training, steps, seeds):
    """(losses of the original, of the adapter), each (seeds, steps)."""
    original = [training.run(steps, seed) for seed in range(seeds)]
    with ssl_kernels.patch(training.library):
        patched = [training.run(steps, seed) for seed in range(seeds)]
    return torch.tensor(original, dtype=torch.float64), torch.tensor(patched, dtype=torch.float64)


class ProcessorClock:
    """Marks are seconds that the process has had of the processor: what other programs do does not count."""

    def mark(self):
        return time.process_time()

    def seconds_between(self, start, end):
        return end - start


def cost(training):
    """{"original" | "patched": (seconds, bytes)} of a step of the loss alone, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(training.shape, generator=generator) for _ in range(2)]
    if training.unit:
        inputs = [nn.functional.normalize(x, dim=1) for x in inputs]
    inputs = tuple(x.requires_grad_() for x in inputs)
    original = training.loss()
    with ssl_kernels.patch(training.library):
        patched = training.loss()
    functions = {"original": original, "patched": patched}
    made = [harness.Implementation(name, function) for name, function in functions.items()]
    workload = harness.Workload(
        training.title, {}, inputs, made, lambda: harness.loss_and_gradients(original, inputs), 1e-4
    )
    case, clock = harness.admit(workload), ProcessorClock()
    product = harness.ProductTimer(inputs[0], clock, size=64)
    timers = harness.run_rounds(case, harness.Budget(2.0, 9), clock, product)
    return {
        name: (
            statistics.median(timers[name].steps),
            harness.measure_extra_bytes(functions[name], inputs),
        )
        for name in timers
    }


def summary(original, patched):
    """What the page says of two sets of curves."""
    difference = (original - patched).abs()
    spread = original.std(0)  # over seeds, one number per step
    return {
        "first": original[:, 0].mean().item(),
        "last": original[:, -1].mean().item(),
        "largest": difference.max().item(),
        "mean": difference.mean().item(),
        "spread": spread.mean().item(),
    }


def draw(training, original, patched, path):
    """The curves of all seeds to the left, what lies between them to the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for seed, (theirs, ours) in enumerate(zip(original, patched, strict=True)):
        left.plot(theirs, color="#c4c9cf", linewidth=4, label="original" if seed == 0 else None)
        left.plot(ours, color="#d1495b", linewidth=1, label="patched" if seed == 0 else None)
        right.semilogy((theirs - ours).abs().clamp_min(1e-9), color="#d1495b", linewidth=1)
    right.semilogy(original.std(0), color="#6c757d", linewidth=2, label="standard deviation over seeds")
    left.set(title=training.title, xlabel="step", ylabel="loss")
    left.title.set_fontsize(9)
    right.set_title("between original and patched, same seed", fontsize=9)
    right.set_xlabel("step")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


PAGE = """# Parity runs

Three short trainings with other libraries' losses, each as the library's users write it, and again under
`ssl_kernels.patch(...)`: the same seeds, weights and batches, {steps} steps, {seeds} seeds.
`python -m benchmarks.parity` makes this page.

A loss that rounds otherwise leads to weights that differ in the last digits, and training makes of that what it makes
of any rounding. So the difference of a step is given beside the standard deviation of the loss over the seeds: a
training repeated with another seed differs by that much.

{table}

Time and memory are those of the loss alone, forward and backward, on embeddings of the training's shape, measured in
turn: median seconds of the processor, and bytes beyond inputs and gradients. {machine}.

{pictures}
"""


def page(found, steps, seeds, machine_line):
    header = [
        "training",
        "loss, first and last",
        "difference, largest (mean)",
        "deviation over seeds",
        "loss, ms (patched)",
        "memory, kB (patched)",
    ]
    lines, pictures = [], []
    for training, said, costs, picture in found:
        (seconds, memory), (our_seconds, our_memory) = costs["original"], costs["patched"]
        lines.append(
            [
                training.title,
                f"{said['first']:.3f} to {said['last']:.3f}",
                f"{said['largest']:.1e} ({said['mean']:.1e})",
                f"{said['spread']:.1e}",
                f"{1e3 * seconds:.2f} ({1e3 * our_seconds:.2f})",
                f"{memory / 1e3:.0f} ({our_memory / 1e3:.0f})",
            ]
        )
        pictures.append(f"![{training.title}: loss curves, and the difference between both]({picture})")
    return PAGE.format(
        steps=steps,
        seeds=seeds,
        table=markdown_table(header, lines),
        machine=machine_line,
        pictures="\n\n".join(pictures),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each loss (%(default)s)")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    for training in TRAININGS:
        original, patched = curves(training, options.steps, options.seeds)
        picture = f"parity-{training.library}.png"
        draw(training, original, patched, options.docs / picture)
        said = summary(original, patched)
        print(f"{training.title}: {said}", flush=True)
        found.append((training, said, cost(training), picture))
    line = machine.machine_line(machine.describe_machine("cpu"))
    (options.docs / "parity.md").write_text(page(found, options.steps, options.seeds, line))
    print(f"wrote {options.docs / 'parity.md'} and its pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
