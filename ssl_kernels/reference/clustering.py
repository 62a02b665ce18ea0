"""What losses of prototypes and of correlations are made of where the backend is "reference"."""

import torch

from ssl_kernels.reference.products import product


def potentials(logits, iterations):
    """What Sinkhorn's iterations on exp(logits) add to the columns' logits before the last scaling of the rows."""
    added = torch.zeros_like(logits[0])
    for step in range(iterations):
        scaled = torch.log_softmax(logits + added, 1) - added if step else logits
        added = -torch.logsumexp(scaled, 0)
        added = added - added.max()
    return added


def diagonal_of(matrix):
    """A copy of the diagonal, of which torch.compile may keep nothing but the copy for backward.

    Of matrix.diagonal() it keeps the view and the matrix, and with inductor backward writes into the one and then
    reads the other (seen with torch 2.14).
    """
    places = torch.arange(matrix.shape[0], device=matrix.device)
    return matrix[places, places]


def cross_correlation(z0, z1, eps):
    """(1 − c_dd)² and Σ_{j ≠ d} c_dj² of each feature d, c the correlation of the features of two views."""
    first, second = ((z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt() for z in (z0, z1))
    correlation = product(first.T, second) / z0.shape[0]
    on_diagonal = diagonal_of(correlation)
    return (1 - on_diagonal).square(), correlation.square().sum(1) - on_diagonal.square()


def moments(z):
    """The variance of each feature, and the sum of its squared covariances with the others."""
    centred = z - z.mean(0)
    covariance = product(centred.T, centred) / (z.shape[0] - 1)
    variance = diagonal_of(covariance)
    return variance, covariance.square().sum(1) - variance.square()
