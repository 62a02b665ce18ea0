"""Draw what a checkpoint of pretrain has learned, and say whether its embeddings have collapsed.

Writes to the output folder: curves.png, the loss and the spread and rank of the embeddings over the training; map.png,
the held-out features in the plane; similarities.png, cosines of two views of one image and of different images;
spectrum.png, the eigenvalues of the embeddings' covariance.
"""

import logging

import torch
import torch.nn.functional as F

from ssl_kernels.cli import last_line
from ssl_kernels.recipes import arguments
from ssl_kernels.recipes.pretrain import check_packages, choose_device

FILES = ("curves.png", "map.png", "similarities.png", "spectrum.png")
log = logging.getLogger("ssl_kernels.recipes")


def add_arguments(parser):
    arguments.add_checkpoint(parser)
    parser.add_argument("--map", choices=("tsne", "pca"), default="tsne", help="of map.png; default tsne")
    arguments.add_output(parser, "plot")


def run(args, parser):
    check_packages(parser)
    from ssl_kernels.recipes import drawing
    from ssl_kernels.recipes.collapse import covariance_spectrum, for_so_many, measure_health
    from ssl_kernels.recipes.evaluation import extract_features
    from ssl_kernels.recipes.files import check_folder
    from ssl_kernels.recipes.trained import load_images, load_trained

    try:
        method, settings, history, shape = load_trained(args.checkpoint, choose_device(args.device))
        arguments.check_data(args, args.data or settings.data)
        images = load_images(args, settings, shape)
        check_folder(args.out, FILES, 0)
        curves, plane, similarities, spectrum = (args.out / name for name in FILES)
        features, labels = extract_features(method.encoder, images.test)
        view0, view1 = (embed(method, view) for view in next(images.views.epoch(0)).views)
        drawing.draw_curves(history, settings.method, curves)
        drawing.draw_map(features, labels, args.map, settings.method, plane)
        positive, negative = view_similarities(view0, view1)
        drawing.draw_similarities(positive, negative, similarities)
        rows = torch.cat([view0, view1])
        drawing.draw_spectrum(covariance_spectrum(F.normalize(rows, dim=1)), spectrum)
    except (ValueError, OSError) as error:
        parser.error(last_line(error))
    health = measure_health(rows)
    complaint = health.complaint(for_so_many(method.least_health, len(rows)))
    if complaint:
        log.warning("%s: collapse: %s", settings.method, complaint)
    print(f"spread {health.spread:.3f}, effective rank {health.rank:.1f} of {rows.shape[1]}")
    print(f"mean cosine: two views {positive.mean():.3f}, different images {negative.mean():.3f}")
    print(f"wrote {', '.join(FILES)} to {args.out}")
    return 0


@torch.no_grad()
def embed(method, images):
    """What the method learns to place, (B, D), as training sees it: normalised by the batch's own statistics. That is
    the projection where the method has one that places, else the features."""
    method.train()
    weight = next(method.parameters())
    network = method.online if method.places_embeddings else method.encoder
    return network(images.to(weight.device, weight.dtype)).float().cpu()


def view_similarities(view0, view1):
    """Cosines of the two views of each image, (N,), and of views of different images, (N (N - 1),)."""
    cosines = F.normalize(view0, dim=1) @ F.normalize(view1, dim=1).T
    others = ~torch.eye(len(cosines), dtype=torch.bool)
    return cosines.diagonal(), cosines[others]
