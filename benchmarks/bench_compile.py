"""Every loss of the library against torch.compile of its plain formulation, from 2 rows to 8192, with one thread and
with two: `python -m benchmarks compile`, of which `python -m benchmarks.compile_page CSV` makes the table of
docs/benchmarks.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import ssl_kernels
from benchmarks import peers, plain_losses
from benchmarks.bench_contrastive import TOLERANCES
from benchmarks.harness import Budget, Implementation, Workload, loss_and_gradients
from benchmarks.peers import MATRICES_OF_LOGITS, compiled
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

BATCH_SIZES = (2, 8, 64, 256, 1024, 4096, 8192)
QUICK_BATCH_SIZES = (8, 64)
THREADS = (1, 2)
BUDGET = Budget(seconds=1.0, least_rounds=3)
DIM = 128
WIDE = 512  # of the losses of features
PIXELS = 768  # of a patch
QUEUE, PROTOTYPES, FEW_PROTOTYPES = 4096, 3000, 64
CROPS = 4
ROWS_OF_A_LABEL = 4
WIDTHS = (32, 64, 128)  # of matryoshka
DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


@dataclass(frozen=True)
class Compared:
    """One loss.

    Args:
        name: As the table shows it; beyond the function's name what is special about the call.
        ours, plain: Functions of the inputs.
        make: Of (N, D), the inputs. Floating tensors of two and more dimensions get a gradient.
        without_gradient: How many of the last of these get none.
        products: Of N, how many products of two rows of width D a step needs at least; 0 where they are not the work.
        dim: Instead of the usual width.
        least, most: Of N; a loss of the square of both views has 8192 rows of 4096 pairs.
        logits: Of N, the size of the largest matrix that plain PyTorch makes.
        compares_gradients: Not where float32 decides otherwise between rows that are nearly as far away.
    """

    name: str
    ours: Callable
    plain: Callable
    make: Callable
    without_gradient: int = 0
    products: Callable = lambda n: 0
    dim: int = DIM
    least: int = 1
    most: int = BATCH_SIZES[-1]
    logits: Callable = lambda n: n * n
    compares_gradients: bool = True

    def __call__(self, batch_size, threads, dim, dtype, device):
        torch.set_num_threads(threads)
        torch.manual_seed(batch_size)
        dim = dim or self.dim
        inputs = [
            x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in self.make(batch_size, dim)
        ]
        embeddings = [x for x in inputs if x.is_floating_point() and x.dim() >= 2]
        for x in embeddings[: len(embeddings) - self.without_gradient]:
            x.requires_grad_()
        extra_bytes = MATRICES_OF_LOGITS * self.logits(batch_size) * dtype.itemsize

        return Workload(
            loss=f"{self.name}, {threads} thread{'s' * (threads != 1)}",
            sizes={"N": batch_size, "D": dim},
            inputs=tuple(inputs),
            implementations=[
                Implementation("torch.compile", compiled(self.plain), baseline=True, extra_bytes=extra_bytes),
                Implementation("ssl_kernels", self.ours),
            ],
            expected=lambda: loss_and_gradients(self.plain, inputs),
            tolerance=TOLERANCES[dtype] if self.compares_gradients or dtype == torch.float64 else 1.0,
            operations=int(2 * self.products(batch_size) * dim) or None,
        )


def rows(*counts):
    """A maker of normal rows, count · N each."""
    return lambda n, d: [torch.randn(count * n, d) for count in counts]


def labelled(n, d):
    return torch.randn(n, d), torch.arange(n) // ROWS_OF_A_LABEL


def classes(n, d):
    return torch.randn(n, d), torch.randint(max(2, n // 16), (n,))


def mixed(n, d):
    return *rows(1, 1)(n, d), torch.randperm(n), torch.rand(n)


def with_queue(n, d):
    queue = torch.nn.functional.normalize(torch.randn(QUEUE, d), dim=1)
    return *rows(1, 1)(n, d), queue


def with_targets(n, d):
    return *rows(1, 1)(n, d), torch.randperm(n)


def sampled(n, d):
    return *rows(1, 1, 1)(n, d), torch.rand(2 * n).log()


def clips(n, d):
    return torch.randn(n, d), torch.randn(n, 2, d)


def crops(crops, prototypes):
    return lambda n, d: (torch.randn(crops, n, d), torch.randn(prototypes, d))


def logits_of_crops(n, d):
    return torch.randn(CROPS, n, PROTOTYPES), torch.randn(2, n, PROTOTYPES)


def image_and_text(n, d):
    return *rows(1, 1)(n, d), torch.tensor(14.3)


def features_of_crops(n, d):
    student, prototypes = crops(CROPS, PROTOTYPES)(n, d)
    return student, prototypes, torch.randn(2, n, d), torch.randn(PROTOTYPES, d)


def dino_of_features(student, prototypes, teacher, teacher_prototypes):
    return ssl_kernels.dino_loss(student, teacher, prototypes, teacher_prototypes)


def plain_dino_of_features(student, prototypes, teacher, teacher_prototypes):
    return plain_losses.plain_dino_of_features_loss(student, teacher, prototypes, teacher_prototypes)


def sampled_softmax(query, item, candidates, log_q):
    return ssl_kernels.sampled_softmax_loss(query, item, candidates, temperature=0.05, log_q=log_q)


def siglip(images, texts):
    return ssl_kernels.siglip_loss(images, texts, 10.0, -10.0)


def plain_siglip(images, texts):
    x, y = torch.nn.functional.normalize(images, dim=1), torch.nn.functional.normalize(texts, dim=1)
    logits = 10 * x @ y.T - 10
    signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(x)


def plain_of_widths(images, texts, scale):
    return sum(plain_losses.plain_clip_loss(images[:, :w], texts[:, :w], scale) for w in WIDTHS)


def square(n):
    """Products of rows with themselves: the matrix is symmetric, and its gradient is of one operand."""
    return 1.5 * n * n


def square_of_views(n):
    return square(2 * n)


def rectangle(columns):
    """Of N rows and `columns` · N others that all get a gradient."""
    return lambda n: 3 * columns * n * n


def of_prototypes(views, teachers):
    """Of crops with the prototypes, those of the teacher once."""
    return lambda n: (3 * views + teachers) * n * PROTOTYPES


def of_features(products):
    """Of N rows of F features, their matrix F x F: `products` products of N · F · F, or of N · N · F for few rows."""
    return lambda n: products * n * min(n, WIDE)


def function(name):
    return getattr(ssl_kernels, name), getattr(plain_losses, f"plain_{name}")


def views_matrix(n):
    return 4 * n * n


PAIRS = {"least": 2, "most": BATCH_SIZES[-1] // 2, "products": square_of_views, "logits": views_matrix}
LOSSES = (
    Compared("nt_xent", ssl_kernels.nt_xent_loss, plain_nt_xent_loss, rows(1, 1), **PAIRS),
    Compared("debiased_nt_xent", *function("debiased_nt_xent_loss"), rows(1, 1), **PAIRS),
    Compared("dcl", *function("dcl_loss"), rows(1, 1), **PAIRS),
    Compared("info_nce", *function("info_nce_loss"), rows(1, 1, 1), products=rectangle(1)),
    Compared(
        "moco",
        ssl_kernels.moco_loss,
        plain_losses.plain_moco_loss,
        with_queue,
        without_gradient=2,
        products=lambda n: 2 * n * QUEUE,
        logits=lambda n: n * QUEUE,
    ),
    Compared("clip", *function("clip_loss"), image_and_text, products=rectangle(1)),
    Compared(
        "matryoshka(clip)",
        ssl_kernels.matryoshka(ssl_kernels.clip_loss, WIDTHS),
        plain_of_widths,
        image_and_text,
        products=lambda n: 3 * n * n * sum(WIDTHS) / DIM,
    ),
    Compared("siglip", siglip, plain_siglip, rows(1, 1), products=rectangle(1)),
    Compared("sup_con", *function("sup_con_loss"), classes, products=square),
    Compared("imix", *function("imix_loss"), mixed, products=rectangle(1)),
    Compared(
        "triplet, batch-hard",
        ssl_kernels.triplet_loss,
        peers.plain_triplet_loss,
        labelled,
        least=8,
        products=lambda n: n * n / 2,
    ),
    Compared(
        "triplet, soft margin",
        partial(ssl_kernels.triplet_loss, margin="soft"),
        plain_losses.plain_soft_margin_triplet_loss,
        labelled,
        least=8,
        products=lambda n: n * n / 2,
    ),
    Compared(
        "triplet, semi-hard",
        partial(ssl_kernels.triplet_loss, mining="semi_hard"),
        lambda x, labels: plain_losses.plain_semi_hard_triplet_loss(x, ROWS_OF_A_LABEL),
        labelled,
        least=8,
        compares_gradients=False,
    ),
    Compared("triplet_margin", *function("triplet_margin_loss"), rows(1, 1, 1)),
    Compared("byol", *function("byol_loss"), rows(1, 1), without_gradient=1),
    Compared(
        "similarity_cross_entropy",
        partial(ssl_kernels.similarity_cross_entropy, scale=20.0),
        plain_losses.plain_similarity_cross_entropy,
        with_targets,
        products=rectangle(1),
    ),
    Compared(
        "multiple_negatives_ranking, a hard negative",
        *function("multiple_negatives_ranking_loss"),
        rows(1, 1, 1),
        products=rectangle(2),
        logits=lambda n: 2 * n * n,
    ),
    Compared(
        "multiple_negatives_ranking, four directions",
        partial(ssl_kernels.multiple_negatives_ranking_loss, directions=DIRECTIONS),
        plain_losses.plain_ranking_in_all_directions,
        rows(1, 1),
        **PAIRS,
    ),
    Compared(
        "sampled_softmax",
        sampled_softmax,
        plain_losses.plain_sampled_softmax_loss,
        sampled,
        products=rectangle(2),
        logits=lambda n: 2 * n * n,
    ),
    Compared(
        "mil_nce",
        *function("mil_nce_loss"),
        clips,
        products=rectangle(2),
        most=BATCH_SIZES[-1] // 2,
        logits=views_matrix,
    ),
    Compared(
        "distillation",
        *function("distillation_loss"),
        rows(1, 1, 1, 1),
        without_gradient=2,
        products=lambda n: 4 * n * n,
    ),
    Compared("uniformity", *function("uniformity_loss"), rows(1), least=2, products=square),
    Compared("alignment", *function("alignment_loss"), rows(1, 1)),
    Compared("koleo", *function("koleo_loss"), rows(1), least=2, products=lambda n: n * n / 2),
    Compared(
        f"swav, {PROTOTYPES} prototypes",
        *function("swav_loss"),
        crops(CROPS, PROTOTYPES),
        products=of_prototypes(CROPS, 0),
        logits=lambda n: CROPS * n * PROTOTYPES,
    ),
    Compared(
        f"swav, {FEW_PROTOTYPES} prototypes",
        *function("swav_loss"),
        crops(2 * CROPS, FEW_PROTOTYPES),
        logits=lambda n: 2 * CROPS * n * FEW_PROTOTYPES,
    ),
    Compared(
        "dino",
        *function("dino_loss"),
        logits_of_crops,
        without_gradient=1,
        logits=lambda n: CROPS * n * PROTOTYPES,
    ),
    Compared(
        "dino of features",
        dino_of_features,
        plain_dino_of_features,
        features_of_crops,
        without_gradient=2,
        products=of_prototypes(CROPS, 2),
        logits=lambda n: CROPS * n * PROTOTYPES,
    ),
    Compared(
        "barlow_twins", *function("barlow_twins_loss"), rows(1, 1), dim=WIDE, least=2, products=of_features(3)
    ),
    Compared("vicreg", *function("vicreg_loss"), rows(1, 1), dim=WIDE, least=2, products=of_features(4)),
    Compared("mae", *function("mae_loss"), rows(1, 1), dim=PIXELS, without_gradient=1),
)


def workloads(options):
    """Functions that make the workloads `options` ask for: of each loss those of one thread and those of two."""
    sizes = options.batch_sizes or (QUICK_BATCH_SIZES if options.quick else BATCH_SIZES)
    counts = (options.threads,) if options.threads else THREADS

    def maker(loss, batch_size, threads):
        return lambda: loss(batch_size, threads, options.dim, options.dtype, options.device)

    return [
        maker(loss, size, threads)
        for loss in LOSSES
        for threads in counts
        for size in sorted(sizes)
        if loss.least <= size <= loss.most
    ]
