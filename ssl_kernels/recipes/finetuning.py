"""Fine-tuning: an encoder trained further with a classifier on it, on a part of the labels.

On a trained encoder the classifier begins as the linear probe of its features, and the learning rate is low: one that
begins at random spoils the features before it can use them (Kumar et al., arXiv:2202.10054). Batch normalisation keeps
the statistics that it has.
"""

import copy

import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kernels.recipes.engine import Settings, Training, train
from ssl_kernels.recipes.evaluation import accuracy_of, draw_part, extract_features
from ssl_kernels.recipes.methods.supervised import Supervised
from ssl_kernels.recipes.views import seeded

STEPS = 200
BATCH_SIZE = 64
LEARNING_RATE = 3e-4
LEARNING_RATE_FROM_SCRATCH = 1e-2


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
        weight, bias = linear_probe(*extract_features(encoder, data.train), rows)
        with torch.no_grad():
            method.online.projection.weight.copy_(weight)
            method.online.projection.bias.copy_(bias)
    training = Training(method, settings, epochs * len(views), device=device)
    if not from_scratch:
        for module in method.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # the statistics of a few images would make other features than those probed
    train([training], views, f"fine-tune, {100 * part:g} % of labels")
    logits, labels = extract_features(method.online, data.test)
    return accuracy_of(logits, labels)


def linear_probe(features, labels, rows):
    """(weight (C, F), bias (C,)) of the logistic regression on these rows of features, standardised by all of them."""
    mean, deviation = features.mean(0), features.std(0)
    deviation = deviation.where(deviation > 0, 1)
    standard = (features - mean) / deviation
    classifier = LogisticRegression(max_iter=1000).fit(standard[rows].numpy(), labels[rows].numpy())
    weight, bias = (torch.from_numpy(each).float() for each in (classifier.coef_, classifier.intercept_))
    if len(weight) == 1:  # of two classes, the logit of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / deviation
    return weight, bias - weight @ mean
