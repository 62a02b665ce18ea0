"""What Python and C++ must agree on. Numbers the extension tells; without one there are those of Python."""

from ssl_kernels.backends import extension

try:
    _built = {} if extension is None else extension.build_info()
except (RuntimeError, ValueError):  # an unknown SSL_KERNELS_CPU, which is an error of the first call
    _built = {}

# A row shorter than this is divided by it, as F.normalize does.
NORM_EPS = _built.get("norm_eps", 1e-12)

# What `kept` of the native CPU kernel of `contrastive` shows: the kept logits lie in its storage behind that, as many
# as the budget of the process had left.
KEPT_HEADER = _built.get("kept_header", 16)


def holds_expectation(kept):
    """Whether `kept`, which a forward of `contrastive` hands to its backward, is the expectation of the columns.

    That alone has two dimensions, (N, D). (0,) is nothing; any other shape is read by the kernel that made it.
    """
    return kept.dim() == 2
