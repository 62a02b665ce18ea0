"""Fine-tuning: an encoder trained further with a classifier on it, on a part of the labels.

On a trained encoder the classifier begins as a linear probe of its features, and the learning rate is low: one that
begins at random spoils the features before it can use them (Kumar et al., arXiv:2202.10054). The probe sees what the
training will see: augmented images too, after batch normalisation has taken their statistics.
"""

import copy
import itertools

import torch
from sklearn.linear_model import LogisticRegression
from torch.optim.swa_utils import update_bn

from ssl_kernels.recipes.engine import Settings, Training, train
from ssl_kernels.recipes.evaluation import accuracy_of, draw_part, extract_features
from ssl_kernels.recipes.methods.supervised import Supervised
from ssl_kernels.recipes.views import seeded

STEPS = 200
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
LEARNING_RATE_FROM_SCRATCH = 1e-2
PROBED_BATCHES = 50  # of views, beside the images themselves


def finetune(encoder, data, part, seed, *, steps=STEPS, from_scratch=False, device="cpu"):
    """Accuracy on the held-out images of a copy of the encoder, trained on with augmented images that have labels.

    Args:
        data: An `ImageData`.
        part: Of the training images of each class, in (0, 1]; at least one image of each is taken.
        seed: Of the choice of images, the classifier's weights and the views.
        from_scratch: The encoder has not learned anything: the classifier begins at random, with a high rate.
    """
    rows = draw_part(data.views.labels, part, seed)
    views = data.views.subset(rows, min(BATCH_SIZE, len(rows)), seed)
    epochs = max(1, round(steps / len(views)))
    rate = LEARNING_RATE_FROM_SCRATCH if from_scratch else LEARNING_RATE
    settings = Settings("supervised", data.name, epochs, views.batch_size, rate, seed=seed)
    with seeded(seed):
        method = Supervised(copy.deepcopy(encoder), data)
    if not from_scratch:
        _begin_at_probe(method.online, data, views, rows, first=epochs)
    training = Training(method, settings, epochs * len(views), device=device)
    train([training], views, f"fine-tune, {100 * part:g} % of labels")
    logits, labels = extract_features(method.online, data.test)
    return accuracy_of(logits, labels)


def _begin_at_probe(network, data, views, rows, first):
    """Give the classifier on the encoder the weights of a `linear_probe` of the images and of views from epoch `first`
    on, which the training does not see."""

    def batches():
        every = (batch for epoch in itertools.count(first) for batch in views.epoch(epoch))
        return ((batch.views[0], batch.labels) for batch in itertools.islice(every, PROBED_BATCHES))

    device = next(network.parameters()).device
    update_bn(batches(), network.encoder, device)
    features, labels = extract_features(network.encoder, data.train)
    of_views, labels_of_views = extract_features(network.encoder, batches())
    weight, bias = linear_probe(
        torch.cat([features[rows], of_views]), torch.cat([labels[rows], labels_of_views]), features
    )
    with torch.no_grad():
        network.projection.weight.copy_(weight)
        network.projection.bias.copy_(bias)


def linear_probe(features, labels, unlabelled):
    """(weight (C, F), bias (C,)) of the logistic regression on features standardised by the unlabelled ones."""
    mean, deviation = unlabelled.mean(0), unlabelled.std(0)
    deviation = deviation.where(deviation > 0, 1)
    standard = (features - mean) / deviation
    classifier = LogisticRegression(max_iter=1000).fit(standard.numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(each).float() for each in (classifier.coef_, classifier.intercept_))
    if len(weight) == 1:  # of two classes, the logit of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / deviation
    return weight, bias - weight @ mean
