"""Fine-tuning: an encoder trained further with a classifier on it, on a part of the labels."""

import copy

from ssl_kernels.recipes.engine import Settings, Training, train
from ssl_kernels.recipes.evaluation import accuracy_of, draw_part, extract_features
from ssl_kernels.recipes.methods.supervised import Supervised
from ssl_kernels.recipes.views import seeded

STEPS = 200
BATCH_SIZE = 64
LEARNING_RATE = 1e-3


def finetune(encoder, data, part, seed, *, steps=STEPS, device="cpu"):
    """Accuracy on the held-out images of a copy of the encoder, trained on with augmented images that have labels.

    Args:
        data: An `ImageData`.
        part: Of the training images of each class, in (0, 1]; at least one image of each is taken.
        seed: Of the choice of images, the classifier's weights and the views.
    """
    rows = draw_part(data.views.labels, part, seed)
    views = data.views.subset(rows, min(BATCH_SIZE, len(rows)), seed)
    epochs = max(1, round(steps / len(views)))
    settings = Settings("supervised", data.name, epochs, views.batch_size, LEARNING_RATE, seed=seed)
    with seeded(seed):
        method = Supervised(copy.deepcopy(encoder), data)
    training = Training(method, settings, epochs * len(views), device=device)
    train([training], views, f"fine-tune, {100 * part:g} % of labels")
    logits, labels = extract_features(method.online, data.test)
    return accuracy_of(logits, labels)
