"""Uses of torchvision's v2 transforms, which the tests have: no formulas beside them."""

from tests.adapters.uses import Use


def _plain(name):
    def run(space, case):
        mix = getattr(space, name)(alpha=case.pick(0.3, 1.0), num_classes=7)
        images, labels = case.images(case.n, 3, 6, 5), case.integers(7)
        return [tensor.double() for _ in range(3) for tensor in mix(images, labels)]

    return run


def _of_a_dict(name):
    def run(space, case):
        from torchvision import tv_tensors

        mix = getattr(space, name)(num_classes=7)
        images = tv_tensors.Image(case.images(case.n, 3, 6, 5))
        clip = tv_tensors.Video(case.images(case.n, 2, 3, 6, 5))
        out = mix({"image": images, "clip": clip, "labels": case.integers(7), "names": ["x"] * case.n})
        assert type(out["image"]) is type(images) and out["names"] == ["x"] * case.n
        return out["image"], out["clip"], out["labels"].double()

    return run


USES = [
    Use("torchvision", name, make(name), way, formula=False)
    for name in ("MixUp", "CutMix")
    for make, way in ((_plain, ""), (_of_a_dict, "of a dictionary of images and videos"))
]
