"""kornia's own classes, whose images are mixed by kernels."""

from kornia.augmentation import RandomCutMixV2 as CutMix
from kornia.augmentation import RandomMixUpV2 as MixUp

from ssl_kernels.adapters.kornia import blend, paste
from ssl_kernels.warning import warn


class RandomMixUpV2(MixUp):
    """`kornia.augmentation.RandomMixUpV2`: kornia's draws, labels and arguments, the images blended in one pass.

    λ is the partner's share, uniform, one per sample, as in kornia.
    """

    def apply_transform(self, input, params, maybe_flags=None):
        if not input.numel():
            return super().apply_transform(input, params, maybe_flags)
        lam = params["mixup_lambdas"].to(input.device).to(input.dtype)
        return blend(input, params["mixup_pairs"].to(input.device), lam)


class RandomCutMixV2(CutMix):
    """`kornia.augmentation.RandomCutMixV2`: kornia's draws, labels and arguments, the boxes pasted by a kernel.

    The third column of the labels is the area that was cut, unless use_correct_lambda, as in kornia. With num_mix > 1,
    whose boxes lie over each other, kornia's own code runs, with a warning.
    """

    def apply_transform(self, input, params, maybe_flags=None):
        if not input.numel():
            return super().apply_transform(input, params, maybe_flags)
        if len(params["mix_pairs"]) == 1:
            corners = params["crop_src"][0].to(input.device)
            return paste(input, params["mix_pairs"][0].to(input.device), corners)
        warn("RandomCutMixV2: num_mix > 1 runs kornia's own code", beyond=("kornia",))
        return super().apply_transform(input, params, maybe_flags)
