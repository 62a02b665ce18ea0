"""Uses of kornia's transforms. What they do to images is tested without kornia in test_mixers.py."""

from tests.adapters.uses import Use


def _mixup(space, case):
    mix = space.RandomMixUpV2(
        case.pick(None, (0.2, 0.6)), p=case.pick(1.0, 0.5), data_keys=["input", "class"]
    )
    return [part for _ in range(3) for part in mix(case.images(case.n, 3, 6, 5), case.integers(7))]


def _cutmix(space, case):
    options = {"cut_size": case.pick(None, (0.1, 0.7)), "use_correct_lambda": case.pick(True, False)}
    mix = space.RandomCutMixV2(data_keys=["input", "class"], p=case.pick(1.0, 0.5), **options)
    return [part for _ in range(3) for part in mix(case.images(case.n, 3, 6, 5), case.integers(7))]


USES = [
    Use("kornia", "RandomMixUpV2", _mixup, formula=False),
    Use("kornia", "RandomCutMixV2", _cutmix, formula=False),
]
