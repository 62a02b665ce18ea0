"""i-Mix and MixCo: queries of mixed inputs with two weighted positives."""

import torch

from ssl_kernels.checks import (
    check_floating,
    check_fraction,
    check_ids,
    check_lam,
    check_permutation,
    check_reduction,
    check_scalar,
    check_shape,
    values_are_readable,
)
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import (
    checked_rows,
    inverse,
    inverse_operand,
    native_row_losses,
    number_operand,
    reduce,
    rows_for_several,
    takes_row_losses,
)
from ssl_kernels.losses._softmax import is_one_node, one_node
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import savable

OP = "imix_loss"


def imix_loss(
    query: torch.Tensor,
    key: torch.Tensor,
    permutation: torch.Tensor,
    lam: float | torch.Tensor,
    temperature: float | torch.Tensor = 0.2,
    *,
    negative_keys: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """i-Mix: each query of a mixed input against all keys, with two positives weighted as the inputs were mixed.

        loss_i = λ_i CE_i(i) + (1 − λ_i) CE_i(perm(i)),  CE_i(j) = log Σ_k exp(s_ik) − s_ij,
        s_ij = <query_i, key_j> / temperature

    for query_i = f(λ_i x_i + (1 − λ_i) x_perm(i)) and key_j = g(x_j): i-Mix and, with negative_keys from a queue,
    i-Mix on MoCo and MixCo. CE is linear in its target: one log-sum-exp less λ_i s_ii + (1 − λ_i) s_i,perm(i).

    Args:
        query, key: (N, D) each. float64, float32, float16 or bfloat16, any strides. Under autocast they may differ
            in dtype; the widest is used.
        permutation: (N,) integers, a permutation of 0 ... N − 1: with whom each input was mixed.
        lam: λ, a float in [0, 1] or a floating tensor of such, (N,) or of one element: the part of the input itself. It
            gets its gradient.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        negative_keys: (M, D) more columns that are nobody's positive, as a queue's, or None.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the N queries, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: An argument is no tensor of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, lam outside [0, 1],
            indices that are not a permutation, an unknown reduction or backend, or a backend that cannot run this
            call. The values of permutation and lam are looked at on the CPU outside of torch.compile only: elsewhere
            that would have to wait for the device.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Lee et al., i-Mix, arXiv:2010.08887; Kim et al., MixCo, arXiv:2010.06300.
    """
    rows = {"query": query, "key": key, "negative_keys": negative_keys}
    query, key, negative_keys = checked_rows(OP, 2, optional="negative_keys", **rows)
    check_scalar(OP, "temperature", temperature, query, positive=True)
    check_reduction(OP, reduction, row_weights, query.shape[0], query)
    _check_mixing(query, permutation, lam)
    if isinstance(lam, torch.Tensor):
        lam = savable(lam.reshape(()) if lam.numel() == 1 else lam).double()
    by_tensor = (lam,) if isinstance(lam, torch.Tensor) else ()
    is_total = negative_keys is None and row_weights is None and reduction != "none"
    if is_total and is_one_node(backend, OP, reduction, row_weights, query, key, permutation, lam):
        share = lam if by_tensor else torch.scalar_tensor(float(lam), dtype=torch.float64, device="cpu")
        options = {
            "positives": permutation.long(),
            "numbers": share,
            "normalize": normalize,
            "reduction": reduction,
        }
        return one_node(query, key, inverse_operand(temperature, query), **options)[0]

    index = torch.arange(query.shape[0], device=query.device)
    options = {
        "normalize_rows": normalize,
        "normalize_columns": normalize,
        "backend": backend,
        "caller": OP,
    }
    scale = inverse(temperature, query)
    if negative_keys is not None:
        query = rows_for_several(query, backend, OP)
    positives = torch.stack((index, permutation.long()), 1)  # (N, 2)
    lse, _, logits = contrastive(query, key, scale, positives=positives, equal_weights=is_total, **options)
    if negative_keys is not None:
        lse = torch.logaddexp(lse, contrastive(query, negative_keys, scale, **options).lse)
    if takes_row_losses(backend, OP, query, lse, *by_tensor):
        share = by_tensor or (torch.scalar_tensor(float(lam), dtype=torch.float64, device=lse.device),)
        return native_row_losses("mixed", (lse, logits, *share), reduction, query, row_weights)
    own, partner = (lse - logit for logit in logits.unbind(1))  # neither is below 0
    loss = lam * own + (1 - number_operand(lam, query)) * partner
    return reduce(loss, reduction, query, row_weights)


imix_loss.operation = "contrastive"


def _check_mixing(query, permutation, lam):
    n = query.shape[0]
    check_ids(OP, "permutation", permutation, (n,), query)
    if values_are_readable(permutation):
        check_permutation(OP, permutation.long())
    if not isinstance(lam, torch.Tensor):
        check_fraction(OP, "lam", lam)
        return
    check_shape(OP, "lam", lam, lam.shape if lam.numel() == 1 else (n,), query)
    check_floating(OP, "lam", lam)
    if values_are_readable(lam):
        check_lam(OP, lam.reshape(-1))


class IMixLoss(Loss):
    """`ssl_kernels.imix_loss` as a module: `IMixLoss(temperature=0.2)(query, key, permutation, lam)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `imix_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.2,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        permutation: torch.Tensor,
        lam: float | torch.Tensor,
        *,
        negative_keys: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return imix_loss(
            query, key, permutation, lam, negative_keys=negative_keys, row_weights=row_weights, **self.options
        )
