"""Judge what a checkpoint of pretrain has learned, beside an encoder that was not trained.

Nearest neighbours and linear probes on frozen features, and fine-tuning on parts of the labels against training from
scratch. With --data another image set than that of the checkpoint, which shows how the features transfer.
Prints a table and writes evaluation.json to the output folder.
"""

import json

import torch

from ssl_kernels.cli import INTERRUPTED, last_line
from ssl_kernels.recipes import arguments
from ssl_kernels.recipes.pretrain import check_packages, choose_device

FILE = "evaluation.json"
UNTRAINED = "untrained encoder"


def add_arguments(parser):
    arguments.add_checkpoint(parser)
    parser.add_argument(
        "--parts",
        type=parts,
        default=(0.01, 0.1, 1.0),
        metavar="P,P",
        help="parts of the labels to fine-tune on; default 0.01,0.1,1",
    )
    parser.add_argument(
        "--seeds", type=arguments.positive_int, default=3, metavar="N", help="of fine-tuning; default 3"
    )
    parser.add_argument(
        "--steps", type=arguments.positive_int, default=200, metavar="N", help="of fine-tuning; default 200"
    )
    parser.add_argument("--short", action="store_true", help="one seed and 20 steps, to see that it works")
    arguments.add_output(parser, "evaluate")


def parts(text):
    return tuple(arguments.positive_share(part) for part in text.split(","))


def run(args, parser):
    check_packages(parser)
    from ssl_kernels.recipes.engine import Diverged
    from ssl_kernels.recipes.files import check_folder, write_whole
    from ssl_kernels.recipes.trained import load_images, load_trained

    try:
        device = choose_device(args.device)
        method, settings, _, shape = load_trained(args.checkpoint, device)
        arguments.check_data(args, args.data or settings.data)
        images = load_images(args, settings, shape)
        check_folder(args.out, [FILE], 0)
        found = judge(method.encoder, settings, shape, images, args, device)
        write_whole(args.out / FILE, (json.dumps(found, indent=1) + "\n").encode())
    except (ValueError, OSError, Diverged) as error:
        parser.error(last_line(error))
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, f"{parser.prog}: interrupted\n")
    print(format_table(found))
    print(f"wrote {FILE} to {args.out}")
    return 0


def judge(encoder, settings, shape, images, args, device):
    """dict of what `evaluation.json` holds."""
    from ssl_kernels.recipes.evaluation import evaluate_features, extract_features
    from ssl_kernels.recipes.experiment import build_encoder
    from ssl_kernels.recipes.finetuning import finetune

    seeds, steps = (1, 20) if args.short else (args.seeds, args.steps)
    rows = {}
    for name, network in (
        (settings.method, encoder),
        (UNTRAINED, build_encoder(shape, settings.seed, settings.method).to(device)),
    ):
        features = [extract_features(network, batches) for batches in (images.train, images.test)]
        options = {"steps": steps, "from_scratch": name == UNTRAINED, "device": device}
        finetuned = {
            part: [finetune(network, images, part, seed, **options) for seed in range(seeds)]
            for part in args.parts
        }
        rows[name] = vars(evaluate_features(*features)) | {"finetuned": finetuned}
    return {
        "checkpoint": str(args.checkpoint),
        "trained on": settings.data,
        "judged on": images.name,
        "rows": rows,
    }


def format_table(found):
    from ssl_kernels.recipes.report import align_columns

    first = next(iter(found["rows"].values()))
    header = ["", "kNN", "linear probe", "5 labels/class"]
    lines = [header + [f"fine-tuned, {100 * part:g} % of labels" for part in first["finetuned"]]]
    for name, row in found["rows"].items():
        cells = [f"{100 * row[kind]:.1f} %" for kind in ("knn", "linear", "few")]
        lines.append([name, *cells, *(describe(values) for values in row["finetuned"].values())])
    title = f"trained on {found['trained on']}, judged on {found['judged on']}"
    return "\n".join([title, align_columns(lines)])


def describe(values):
    """Mean and, of several, the standard deviation, in percent."""
    values = torch.tensor(values, dtype=torch.float64)
    spread = f" ± {100 * values.std():.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread} %"
