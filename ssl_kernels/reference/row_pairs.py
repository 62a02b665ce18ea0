"""`row_pairs` by its definition."""

import torch
import torch.nn.functional as F


def row_pairs(x, y, z=None, normalize=True, measure="product"):
    """m(x_i, y_i), less m(x_i, z_i) where there is a z; docs/row_pairs.md is the contract.

    Args:
        x, y, z: (N, D) floating; z may be None.
        normalize: L2-normalise the rows first.
        measure: "product", <x̂, ŷ>, or "distance", ‖x̂ − ŷ‖₂.

    Returns:
        (N,), the dtype of x.
    """
    x, *others = (F.normalize(rows, dim=1) if normalize else rows for rows in (x, y, z) if rows is not None)
    if measure == "product":
        measures = [(x * other).sum(1) for other in others]
        if normalize:  # without what rounding left beyond ±1; the gradient is that of the product
            measures = [m - (m.detach() - m.detach().clamp(-1, 1)) for m in measures]
    else:
        measures = [torch.linalg.vector_norm(x - other, dim=1) for other in others]
    return measures[0] - measures[1] if z is not None else measures[0]
