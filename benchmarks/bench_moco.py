"""Workloads of MoCo's loss against a queue: each maps (B, D, dtype, device) to a `Workload`."""

import torch
import torch.nn.functional as F

import ssl_kernels
from benchmarks.bench_contrastive import TOLERANCES, our_implementations
from benchmarks.harness import Implementation, Workload, loss_and_gradients
from benchmarks.peers import compiled

BATCH_SIZES = (64, 256)
QUICK_BATCH_SIZES = (256,)
QUEUE_SIZE = 65536
TEMPERATURE = 0.07


def plain_info_nce(query, key, queue):
    """InfoNCE against a queue through concatenated logits (B, 1 + K), as MoCo's code writes it."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.to(query.dtype).T], dim=1)
    targets = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits / TEMPERATURE, targets)


def _moco(loss, batch_size, dim, dtype, queue_dtype, device):
    torch.manual_seed(batch_size)
    query = torch.randn(batch_size, dim).to(device, dtype).requires_grad_()
    key = torch.randn(batch_size, dim).to(device, dtype)
    queue = F.normalize(torch.randn(QUEUE_SIZE, dim), dim=1).to(device, queue_dtype)
    inputs = (query, key, queue)
    logits_bytes = batch_size * QUEUE_SIZE * dtype.itemsize

    def expected():
        wide = dtype if dtype == torch.float64 else torch.float32
        wide_inputs = (query.detach().to(wide).requires_grad_(), key.to(wide), queue.to(wide))
        return loss_and_gradients(plain_info_nce, wide_inputs)

    def on_backend(backend):
        return lambda q, k, negatives: ssl_kernels.moco_loss(q, k, negatives, TEMPERATURE, backend=backend)

    return Workload(
        loss=loss,
        sizes={"B": batch_size, "D": dim, "K": QUEUE_SIZE},
        inputs=inputs,
        implementations=[
            Implementation("plain PyTorch", plain_info_nce, baseline=True, extra_bytes=5 * logits_bytes),
            Implementation(
                "torch.compile", compiled(plain_info_nce), baseline=True, extra_bytes=5 * logits_bytes
            ),
            *our_implementations(ssl_kernels.moco_loss, inputs, on_backend),
        ],
        expected=expected,
        tolerance=TOLERANCES[dtype],
        operations=4 * batch_size * QUEUE_SIZE * dim,
        bytes_moved=queue.nbytes + 2 * query.nbytes + key.nbytes,
    )


def moco(batch_size, dim, dtype, device):
    """Queries against a queue of their dtype: two products of 2·B·K·D operations, one read of the queue."""
    return _moco("moco", batch_size, dim, dtype, dtype, device)


def moco_bfloat16_queue(batch_size, dim, dtype, device):
    """The same against a queue held in bfloat16."""
    return _moco("moco_bfloat16_queue", batch_size, dim, dtype, torch.bfloat16, device)


def workloads(options):
    """Functions that make the workloads that `options` ask for, by rising size."""
    losses = (moco,) if options.dtype in (torch.float64, torch.bfloat16) else (moco, moco_bfloat16_queue)
    sizes = options.batch_sizes or (QUICK_BATCH_SIZES if options.quick else BATCH_SIZES)
    dim = options.dim or 128
    return [
        lambda loss=loss, size=size: loss(size, dim, options.dtype, options.device)
        for loss in losses
        for size in sorted(sizes)
    ]
