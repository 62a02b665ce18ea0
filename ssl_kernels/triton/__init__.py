"""Triton backend. `contrastive` and `common` import triton, `tiles` does not."""
