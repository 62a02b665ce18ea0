"""The logits of each row with its own key."""

from ssl_kernels.losses._rows import row_dots
from ssl_kernels.ops.row_pairs import row_pairs


def positive_logits(call, query, key, scale, normalize):
    """scale · <q̂_i, k̂_i>, (n,) float64, also of no rows."""
    if not query.shape[0]:
        return scale.double() * row_dots(query, key)
    options = {"normalize": normalize, "backend": call.backend, "caller": call.op}
    return scale * row_pairs(query, key, measure="product", **options)
