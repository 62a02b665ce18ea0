"""MIL-NCE: several candidate positives per row, of which any may be right."""

import torch

from ssl_kernels.checks import check_embeddings, check_reduction, check_scalar, check_tensor, shape_error
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import (
    infinite_as_nan,
    inverse,
    inverse_operand,
    minus_log_sigmoid,
    reduce,
    widest_under_autocast,
)
from ssl_kernels.losses._softmax import is_one_node, one_node
from ssl_kernels.ops.contrastive import contrastive

OP = "mil_nce_loss"


def mil_nce_loss(
    query: torch.Tensor,
    keys: torch.Tensor,
    temperature: float | torch.Tensor = 0.07,
    *,
    symmetric: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """MIL-NCE: the exponentials of a query's several keys are added up, so that one good key is enough.

        loss_i = −log( Σ_p exp(s_i,ip) / (Σ_p exp(s_i,ip) + Σ_{j ≠ i, p} exp(s_i,jp) + Σ_{j ≠ i, p} exp(s_j,ip)) )

    with s_i,jp = <query_i, keys_jp> / temperature: the negatives are the other queries' keys, and the other queries
    against the own keys. Each pair is counted once. (The authors' code has the own pairs in the sum twice.)

    Args:
        query: (N, D), float64, float32, float16 or bfloat16, any strides: clips.
        keys: (N, P, D), dtype and device of query: P candidates of each query, as the narrations around a clip.
        temperature: > 0, a float or a tensor of one element, which gets its gradient. The paper's is 1, without
            normalisation.
        symmetric: Whether the other queries against the own keys are among the negatives, as in the paper.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the N queries, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none". Without another query the loss is 0.

    Raises:
        TypeError: query or keys is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, an unknown reduction
            or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Miech et al., End-to-End Learning of Visual Representations from Uncurated Instructional Videos,
    arXiv:1912.06430, eq. 1.
    """
    query, keys = widest_under_autocast(query, keys)
    check_embeddings(OP, query=query)
    check_tensor(OP, "keys", keys)
    n, width = query.shape
    if keys.dim() != 3 or keys.shape[0] != n or keys.shape[2] != width or keys.shape[1] == 0:
        raise shape_error(OP, "keys", f"({n}, P, {width}) with P >= 1", keys)
    check_embeddings(OP, query=query, keys=keys[0])
    check_scalar(OP, "temperature", temperature, query, positive=True)
    check_reduction(OP, reduction, row_weights, n, query)
    if is_one_node(backend, OP, reduction, row_weights, query, keys, temperature):
        scale = inverse_operand(temperature, query)
        options = {"both_directions": symmetric, "normalize": normalize, "reduction": reduction}
        return one_node(query, keys.reshape(-1, width), scale, joint=True, **options)[0]
    each = keys.shape[1]
    own = torch.arange(n, device=query.device)
    lse, key_lse, positive = contrastive(
        query,
        keys.reshape(-1, width),
        inverse(temperature, query),
        positives=own[:, None] * each + torch.arange(each, device=query.device),
        row_ids=own,
        column_ids=own.repeat_interleave(each),
        normalize_rows=normalize,
        normalize_columns=normalize,
        both_directions=symmetric,
        backend=backend,
        caller=OP,
    )
    negatives = lse
    if symmetric:
        negatives = torch.cat((lse[:, None], key_lse.view(n, each)), 1)
        # Alone in its batch a query has none, and log-sum-exp of -inf alone no gradient.
        none = (negatives == -torch.inf).all(1)
        negatives = negatives.masked_fill(none[:, None], 0).logsumexp(1).masked_fill(none, -torch.inf)
    margin = infinite_as_nan(positive.logsumexp(1)) - infinite_as_nan(negatives)
    return reduce(minus_log_sigmoid(margin), reduction, query, row_weights)


mil_nce_loss.operation = "contrastive"


class MILNCELoss(Loss):
    """`ssl_kernels.mil_nce_loss` as a module: `MILNCELoss(temperature=0.07)(query, keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        symmetric, normalize, reduction, backend: As in `mil_nce_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        *,
        symmetric: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return mil_nce_loss(query, keys, row_weights=row_weights, **self.options)
