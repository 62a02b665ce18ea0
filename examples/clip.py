"""CLIP with two small towers: digits and their captions, then classification by captions alone (zero-shot).

python examples/clip.py --epochs 20
"""

import math

import digits
import torch

from ssl_kernels import clip_loss

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def captions(labels):
    """(B, length) letters of captions such as "the digit seven", as numbers; 0 is padding."""
    texts = [f"the digit {NAMES[label]}" for label in labels]
    longest = max(map(len, texts))
    return torch.tensor([[ord(letter) - 31 for letter in text.ljust(longest)] for text in texts])


class TextTower(torch.nn.Module):
    """(B, length) letters to (B, width): a convolution over the letters and their maximum."""

    def __init__(self, width=64):
        super().__init__()
        self.letters = torch.nn.Embedding(96, 32)
        self.words = torch.nn.Conv1d(32, width, 5, padding=2)

    def forward(self, letters):
        return self.words(self.letters(letters).mT).amax(2)


@torch.no_grad()
def zero_shot_accuracy(image_tower, text_tower, images, labels):
    classes = torch.nn.functional.normalize(text_tower(captions(range(10))))
    return ((image_tower(images) @ classes.T).argmax(1) == labels).float().mean().item()


def main(epochs):
    torch.manual_seed(0)
    train, test = digits.load()
    image_tower, text_tower = digits.make_encoder(), TextTower()
    log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    parameters = [*image_tower.parameters(), *text_tower.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)

    before, losses = zero_shot_accuracy(image_tower, text_tower, *test), []
    for _ in range(epochs):
        for images, labels in digits.batches(*train):
            image_features = image_tower(digits.augment(images))
            text_features = text_tower(captions(labels))
            # A batch has each caption many times: pairs of the same id are no negatives of each other.
            loss = clip_loss(image_features, text_features, log_scale.exp(), ids=labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return digits.report(losses, before, zero_shot_accuracy(image_tower, text_tower, *test))


if __name__ == "__main__":
    main(digits.epochs(default=20))
