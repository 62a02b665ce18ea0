"""`timm.data.Mixup` (timm 1.0)."""

from typing import Any

import numpy as np
import torch

from ssl_kernels.adapters._shared import Closed, LibraryMethod
from ssl_kernels.checks import shape_error
from ssl_kernels.mixing import cutmix, cutmix_, mixup, mixup_

__all__ = ["Mixup"]
ORIGINALS = {"Mixup": "timm.data.mixup"}
DIFFERENCES = {
    "Mixup": "λ is kept in float32 (timm: in the images' dtype, so 0 for uint8); odd batches are mixed (`strict=True`:"
    " refused); dense targets without multi_label, and mixup of uint8 images, raise; a video's box lies in its frames"
}


class Mixup(Closed):
    """`timm.data.Mixup`: mixup and CutMix of a batch in place, each sample with the one as far from the other end.

    Numbers are drawn from NumPy's global generator in timm's order. The images are mixed in place, in one pass. In
    modes "elem" and "pair" timm keeps λ in the images' dtype, so that the targets of uint8 images are wrong; here it
    is float32, and mixup (not CutMix) of images that are not floating raises TypeError. timm refuses an odd batch; here
    the middle sample of one is its own partner.

    Args:
        mixup_alpha, cutmix_alpha: Of the Beta distribution of λ; 0 for none.
        cutmix_minmax: Two shares of a side between which the box's sides are drawn, instead of from λ.
        prob: Of mixing at all, a batch, or a sample in the other modes.
        switch_prob: Of CutMix where both are on.
        mode: "batch", "pair" or "elem": for what λ is drawn. Any other is "batch", as in timm.
        correct_lam: λ is the share of pixels that the box leaves.
        label_smoothing, num_classes: Of the targets, dense and float32.
        multi_label: Targets are (B, num_classes), and smoothed towards 0.5.
        strict: Refuse an odd batch.
    """

    _params_per_batch = LibraryMethod()
    _params_per_elem = LibraryMethod()
    strict = False  # of an object that was pickled as timm's

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        strict: bool = False,
    ) -> None:
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        if cutmix_minmax is not None:
            if len(cutmix_minmax) != 2:
                raise AssertionError(f"Mixup: cutmix_minmax must be two shares, got {cutmix_minmax!r}")
            self.cutmix_alpha = 1.0
        self.mix_prob = prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.mode = mode
        self.correct_lam = correct_lam
        self.mixup_enabled = True
        self.strict = strict

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        """x (B, C, H, W), mixed in place; returns it and the dense targets (B, num_classes)."""
        if self.strict and len(x) % 2:
            raise AssertionError(f"Mixup: x must have an even number of samples, got {len(x)}")
        lam = {"elem": self._mix_elem, "pair": self._mix_pair}.get(self.mode, self._mix_batch)(x)
        return x, self._mixed_target(target, lam)

    def _draw(self, count=None):
        """(λ, whether it is CutMix's) of `count` samples; of the whole batch for None."""
        if self.mixup_alpha <= 0 and self.cutmix_alpha <= 0:
            raise AssertionError("Mixup: mixup_alpha or cutmix_alpha must be > 0, or cutmix_minmax given")
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        if count is None:
            cut = bool(np.random.rand() < self.switch_prob) if both else self.cutmix_alpha > 0
            alpha = self.cutmix_alpha if cut else self.mixup_alpha
            return float(np.random.beta(alpha, alpha)), cut
        if both:
            cut = np.random.rand(count) < self.switch_prob
            of_cutmix = np.random.beta(self.cutmix_alpha, self.cutmix_alpha, size=count)
            lam = np.where(cut, of_cutmix, np.random.beta(self.mixup_alpha, self.mixup_alpha, size=count))
        else:
            cut = np.full(count, self.cutmix_alpha > 0)
            alpha = self.cutmix_alpha if self.cutmix_alpha > 0 else self.mixup_alpha
            lam = np.random.beta(alpha, alpha, size=count)
        return np.where(np.random.rand(count) < self.mix_prob, lam.astype(np.float32), np.float32(1)), cut

    def _box(self, height, width, lam):
        """(y0, y1, x0, x1) of one CutMix, and the λ that goes with it."""
        randint = np.random.randint
        if self.cutmix_minmax is not None:
            least, most = self.cutmix_minmax
            cut_h = randint(int(height * least), int(height * most))
            cut_w = randint(int(width * least), int(width * most))
            y0 = randint(0, height - cut_h + 1)
            x0 = randint(0, width - cut_w + 1)
            box = (y0, y0 + cut_h, x0, x0 + cut_w)
        else:
            ratio = np.sqrt(1 - lam)
            cut_h, cut_w = int(height * ratio), int(width * ratio)
            y, x = randint(0, height), randint(0, width)
            y0, y1 = max(y - cut_h // 2, 0), min(y + (cut_h + 1) // 2, height)
            x0, x1 = max(x - cut_w // 2, 0), min(x + (cut_w + 1) // 2, width)
            box = (y0, y1, x0, x1)
        if self.correct_lam or self.cutmix_minmax is not None:
            lam = 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / float(height * width)
        return box, lam

    def _mix_batch(self, x):
        if not self.mixup_enabled or np.random.rand() >= self.mix_prob:
            return 1.0
        lam, cut = self._draw()
        if lam == 1.0:
            return lam
        if cut:
            box, lam = self._box(*x.shape[-2:], lam)
            _paste(x, torch.tensor([box], device=x.device).expand(len(x), 4), _ends(x))
        else:
            _blend(x, lam)
        return lam

    def _mix_pair(self, x):
        half = len(x) // 2
        lam, cut, boxes = self._drawn_boxes(x, half)
        middle = len(x) % 2

        def mirrored(values, of_middle):
            return np.concatenate((values, of_middle[:middle], values[::-1]))

        lam = mirrored(lam, np.ones(1, np.float32))
        boxes = mirrored(boxes, np.zeros((1, 4), np.int64))
        cut = mirrored(cut, np.ones(1, bool))
        # Both of a pair do the same, so that what one reads the other has not overwritten by another rule.
        if (~cut & (lam != 1)).any():
            _blend(x, torch.from_numpy(np.where(cut, np.float32(1), lam)).to(x.device))
        if boxes.any():
            _paste(x, torch.from_numpy(boxes).to(x.device), _ends(x))
        return self._shares(lam, x)

    def _mix_elem(self, x):
        lam, cut, boxes = self._drawn_boxes(x, len(x))
        blended = ~cut & (lam != 1)
        pasted = torch.from_numpy(np.flatnonzero(boxes.any(1))).to(x.device)
        boxes = torch.from_numpy(boxes).to(x.device)
        if blended.any() and len(pasted):  # the two read what the other overwrites
            _check_floating(x)
            both = torch.cat((x[pasted], x[len(x) - 1 - pasted]))
            swapped = torch.arange(len(both), device=x.device).roll(len(pasted))
            own = boxes[pasted]
            _paste(both, torch.cat((own, torch.zeros_like(own))), swapped)
        if blended.any():
            _blend(x, torch.from_numpy(np.where(blended, lam, np.float32(1))).to(x.device))
            if len(pasted):
                x[pasted] = both[: len(pasted)]
        elif len(pasted):
            _paste(x, boxes, _ends(x))
        return self._shares(lam, x)

    def _drawn_boxes(self, x, count):
        """λ (count,) float32, where it is CutMix, and boxes (count, 4) int64, empty where nothing is pasted."""
        lam, cut, boxes = np.ones(count, np.float32), np.zeros(count, bool), np.zeros((count, 4), np.int64)
        if self.mixup_enabled:
            lam, cut = self._draw(count)
            for i in np.flatnonzero(cut & (lam != 1)):
                boxes[i], lam[i] = self._box(*x.shape[-2:], lam[i])
        return lam, cut, boxes

    @staticmethod
    def _shares(lam, x):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.from_numpy(np.ascontiguousarray(lam)).to(x.device, dtype).unsqueeze(1)

    def _mixed_target(self, target, lam):
        smoothing = self.label_smoothing
        if self.multi_label:
            if target.ndim != 2 or target.shape[1] != self.num_classes:
                raise shape_error("Mixup", "target", f"(B, {self.num_classes}) with multi_label", target)
            dense = target.float() * (1.0 - smoothing) + 0.5 * smoothing
            return dense * lam + dense.flip(0) * (1.0 - lam)
        if target.numel() != max(target.shape, default=1):
            raise ValueError(
                f"Mixup: target must hold one class per sample without multi_label, got {tuple(target.shape)}"
            )
        classes = target.long().view(-1, 1)
        off = smoothing / self.num_classes
        dense = torch.full((len(classes), self.num_classes), off, device=target.device)
        dense.scatter_(1, classes, 1.0 - smoothing + off)
        return dense * lam + dense.flip(0) * (1.0 - lam)


def _ends(x):
    """Each sample's partner: the one as far from the other end."""
    return torch.arange(len(x) - 1, -1, -1, device=x.device)


def _blend(x, lam):
    """x · λ + its mirror image · (1 − λ), in place; where autograd records it, by way of a copy."""
    _check_floating(x)
    if not x.numel():
        return
    if x.requires_grad and torch.is_grad_enabled():
        x.copy_(mixup(x, lam, _ends(x)))
    else:
        mixup_(x, lam, _ends(x))


def _paste(x, boxes, partners):
    """The boxes of the partners in x, likewise."""
    if not x.numel():
        return
    if x.requires_grad and torch.is_grad_enabled():
        x.copy_(cutmix(x, boxes, partners))
    else:
        cutmix_(x, boxes, partners)


def _check_floating(x):
    if not x.is_floating_point():
        raise TypeError(f"Mixup: x must be floating for mixup, got {x.dtype}")
