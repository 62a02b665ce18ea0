"""The arguments of the operators that have many, in the order of their schemas: what each backend's function is handed.

docs/contrastive.md and docs/sigmoid_pairs.md say what they are.
"""

from typing import NamedTuple

from torch import Tensor


class ContrastiveForward(NamedTuple):
    rows: Tensor
    columns: Tensor | None
    scale: Tensor
    positives: Tensor | None
    row_ids: Tensor | None
    column_ids: Tensor | None
    normalize_rows: bool
    normalize_columns: bool
    keep_diagonal: bool
    both_directions: bool
    keep: bool
    columns_need_grad: bool
    column_bias: Tensor | None = None
    row_bias: Tensor | None = None
    row_limit: Tensor | None = None
    exempt: Tensor | None = None
    only_equal_ids: bool = False
    equal_weights: bool = False  # for the kernel of the CPU

    @property
    def wants_expectation(self):
        """Whether `kept` is to be the expectation of the columns, where a backend keeps one."""
        frozen = self.columns is not None and not self.columns_need_grad
        return self.keep and frozen and not self.both_directions


class ContrastiveBackward(NamedTuple):
    grad_lse: Tensor | None
    grad_column_lse: Tensor | None
    grad_positive_logits: Tensor | None
    rows: Tensor
    columns: Tensor | None
    scale: Tensor
    positives: Tensor | None
    row_ids: Tensor | None
    column_ids: Tensor | None
    lse: Tensor
    column_lse: Tensor
    row_rnorm: Tensor
    column_rnorm: Tensor
    kept: Tensor
    normalize_rows: bool
    normalize_columns: bool
    keep_diagonal: bool
    both_directions: bool
    rows_need_grad: bool
    columns_need_grad: bool
    column_bias: Tensor | None = None
    row_bias: Tensor | None = None
    row_limit: Tensor | None = None
    exempt: Tensor | None = None
    only_equal_ids: bool = False
    column_bias_needs_grad: bool = False
    row_bias_needs_grad: bool = False


class SigmoidPairsForward(NamedTuple):
    rows: Tensor
    columns: Tensor
    scale: Tensor
    bias: Tensor
    diagonal: int
    normalize_rows: bool
    normalize_columns: bool
    total: bool
    keep: bool
    rows_need_grad: bool
    columns_need_grad: bool
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    equal_ids_are_positive: bool = False


class SigmoidPairsBackward(NamedTuple):
    grad_losses: Tensor
    rows: Tensor
    columns: Tensor
    scale: Tensor
    bias: Tensor
    diagonal: int
    normalize_rows: bool
    normalize_columns: bool
    rows_need_grad: bool
    columns_need_grad: bool
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    equal_ids_are_positive: bool = False
