"""Mixup and CutMix of batches as modules: draws, images, masks and targets in one call."""

from collections.abc import Sequence
from typing import Any

import torch

from ssl_kernels import backends, mixing
from ssl_kernels.checks import (
    DTYPES,
    check_choice,
    check_dense,
    check_device,
    is_number,
    is_whole,
    shape_error,
)
from ssl_kernels.nn import targets
from ssl_kernels.nn.boxes import MixedBoxes, check_boxes, mix_boxes
from ssl_kernels.nn.draws import DrawingModule, MixingDraw, beta, is_seed, sides_of, span_around, span_within
from ssl_kernels.overlap import share_memory

MODES = {"batch": "batch", "pair": "pair", "sample": "sample", "elem": "sample"}  # "elem" is timm's word
PAIRINGS = ("random", "flip", "roll")
_NORMALIZED = (torch.float32, torch.float16, torch.bfloat16)  # what uint8 images become
BANDS = 16  # of rows, in which a batch is mixed in place where both methods meet


class Mixup(DrawingModule):
    """Mixup, CutMix, or either at random, on a batch with its targets and masks.

        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=1000)
        images, target = mixup(images, target)                           # dense targets, as timm's and torchvision's
        loss = F.cross_entropy(model(images), target)

        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)                 # faster: no dense target
        images, target = mixup(images, target)
        loss = mixup_cross_entropy(model(images), *target)

    Classes are mixed by their probabilities, everything else as numbers: multi-hot and binary targets for a loss such
    as `F.binary_cross_entropy_with_logits`, regression targets, probabilities. `target_kind` says which a target is.

    All draws are made on the device of the batch (or of `generator`), without waiting for it, before anything else, so
    that the same seed gives the same draws on every backend. In evaluation mode nothing is mixed and nothing drawn: a
    batch passes as it is, whatever mixing would refuse of it, normalised where mean and std were given; targets have
    the form that they have in training, without label smoothing.

    The arguments are those of timm's Mixup, whose pairing is "flip" and whose label_smoothing is 0.1 unless given.
    torchvision's MixUp(alpha=a, num_classes=c) is Mixup(a, num_classes=c, pairing="roll"), its CutMix(alpha=a,
    num_classes=c) Mixup(0, a, num_classes=c, pairing="roll").

    Args:
        mixup_alpha: λ of mixup is drawn from Beta(mixup_alpha, mixup_alpha); 0 means no mixup.
        cutmix_alpha: The area left of a sample is drawn from Beta(cutmix_alpha, cutmix_alpha); 0 means no CutMix.
        cutmix_minmax: (least, most) share of height and width that a box takes, drawn uniformly, instead of the area.
        prob: Probability that anything is done.
        switch_prob: Probability of CutMix where both are on.
        mode: One draw for the "batch", one for each "pair" of samples, or one for each "sample" (timm: "elem").
        correct_lam: λ of a pasted sample is the area that is left of it, not the one that was drawn.
        label_smoothing: In [0, 1], of dense targets made from integer ones; 0 without: there it is an argument of
            `ssl_kernels.mixup_cross_entropy`.
        num_classes: C, for dense targets from integer ones.
        pairing: "random": a random permutation (a random matching for mode "pair"); "flip": sample i meets B − 1 − i;
            "roll": sample i meets i − 1, not for mode "pair".
        dense_target: True: targets come out dense, (B, C); False: integer targets come out as (target, permutation,
            lam). None: dense if num_classes is given.
        target_kind: "classes": targets are classes, (B,) of any integer dtype (without dense targets (B, ...)).
            "values": they are numbers, (B, ...) of any real dtype, that come out mixed: floating ones in their dtype,
            others in float32. None: integers of shape (B,) are classes, integers of shape (B, C) are 0s and 1s that are
            mixed as values, bool and floating targets are values.
        min_visible: In [0, 1], the visible part of a bounding box's area from which on it is kept, see `mix_boxes`.
        inplace: Overwrite the batch and its masks; False: return new tensors.
        mean, std: C numbers each. With them the batch is uint8 and comes out normalised, ((x / 255) − mean) / std.
        dtype: Of normalised images: float32, float16 or bfloat16.
        generator: A torch.Generator, or a seed from which one is made on the device of the first batch; None: torch's.
            Its state is in `state_dict`, as a tensor, so that a resumed run goes on with the draws of the one that was
            saved. In a DataLoader's worker it begins anew from its state and the worker's seed: other draws in each
            worker and epoch, which `torch.manual_seed` (or the loader's generator) determines. Ranks of a distributed
            run draw alike unless each is given a seed of its own.
        backend: As in `ssl_kernels.mixup_`.

    Raises:
        ValueError: An argument outside the above.

    Source: Zhang et al., mixup, arXiv:1710.09412; Yun et al., CutMix, arXiv:1905.04899.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: tuple[float, float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.0,
        num_classes: int | None = None,
        *,
        pairing: str = "random",
        dense_target: bool | None = None,
        target_kind: str | None = None,
        min_visible: float = 0.1,
        inplace: bool = True,
        mean: Sequence[float] | torch.Tensor | None = None,
        std: Sequence[float] | torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | int | None = None,
        backend: str | None = None,
    ) -> None:
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            _check(is_number(alpha) and 0 <= alpha < float("inf"), name, "be a number >= 0", alpha)
        if cutmix_minmax is not None:
            _check(_is_range(cutmix_minmax), "cutmix_minmax", "hold 0 <= least < most <= 1", cutmix_minmax)
            cutmix_alpha = cutmix_alpha or 1.0  # as timm: boxes by their sides turn CutMix on
        _check(mixup_alpha > 0 or cutmix_alpha > 0, "mixup_alpha or cutmix_alpha", "be > 0", 0)
        for name, value in (
            ("prob", prob),
            ("switch_prob", switch_prob),
            ("label_smoothing", label_smoothing),
            ("min_visible", min_visible),
        ):
            _check(is_number(value) and 0 <= value <= 1, name, "be in [0, 1]", value)
        check_choice("Mixup", "mode", mode, *MODES)
        check_choice("Mixup", "pairing", pairing, *PAIRINGS)
        _check(not (MODES[mode] == "pair" and pairing == "roll"), "pairing", 'be "random" or "flip"', pairing)
        check_choice("Mixup", "target_kind", target_kind, *targets.KINDS, None)
        _check(
            num_classes is None or (is_whole(num_classes) and num_classes > 0),
            "num_classes",
            "be an integer > 0",
            num_classes,
        )
        _check((mean is None) == (std is None), "mean and std", "be given together", (mean, std))
        _check(dtype in _NORMALIZED, "dtype", "be float32, float16 or bfloat16", dtype)
        known = generator is None or isinstance(generator, torch.Generator) or is_seed(generator)
        _check(known, "generator", "be a torch.Generator, an integer or None", generator)
        backends.check_name("Mixup", backend)
        super().__init__(generator)
        self.mixup_alpha, self.cutmix_alpha, self.cutmix_minmax = mixup_alpha, cutmix_alpha, cutmix_minmax
        self.prob, self.switch_prob, self.correct_lam = prob, switch_prob, correct_lam
        self.mode, self.pairing = MODES[mode], pairing
        self.label_smoothing = label_smoothing
        self.num_classes = None if num_classes is None else int(num_classes)
        self.dense_target = num_classes is not None if dense_target is None else dense_target
        if label_smoothing > 0 and not self.dense_target:
            raise ValueError(
                f"Mixup: label_smoothing must be 0 without dense targets, got {label_smoothing!r};"
                " pass it to mixup_cross_entropy"
            )
        self.target_kind, self.min_visible = target_kind, min_visible
        self.inplace, self.dtype, self.backend = inplace, dtype, backend
        for name, numbers in (("mean", mean), ("std", std)):
            value = None if numbers is None else _channels(name, numbers)
            self.register_buffer(name, value, persistent=False)
        if mean is not None:
            _check(len(self.mean) == len(self.std), "std", f"have {len(self.mean)} numbers as mean has", std)

    def forward(
        self,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        boxes: Sequence[torch.Tensor] | None = None,
        labels: Sequence[torch.Tensor] | None = None,
    ) -> Any:
        """Mix a batch.

        Args:
            x: (B, ...) floating, (B, ..., H, W) for CutMix; uint8 (B, C, H, W) if mean and std were given.
            target: None, or classes or values as `target_kind` says.
            masks: None, or (B, ..., H, W) masks or other maps that follow the images pixel by pixel.
            boxes: None, or bounding boxes in pixels, a list of (n_i, 4) xyxy tensors.
            labels: None, or what goes with the boxes, a list of (n_i, ...) tensors.

        Returns:
            x alone, or a tuple of x, then target, masks and boxes where given. See `mix_target`, `mix_masks` and
            `mix_boxes` for what they become.

        Raises:
            TypeError, ValueError: As `mixup_` and `cutmix_`; masks that cannot be mixed; a target of another shape,
                dtype or device, or on the CPU outside of torch.compile an unknown class where it is made dense;
                boxes or labels of another shape. x and masks are untouched then.
        """
        self._check_batch(x, masks)
        if boxes is not None or labels is not None:
            check_boxes("Mixup", boxes, labels, len(x))
        if target is not None:
            target = self._prepared_target(target, x)
            if self.training and self.inplace:
                self._check_target_apart(target, x if self.mean is None else None, masks)
        draw = self.draw(x)
        mixed_target = None if target is None else self._mix_prepared_target(target, draw)
        results = [self.mix(x, draw)]
        if target is not None:
            results.append(mixed_target)
        if masks is not None:
            results.append(self.mix_masks(masks, draw))
        if boxes is not None:
            results.append(self.mix_boxes(boxes, draw, labels))
        return results[0] if len(results) == 1 else tuple(results)

    def draw(self, x: torch.Tensor) -> MixingDraw:
        """A `MixingDraw` for a batch of the shape of x; `mix`, `mix_target` and the losses take it apart."""
        batch, device = x.shape[0], x.device
        if not self.training:
            here, ones = torch.arange(batch, device=device), torch.ones(batch, device=device)
            boxes = torch.zeros(batch, 4, dtype=torch.int64, device=device) if self.cutmix_alpha > 0 else None
            return MixingDraw(here, ones, ones, boxes)
        source = self.draws.device(device)
        permutation = self._permutation(batch, source)
        groups = 1 if self.mode == "batch" else batch
        done = self.draws.uniform((groups,), source) < self.prob
        pasted = done
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            pasted = done & (self.draws.uniform((groups,), source) < self.switch_prob)
        pixel_lam, boxes = torch.ones(groups, device=source), None
        if self.mixup_alpha > 0:
            blended = done if self.cutmix_alpha == 0 else done & ~pasted
            pixel_lam = torch.where(blended, beta(self.mixup_alpha, groups, source, self.draws), 1.0)
        lam = pixel_lam
        if self.cutmix_alpha > 0:
            boxes, left = self._boxes(groups, *x.shape[-2:], source)
            lam, boxes = torch.where(pasted, left, lam), boxes * pasted[:, None]
        drawn = [permutation, *(self._for_each(part, permutation) for part in (lam, pixel_lam))]
        drawn.append(None if boxes is None else self._for_each(boxes, permutation))
        return MixingDraw(*(None if part is None else part.to(device, non_blocking=True) for part in drawn))

    def mix(self, x: torch.Tensor, draw: MixingDraw) -> torch.Tensor:
        """The images (or features) of one call, as `draw` says; in place unless the module says otherwise."""
        if self.mean is None:
            return self._mix_values(x, draw)
        mean, std = self.mean.to(x.device), self.std.to(x.device)

        def normalized(images, lam):
            return mixing.mixup_normalize(
                images, lam, draw.permutation, mean, std, self.dtype, backend=self.backend
            )

        mixed = normalized(x, draw.pixel_lam)
        if draw.boxes is None or not self.training:
            return mixed
        if self._kinds_meet():
            pasted = normalized(mixing.cutmix(x, draw.boxes, draw.permutation, backend=self.backend), 1.0)
            return torch.where(_is_pasted(draw.boxes, x), pasted, mixed)
        return mixing.cutmix_(mixed, draw.boxes, draw.permutation, backend=self.backend)

    def mix_target(
        self, target: torch.Tensor, draw: MixingDraw
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The targets of one call.

        Returns:
            Classes: dense (B, C) float32, or (target, permutation, lam) with target in int64 where `dense_target` is
            False, as `mixup_cross_entropy` takes them. For a part of the batch pass it target[rows], lam=lam[rows] and
            partner_target=target[permutation][rows].
            Values: the same shape, mixed, in their dtype if floating, else float32.
        """
        return self._mix_prepared_target(self._prepared_target(target, draw.permutation), draw)

    def mix_masks(self, masks: torch.Tensor, draw: MixingDraw) -> torch.Tensor | targets.MixedMasks:
        """The masks of one call, in place unless the module says otherwise.

        Returns:
            A tensor where they can be mixed: floating ones, and with CutMix alone any. With mixup, bool masks are mixed
            as float32, and integer ones come out as `MixedMasks` (target, partner, lam).
        """
        if masks.dtype == torch.bool and self.mixup_alpha > 0:
            return self._mix_values(masks.to(torch.float32), draw)
        if self.mixup_alpha == 0 or not targets.is_integer(masks):
            return self._mix_values(masks, draw)
        if not self.training:
            return targets.MixedMasks(masks, masks, draw.pixel_lam)
        options = {"backend": self.backend}
        partner = masks[draw.permutation]
        if draw.boxes is not None:
            paste = mixing.cutmix_ if self.inplace else mixing.cutmix
            masks = paste(masks, draw.boxes, draw.permutation, **options)
        elif not self.inplace:
            masks = masks.clone()
        return targets.MixedMasks(masks, partner, draw.pixel_lam)

    def mix_boxes(
        self, boxes: Sequence[torch.Tensor], draw: MixingDraw, labels: Sequence[torch.Tensor] | None = None
    ) -> MixedBoxes:
        """The bounding boxes of one call. Their number depends on what was drawn, so that this waits for the device.

        Where an image was blended, the boxes of both remain, with shares λ and 1 − λ; those of share 0 are left out.
        Where a box of the partner was pasted, the partner's boxes are clipped to it, and its own boxes to the smallest
        box around what it leaves of them, with share 1. Of these a box is kept if the visible part of its area, inside
        the pasted box or outside, is more than 0 and at least `min_visible` of all of it. Where nothing was mixed, the
        image's own boxes remain as they are, with share 1.

        Args:
            boxes: A list of B tensors (n_i, 4), xyxy in pixels, of one real dtype.
            draw: A `MixingDraw`.
            labels: None, or a list of B tensors (n_i, ...) that go with them.

        Returns:
            `MixedBoxes` (boxes, labels, lam): lists of B tensors (m_i, 4), (m_i, ...) and (m_i,).

        Raises:
            TypeError, ValueError: boxes or labels are none of these.
        """
        check_boxes("Mixup", boxes, labels, len(draw.permutation))
        return mix_boxes(boxes, labels, draw, self.min_visible)

    def extra_repr(self) -> str:
        names = ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "mode", "pairing", "num_classes")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _kinds_meet(self):
        """Whether a sample that is pasted into may have a partner that is blended, or the other way round.

        A pair shares its draw and a batch too: there the two operations follow each other in place.
        """
        return self.mode == "sample" and self.mixup_alpha > 0 and self.cutmix_alpha > 0

    def _mix_values(self, x, draw):
        if not self.training:
            return x
        options = {"backend": self.backend}
        permutation, lam, boxes = draw.permutation, draw.pixel_lam, draw.boxes
        if self.mixup_alpha == 0:
            return (mixing.cutmix_ if self.inplace else mixing.cutmix)(x, boxes, permutation, **options)
        if boxes is None:
            return (mixing.mixup_ if self.inplace else mixing.mixup)(x, lam, permutation, **options)
        if self._kinds_meet():
            if self.inplace:
                return self._mix_in_bands_(x, draw)
            blended = mixing.mixup(x, lam, permutation, **options)
            pasted = mixing.cutmix(x, boxes, permutation, **options)
            return torch.where(_is_pasted(boxes, x), pasted, blended)
        if self.inplace:
            return mixing.cutmix_(
                mixing.mixup_(x, lam, permutation, **options), boxes, permutation, **options
            )
        return mixing.cutmix(mixing.mixup(x, lam, permutation, **options), boxes, permutation, **options)

    def _mix_in_bands_(self, x, draw):
        """Where both methods meet, in place, with a part of the batch beside it: each band of rows is made apart."""
        permutation, boxes, height = draw.permutation, draw.boxes, x.shape[-2]
        is_pasted = _is_pasted(boxes, x)
        rows = -(-height // BANDS)
        for first in range(0, height, rows):
            band = x[..., first : first + rows, :]
            spans = (boxes[:, :2] - first).clamp(0, band.shape[-2])
            inside = torch.cat([spans, boxes[:, 2:]], 1)
            blended = mixing.mixup(band, draw.pixel_lam, permutation, backend=self.backend)
            pasted = mixing.cutmix(band, inside, permutation, backend=self.backend)
            band.copy_(torch.where(is_pasted, pasted, blended))
        return x

    def _check_batch(self, x, masks):
        mixes = self.training  # what mixing alone cannot take passes in evaluation
        if mixes or self.mean is not None or not isinstance(x, torch.Tensor):
            check_dense("Mixup", "x", x)
        if x.dim() == 0 or (0 in x.shape and (mixes or self.mean is not None)):
            raise shape_error("Mixup", "x", "(B, ...) with no dimension of 0", x)
        if self.mean is not None and x.dtype != torch.uint8:
            raise TypeError(f"Mixup: x must be uint8 for a Mixup with mean and std, got {x.dtype}")
        if mixes and self.mean is None and self.mixup_alpha > 0 and not x.is_floating_point():
            raise TypeError(f"Mixup: x must be floating, or uint8 with mean and std given, got {x.dtype}")
        if mixes and self.cutmix_alpha > 0 and x.dim() < 3:
            raise shape_error("Mixup", "x", "(B, ..., H, W) for CutMix", x)
        if mixes and self.inplace and self.mean is None:
            _check_overwritten("x", x)
        if mixes or self.mean is not None:
            self._check_backend(x, self.mean is not None)
        if mixes and masks is not None:
            self._check_masks(x, masks)

    def _check_backend(self, values, normalized=False):
        """Every operation that `values` go through runs where it is asked to."""
        if self.mixup_alpha > 0 or normalized:
            operation = "mixup_normalize" if normalized else "mixup"
            backends.choose_backend(operation, self.backend, "Mixup", values)
        if self.cutmix_alpha > 0 and self.training:
            backends.choose_backend("cutmix", self.backend, "Mixup", values)

    def _prepared_target(self, target, like):
        """Classes in int64 or values in a floating dtype, after all checks; `like` is of the batch."""
        options = {"kind": self.target_kind, "num_classes": self.num_classes, "dense": self.dense_target}
        return targets.prepared_target("Mixup", target, like, **options)

    def _mix_prepared_target(self, target, draw):
        if not target.is_floating_point():
            if not self.dense_target:
                return target, draw.permutation, draw.lam
            smoothing = self.label_smoothing if self.training else 0.0
            target = targets.one_hot(target, self.num_classes, smoothing)
        if not self.training:
            return target
        return mixing.mixup(target, draw.lam, draw.permutation, backend=self.backend)

    def _check_masks(self, x, masks):
        check_dense("Mixup", "masks", masks)
        known = masks.dtype in DTYPES or not (masks.is_complex() or masks.is_floating_point())
        if self.mixup_alpha > 0 and not known:
            raise TypeError(f"Mixup: masks must be floating, integer or bool for mixup, got {masks.dtype}")
        if masks.dim() == 0 or len(masks) != len(x) or 0 in masks.shape:
            raise shape_error("Mixup", "masks", f"({len(x)}, ...) with no dimension of 0", masks)
        check_device("Mixup", "masks", masks, x, "x")
        if self.cutmix_alpha > 0 and (masks.dim() < 3 or masks.shape[-2:] != x.shape[-2:]):
            raise ValueError(
                f"Mixup: masks must have the height and width of x, {tuple(x.shape[-2:])},"
                f" got {tuple(masks.shape)}"
            )
        if self.inplace:
            _check_overwritten("masks", masks)
            if share_memory(x, masks):
                raise ValueError("Mixup: masks must lie in memory of their own, got a view of x")
        self._check_mask_backend(masks)

    def _check_mask_backend(self, masks):
        if self.mixup_alpha == 0 or masks.is_floating_point():
            self._check_backend(masks)
        elif masks.dtype == torch.bool:
            self._check_backend(masks.new_empty(masks.shape, dtype=torch.float32))
        elif self.cutmix_alpha > 0:
            backends.choose_backend("cutmix", self.backend, "Mixup", masks)

    def _check_target_apart(self, target, *overwritten):
        """Classes that come out as they are must not be written with the images or masks."""
        if target.is_floating_point() or self.dense_target:
            return
        if any(other is not None and share_memory(target, other) for other in overwritten):
            raise ValueError("Mixup: target must lie in memory of its own, got a view of x or masks")

    def _permutation(self, batch, device):
        here = torch.arange(batch, device=device)
        if self.pairing == "flip":
            return here.flip(0)
        if self.pairing == "roll":
            return here.roll(1)
        shuffled = self.draws.permutation(batch, device)
        if self.mode != "pair":
            return shuffled
        paired = shuffled[: batch // 2 * 2].view(-1, 2)  # an odd one out meets itself
        return here.scatter(0, paired.flatten(), paired.flip(1).flatten())

    def _for_each(self, drawn, permutation):
        """One draw per sample: the batch's, its pair's or its own."""
        if self.mode == "batch":
            return drawn.expand(len(permutation), *drawn.shape[1:])
        if self.mode == "sample":
            return drawn
        here = torch.arange(len(permutation), device=permutation.device)
        return drawn[torch.minimum(here, permutation)]

    def _boxes(self, groups, height, width, device):
        """(groups, 4) boxes and the share of the image that they leave."""

        def uniform():
            return self.draws.uniform((groups,), device, torch.float64)

        places = uniform(), uniform()
        if self.cutmix_minmax is None:
            left = beta(self.cutmix_alpha, groups, device, self.draws)
            share, span = 1.0 - left.double(), span_around
            sides = sides_of(share, height, width)
        else:
            least, most = self.cutmix_minmax
            sides, span = [least + (most - least) * uniform() for _ in places], span_within
            share = sides[0] * sides[1]
        spans = [span(*each) for each in zip(places, sides, (height, width), strict=True)]
        boxes = torch.stack([*spans[0], *spans[1]], 1)
        if height == width == 1:  # in full or not at all, as often as its share says
            boxes = boxes * (places[0] < share)[:, None]
        y0, y1, x0, x1 = boxes.unbind(1)
        area = ((y1 - y0) * (x1 - x0)).double()
        if self.correct_lam or self.cutmix_minmax is not None:
            left = (1.0 - area / (height * width)).float()
        return boxes, left


def _check(condition, name, rule, value):
    if not condition:
        raise ValueError(f"Mixup: {name} must {rule}, got {value!r}")


def _is_range(pair):
    numbers = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_number, pair))
    return numbers and 0 <= pair[0] < pair[1] <= 1


def _channels(name, numbers):
    """(C,) float32 of numbers given as a sequence or a tensor."""
    given = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
    return torch.tensor(mixing.channel_numbers("Mixup", name, given), dtype=torch.float32, device="cpu")


def _check_overwritten(name, value):
    mixing.check_in_place("Mixup", name, value, "Mixup with inplace=False is differentiable")


def _is_pasted(boxes, x):
    """Whether each sample has a box, in a shape that broadcasts against x."""
    y0, y1, x0, x1 = boxes.unbind(1)
    return ((y1 > y0) & (x1 > x0)).view(-1, *[1] * (x.dim() - 1))
