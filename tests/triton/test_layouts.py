"""The Triton kernels take their tensors in every memory layout; copies of them, broken at one place, are noticed."""

import importlib
import importlib.util

import pytest
import torch

from tests.gpu_emulation import PtxError, emulated_triton
from tests.helpers import DTYPES
from tests.layouts import check, operators
from tests.triton.mutation import load


def operation_of(name):
    return name.removesuffix("_fwd").removesuffix("_bwd").removesuffix("_")


ON_GPU = [
    name for name in operators() if importlib.util.find_spec(f"ssl_kernels.triton.{operation_of(name)}")
]

FAR_APART = ("far apart", "half as far apart", "columns half as far apart")


def run(name, *args):
    return getattr(importlib.import_module(_module(name)), name)(*args)


def _module(name):
    return f"ssl_kernels.triton.{operation_of(name)}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ON_GPU)
def test_layouts_of_side_inputs_change_no_bit(gpu, operator, dtype):
    with gpu.triton():
        seen = check(run, operator, dtype, gpu.device, main=FAR_APART if dtype == torch.float16 else [])
    assert seen == set(operators()[operator]), "a tensor that no call has"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ON_GPU)
def test_layouts_change_no_result(gpu, operator, dtype):
    with gpu.triton(seed=1):
        check(run, operator, dtype, gpu.device, unaligned=True)


# Of what each operator reads: strides of side inputs, and 32 bits where 64 are needed.
ROW = ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)")
STRIDE = ("stride_x = stride_x.to(tl.int64) * VECTOR", "stride_x = stride_x * VECTOR")
FWD, BWD, GRAD, LOSS = "_fwd_kernel(", "_bwd_kernel(", "_grad_kernel(", "_loss_kernel("
MUTATIONS = [
    ("contrastive_fwd", "contrastive", "positives = positives.contiguous()", "pass"),
    ("contrastive_fwd", "contrastive", "contiguous(call.row_ids)", "call.row_ids", "contrastive_fwd_kernel[panel"),
    ("contrastive_fwd", "contrastive", "contiguous(column_ids)", "column_ids", "contrastive_fwd_kernel[panel"),
    ("contrastive_fwd", "contrastive", "contiguous(call.row_bias)", "call.row_bias", "contrastive_fwd_kernel[panel"),
    ("contrastive_fwd", "contrastive", "contiguous(call.row_limit)", "call.row_limit", "contrastive_fwd_kernel[panel"),
    ("contrastive_fwd", "contrastive", "flags.contiguous().view", "flags.view"),
    ("contrastive_bwd", "contrastive", "reshape(rows.shape[0], -1).contiguous()", "reshape(rows.shape[0], -1)"),
    ("contrastive_bwd", "contrastive", "reshape(positives.shape).contiguous()", "reshape(positives.shape)"),
    ("contrastive_bwd", "contrastive", "grad_lse.contiguous()", "grad_lse"),
    ("contrastive_bwd", "contrastive", "lse.contiguous(),", "lse,", "softmax_weight_kernel["),
    ("contrastive_bwd", "contrastive", "call.row_rnorm.contiguous() if", "call.row_rnorm if", "row_side = Side("),
    ("contrastive_fwd", "common", "rows.to(tl.int64)[:, None] * stride_n", "rows[:, None] * stride_n"),
    ("contrastive_fwd", "common", "features.to(tl.int64)[None, :] * stride_d", "features[None, :] * stride_d"),
    ("sigmoid_pairs_fwd", "sigmoid_pairs", "contiguous(ids)", "ids"),
    ("sigmoid_pairs_bwd", "sigmoid_pairs", ".to(scale.dtype).contiguous()", ".to(scale.dtype)"),
    ("sigmoid_pairs_fwd", "common", "rows.to(tl.int64)[:, None] * stride_n", "rows[:, None] * stride_n"),
    ("batch_hard", "batch_hard", "labels.contiguous()", "labels"),
    ("batch_hard", "common", "rows.to(tl.int64)[:, None] * stride_n", "rows[:, None] * stride_n"),
    ("row_pairs_bwd", "row_pairs", "saved = grad_values.contiguous(),", "saved = grad_values,"),
    ("row_pairs_bwd", "row_pairs", "saved.contiguous()", "saved"),
    ("row_pairs_fwd", "row_pairs", *ROW, FWD),
    ("row_pairs_bwd", "row_pairs", *ROW, BWD),
    ("row_pairs_fwd", "row_pairs", "d.to(tl.int64) * stride_d", "d * stride_d"),
    ("queue_push_", "queue_push", "tl.program_id(0).to(tl.int64) + first", "tl.program_id(0) + first"),
    ("queue_push_", "queue_push", "(d0 + tl.arange(0, BLOCK_D)).to(tl.int64)", "d0 + tl.arange(0, BLOCK_D)", "eps = "),
    ("mixup_fwd", "permutation_walk", "lam_ptr + j.to(tl.int64) * lam_stride", "lam_ptr + j"),
    ("mixup_fwd", "permutation_walk", "lam_ptr + j.to(tl.int64) * lam_stride", "lam_ptr + j * lam_stride"),
    ("mixup_bwd", "permutation_walk", "lam_ptr + successor.to(tl.int64) * lam_stride", "lam_ptr + successor"),
    ("mixup_fwd", "permutation_walk", "permutation_ptr + j.to(tl.int64) * stride", "permutation_ptr + j", "faults = 0"),
    ("mixup_fwd", "permutation_walk", "j.to(tl.int64) * stride", "j * stride", "faults = 0"),
    ("mixup_fwd", "mixup", *STRIDE, "mixup_walk_kernel("),
    ("mixup_", "mixup", "stride_out = stride_out.to(tl.int64) * VECTOR", "stride_out = stride_out * VECTOR"),
    ("mixup_bwd", "mixup", "stride_grad = stride_grad.to(tl.int64) * VECTOR", "stride_grad = stride_grad * VECTOR"),
    ("mixup_bwd", "mixup", *STRIDE, "mixup_grad_kernel("),
    ("mixup_normalize", "mixup_normalize", "std_ptr + channel * stride_std", "std_ptr + channel * stride_mean"),
    ("mixup_normalize", "mixup_normalize", "mean_ptr + channel * stride_mean", "mean_ptr + channel"),
    ("mixup_normalize", "mixup_normalize", "stride_x.to(tl.int64) * VECTOR_X", "stride_x * VECTOR_X"),
    ("cutmix_fwd", "cutmix", "sample.to(tl.int64) * stride_box", "sample.to(tl.int64) * 4"),
    ("cutmix_fwd", "cutmix", "tl.load(box_ptr + stride_end)", "tl.load(box_ptr + 1)"),
    ("cutmix_fwd", "cutmix", "source_ptr + i * stride_source", "source_ptr + i"),
    ("cutmix_fwd", "cutmix", "i = i.to(tl.int64)", "i = i"),
    ("cutmix_fwd", "cutmix", *STRIDE, "def cutmix_gather_kernel("),
    ("cutmix_", "cutmix", *STRIDE, "def cutmix_walk_kernel("),
    ("mixup_cross_entropy_fwd", "mixup_cross_entropy", "lam_ptr + row * stride_lam", "lam_ptr + row"),
    ("mixup_cross_entropy_fwd", "mixup_cross_entropy", "partner_ptr + row * stride_partner", "partner_ptr + row"),
    ("mixup_cross_entropy_fwd", "mixup_cross_entropy", "target.contiguous()", "target"),
    ("mixup_cross_entropy_fwd", "mixup_cross_entropy", "weight = weight.contiguous()", "weight = weight"),
    ("mixup_cross_entropy_fwd", "mixup_cross_entropy", *ROW, LOSS),
    ("mixup_cross_entropy_fwd", "mixup_cross_entropy", "stride_row.to(tl.int64) * VECTOR", "stride_row * VECTOR", LOSS),
    ("mixup_cross_entropy_bwd", "mixup_cross_entropy", "grad_loss_ptr + row * stride_grad_loss", "grad_loss_ptr + row"),
    ("mixup_cross_entropy_bwd", "mixup_cross_entropy", *ROW, GRAD),
    ("mixup_cross_entropy_bwd", "mixup_cross_entropy", "stride_row.to(tl.int64) * VECTOR", "stride_row * VECTOR", GRAD),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda mutation: f"{mutation[0]}: {mutation[2]} -> {mutation[3]}"
)
def test_mutation_is_noticed(tmp_path, monkeypatch, mutation):
    monkeypatch.syspath_prepend(tmp_path)
    operator, *change = mutation
    broken = load(tmp_path, operation_of(operator), *change)

    def run_broken(name, *args):
        # What a backward takes comes from the forward as it is.
        return getattr(broken if name == operator else importlib.import_module(_module(name)), name)(*args)

    with emulated_triton(80), pytest.raises((AssertionError, PtxError)):
        check(run_broken, operator, torch.float64, main=FAR_APART)
