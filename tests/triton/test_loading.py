"""A kernel that a CUDA graph would have to load is refused before, with what to do."""

import pytest
import torch
import triton
import triton.language as tl

from ssl_kernels.ops.operation import in_triton


@triton.jit
def _somebody_elses_kernel(out_ptr):
    tl.store(out_ptr, 1.0)


def test_a_first_call_inside_a_capture_says_what_to_do(gpu, monkeypatch):
    if not gpu.emulated:
        pytest.skip("tests/test_card.py captures")
    x, lam = torch.rand(6, 11), torch.rand(6)
    order = torch.arange(6).roll(1)
    expected = lam[:, None] * x + (1 - lam)[:, None] * x[order]
    with gpu.triton():
        _forget_loaded_kernels()
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_available", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            for _ in range(2):
                with pytest.raises(
                    RuntimeError, match=r"Triton kernel successor_kernel must be loaded before"
                ):
                    in_triton["mixup_fwd"](x, lam, order)
            out = torch.zeros(1)
            _somebody_elses_kernel[1,](out)
            assert out.item() == 1
        torch.testing.assert_close(in_triton["mixup_fwd"](x, lam, order), expected)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        torch.testing.assert_close(in_triton["mixup_fwd"](x, lam, order), expected)


def _forget_loaded_kernels():
    from ssl_kernels.triton import mixup, permutation_walk

    walk = permutation_walk
    orders = (walk.successor_kernel, walk.order_kernel, walk.order_block_kernel)
    for kernel in (*orders, mixup.mixup_walk_kernel):
        kernel.device_caches.clear()
