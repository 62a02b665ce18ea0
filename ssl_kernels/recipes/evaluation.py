"""What frozen features are worth: nearest neighbours and linear probes, for any encoder.

Features are (N, F) tensors with labels (N,); accuracies are fractions of the test rows.
"""

import dataclasses

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NEIGHBOURS = 5
FEW_LABELS = 5  # per class
DRAWS = 5  # of the few labels, over which the accuracy is averaged


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """knn: by the nearest neighbours. linear: by a linear probe. few: by one that sees few labels per class."""

    knn: float
    linear: float
    few: float


@torch.no_grad()
def extract_features(encoder, batches):
    """(features, labels) of all `batches` of (images, labels), on the CPU, the encoder in evaluation mode."""
    weight = next(encoder.parameters(), None)
    device, dtype = ("cpu", torch.float32) if weight is None else (weight.device, weight.dtype)
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for images, batch_labels in batches:
        features.append(encoder(images.to(device, dtype)).float().cpu())
        labels.append(batch_labels)
    encoder.train(was_training)
    return torch.cat(features), torch.cat(labels)


def evaluate_features(train, test):
    """`Accuracy` of `train` = (features, labels) on `test` = (features, labels)."""
    return Accuracy(
        knn=knn_accuracy(*train, *test),
        linear=linear_probe_accuracy(*train, *test),
        few=few_label_accuracy(*train, *test),
    )


def knn_accuracy(train_features, train_labels, test_features, test_labels, neighbours=NEIGHBOURS):
    """Accuracy of a majority vote of the nearest training rows by cosine similarity."""
    classifier = KNeighborsClassifier(min(neighbours, len(train_labels)), metric="cosine")
    classifier.fit(train_features.numpy(), train_labels.numpy())
    return float(classifier.score(test_features.numpy(), test_labels.numpy()))


def linear_probe_accuracy(train_features, train_labels, test_features, test_labels):
    """Accuracy of a logistic regression on standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train_features.numpy(), train_labels.numpy())
    return float(classifier.score(test_features.numpy(), test_labels.numpy()))


def few_label_accuracy(
    train_features, train_labels, test_features, test_labels, labels_per_class=FEW_LABELS, draws=DRAWS
):
    """Mean accuracy over `draws` of a linear probe that sees `labels_per_class` labelled rows of each class.

    All training rows, labelled or not, serve to standardise the features. Every call makes the same draws.
    """
    scaler = StandardScaler().fit(train_features.numpy())
    train_rows, test_rows = scaler.transform(train_features.numpy()), scaler.transform(test_features.numpy())
    accuracies = []
    for draw in range(draws):
        chosen = draw_per_class(train_labels.numpy(), labels_per_class, seed=draw)
        classifier = LogisticRegression(max_iter=1000).fit(train_rows[chosen], train_labels.numpy()[chosen])
        accuracies.append(classifier.score(test_rows, test_labels.numpy()))
    return float(np.mean(accuracies))


def draw_per_class(labels, count, seed):
    """Indices of `count` random rows of each class, of all its rows where it has no more."""
    random = np.random.default_rng(seed)
    return np.concatenate(
        [random.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    )


def draw_part(labels, part, seed):
    """Indices of the part (0 to 1) of the rows of each class, at least one of each."""
    labels = labels.numpy()
    random = np.random.default_rng(seed)
    rows = []
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        rows.append(own[: max(1, round(part * len(own)))])
    return torch.from_numpy(np.concatenate(rows))


def calibration_error(logits, labels, bins=15):
    """Expected calibration error: how far confidence is from accuracy, over bins of equal width of the confidence.

    Source: Guo et al., arXiv:1706.04599, eq. 3.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, index, confidence - right)
    return float(gaps.abs().sum() / len(labels))


def accuracy_of(logits, labels):
    return float((logits.argmax(1) == labels).double().mean())


def with_noise(batches, sigma, seed=0):
    """The batches of (images, labels) with the same normal noise at every call."""
    generator = torch.Generator().manual_seed(seed)
    for images, labels in batches:
        yield images + sigma * torch.randn(images.shape, generator=generator), labels
