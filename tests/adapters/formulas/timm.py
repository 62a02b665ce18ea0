"""Zhang et al., mixup, arXiv:1710.09412; Yun et al., CutMix, arXiv:1905.04899, sample by sample, with timm's draws."""

import numpy as np
import torch

from tests.adapters.uses import Use


class Mixup:
    def __init__(
        self, mixup_alpha=1.0, cutmix_alpha=0.0, prob=1.0, mode="batch", label_smoothing=0.1, num_classes=10
    ):
        self.alphas, self.prob, self.mode = (mixup_alpha, cutmix_alpha), prob, mode
        self.smoothing, self.classes = label_smoothing, num_classes

    def draw(self, size):
        """λ and which are CutMix, `size` of them."""
        mixup, cutmix = self.alphas
        shape = None if self.mode == "batch" else size
        mixed = np.random.rand() < self.prob if self.mode == "batch" else None
        if mixed is False:
            return np.ones(size), np.zeros(size, bool)
        cut = np.random.rand(size if shape else 1) < 0.5 if mixup and cutmix else np.full(size, cutmix > 0)
        if self.mode == "batch":
            alpha = cutmix if cut[0] else mixup
            return np.full(size, np.random.beta(alpha, alpha)), np.full(size, cut[0])
        lam = {alpha: np.random.beta(alpha, alpha, size=size) for alpha in (cutmix, mixup) if alpha}
        lam = np.where(cut, lam.get(cutmix), lam.get(mixup)).astype(np.float32)
        return np.where(np.random.rand(size) < self.prob, lam, np.float32(1)), cut

    def __call__(self, x, target):
        n, (height, width) = len(x), x.shape[-2:]
        lam, cut = self.draw({"elem": n, "pair": n // 2}.get(self.mode, n))
        mixed, boxes = x.clone(), {}
        for i in range(len(lam)):
            if cut[i] and lam[i] != 1 and (self.mode != "batch" or i == 0):
                h, w = (int(side * np.sqrt(1 - lam[i])) for side in (height, width))
                y, z = np.random.randint(0, height), np.random.randint(0, width)
                rows = slice(max(y - h // 2, 0), min(y + (h + 1) // 2, height))
                columns = slice(max(z - w // 2, 0), min(z + (w + 1) // 2, width))
                boxes[i] = rows, columns
                lam[i] = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        if self.mode == "batch":
            boxes, lam = {i: boxes[0] for i in range(n) if boxes}, np.full(n, lam[0])
        if self.mode == "pair":
            boxes |= {n - 1 - i: box for i, box in boxes.items()}
            lam, cut = np.concatenate((lam, lam[::-1])), np.concatenate((cut, cut[::-1]))
        for i in range(n):
            partner = x[n - 1 - i]
            if i in boxes:
                mixed[i][(slice(None), *boxes[i])] = partner[(slice(None), *boxes[i])]
            elif not cut[i]:
                mixed[i] = x[i] * lam[i] + partner * (1 - lam[i])
        dense = torch.nn.functional.one_hot(target, self.classes).float()
        dense = dense * (1 - self.smoothing) + self.smoothing / self.classes
        lam = torch.from_numpy(lam)[:, None]
        return mixed, dense * lam + dense.flip(0) * (1 - lam)


def _mixed(mode, **options):
    def run(space, case):
        mix = space.Mixup(mode=mode, num_classes=7, **options)
        images, target = case.images(case.n // 2 * 2, 3, 6, 5), case.integers(7, case.n // 2 * 2)
        out = [tensor for _ in range(3) for tensor in mix(images.clone(), target)]
        return [tensor.double() for tensor in out]

    return run


USES = [
    Use("timm", "Mixup", _mixed("batch"), tolerance=1e-6),
    Use(
        "timm",
        "Mixup",
        _mixed("batch", mixup_alpha=0.4, cutmix_alpha=1.0, prob=0.8),
        "and CutMix",
        tolerance=1e-6,
    ),
    Use("timm", "Mixup", _mixed("pair", cutmix_alpha=0.7, prob=0.7), 'in mode "pair"', tolerance=1e-6),
    Use("timm", "Mixup", _mixed("elem", cutmix_alpha=0.7, prob=0.7), 'in mode "elem"', tolerance=1e-6),
    Use(
        "timm",
        "Mixup",
        _mixed("elem", cutmix_minmax=(0.2, 0.9), mixup_alpha=0.0),
        "with cutmix_minmax",
        formula=False,
        tolerance=1e-6,
    ),
]
