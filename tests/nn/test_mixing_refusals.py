"""What `nn.Mixup` refuses, and what it then leaves as it was."""

import pytest
import torch

from ssl_kernels import backends
from ssl_kernels.nn import Mixup
from tests.helpers import same_bits

BAD_ARGUMENTS = [
    ({"mixup_alpha": -1.0}, "mixup_alpha must be a number >= 0, got -1.0"),
    ({"mixup_alpha": 0.0}, "mixup_alpha or cutmix_alpha must be > 0, got 0"),
    ({"prob": 1.5}, r"prob must be in \[0, 1\], got 1.5"),
    ({"switch_prob": -0.5}, r"switch_prob must be in \[0, 1\], got -0.5"),
    ({"label_smoothing": 2}, r"label_smoothing must be in \[0, 1\], got 2"),
    ({"mode": "half"}, 'mode must be "batch", "pair", "sample" or "elem", got \'half\''),
    ({"pairing": "swap"}, 'pairing must be "random", "flip" or "roll", got \'swap\''),
    ({"mode": "pair", "pairing": "roll"}, 'pairing must be "random" or "flip", got \'roll\''),
    ({"cutmix_minmax": (0.5, 0.2)}, "cutmix_minmax must hold 0 <= least < most <= 1"),
    ({"mean": [0.5]}, "mean and std must be given together"),
    ({"mixup_alpha": None}, "mixup_alpha must be a number >= 0, got None"),
    ({"mixup_alpha": "1"}, "mixup_alpha must be a number >= 0, got '1'"),
    ({"cutmix_alpha": float("nan")}, "cutmix_alpha must be a number >= 0, got nan"),
    ({"cutmix_minmax": 0.3}, "cutmix_minmax must hold 0 <= least < most <= 1, got 0.3"),
    ({"cutmix_minmax": (0.1,)}, "cutmix_minmax must hold 0 <= least < most <= 1"),
    ({"prob": float("nan")}, r"prob must be in \[0, 1\], got nan"),
    ({"prob": None}, r"prob must be in \[0, 1\], got None"),
    ({"mode": ["batch"]}, 'mode must be "batch", "pair", "sample" or "elem"'),
    ({"num_classes": 0}, "num_classes must be an integer > 0, got 0"),
    ({"num_classes": 2.5}, "num_classes must be an integer > 0, got 2.5"),
    ({"generator": "seed"}, "generator must be a torch.Generator, an integer or None, got 'seed'"),
    ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got torch.float64"),
    ({"mean": [0.5], "std": [0.0]}, r"std must be finite and > 0, got \[0.0\]"),
    ({"mean": [float("nan")], "std": [0.5]}, r"mean must be finite, got \[nan\]"),
    ({"mean": [0.5] * 3, "std": [0.5]}, "std must have 3 numbers as mean has"),
    ({"backend": "cuda"}, 'backend must be "native", "triton", "chunked", "reference" or None, got \'cuda\''),
    ({"target_kind": "class"}, 'target_kind must be "classes", "values" or None, got \'class\''),
    ({"min_visible": 1.5}, r"min_visible must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": 0.1}, "label_smoothing must be 0 without dense targets, got 0.1; pass it to"),
    (
        {"label_smoothing": 0.1, "num_classes": 5, "dense_target": False},
        "label_smoothing must be 0 without dense targets",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^Mixup: {message}"):
        Mixup(**arguments)


SHARED = torch.rand(4, 2)
with torch.inference_mode():
    FROZEN = torch.rand(4, 2)
BAD_BATCHES = [
    ({}, (torch.zeros(4, 2, dtype=torch.int64),), TypeError, "x must be floating, or uint8 with"),
    ({"mean": [0.5], "std": [0.5]}, (torch.zeros(4, 1, 2, 2),), TypeError, "x must be uint8"),
    ({"cutmix_alpha": 1.0}, (torch.zeros(4, 2),), ValueError, r"x must have shape \(B, ..., H, W\)"),
    ({}, (torch.zeros(4, 2), torch.zeros(3, dtype=int)), ValueError, r"target must have shape \(4,\)"),
    (
        {"dense_target": True},
        (torch.zeros(4, 2), torch.zeros(4, dtype=int)),
        ValueError,
        "num_classes must be",
    ),
    (
        {},
        (torch.zeros(4, 2), None, torch.zeros(4, 2, dtype=torch.complex64)),
        TypeError,
        "masks must be floating, integer or bool for mixup, got torch.complex64",
    ),
    (
        {"cutmix_alpha": 1.0},
        (torch.zeros(4, 1, 3, 3), None, torch.zeros(4, 3, 2)),
        ValueError,
        "masks must have the height and width of x",
    ),
    (
        {"num_classes": 3},
        (torch.rand(4, 2), torch.tensor([0, 1, 3, 2])),
        ValueError,
        r"target must be in \[0, 3\), got 3",
    ),
    ({}, (torch.rand(4, 2), [0, 1, 2, 3]), TypeError, "target must be a tensor, got list"),
    (
        {},
        (torch.rand(4, 2), torch.zeros(4, dtype=torch.complex64)),
        TypeError,
        "target must be integer, bool or floating, got complex64",
    ),
    ({}, (torch.rand(4, 2), torch.zeros(4, 3, device="meta")), ValueError, "target must be on cpu as x is"),
    ({}, (torch.rand(4, 2), None, [[1.0]] * 4), TypeError, "masks must be a tensor, got list"),
    ({}, (torch.rand(4, 2), None, torch.zeros(3, 2)), ValueError, r"masks must have shape \(4, ...\)"),
    (
        {},
        (torch.rand(4, 2), None, torch.zeros(4, 2, device="meta")),
        ValueError,
        "masks must be on cpu as x is",
    ),
    (
        {},
        (torch.rand(4, 2), None, torch.zeros(4, 2, requires_grad=True)),
        ValueError,
        "masks must not require grad",
    ),
    ({}, (torch.rand(4, 2), None, torch.zeros(4, 1).expand(4, 2)), ValueError, "masks must not overlap"),
    ({}, ([0.5],), TypeError, "x must be a tensor, got list"),
    ({}, (torch.tensor(1.0),), ValueError, r"x must have shape \(B, ...\) with no dimension of 0, got \(\)"),
    (
        {},
        (torch.rand(0, 2),),
        ValueError,
        r"x must have shape \(B, ...\) with no dimension of 0, got \(0, 2\)",
    ),
    ({}, (torch.rand(4, 2, requires_grad=True),), ValueError, "x must not require grad"),
    ({}, (torch.rand(1, 2).expand(4, 2),), ValueError, "x must not overlap itself"),
    ({}, (torch.rand(4, 2).to_sparse(),), TypeError, "x must be a dense tensor, got a sparse_coo one"),
    (
        {"num_classes": 5},
        (torch.rand(4, 2), torch.zeros(4, dtype=int).to_sparse()),
        TypeError,
        "target must be a dense tensor",
    ),
    ({}, (torch.rand(4, 2), None, torch.rand(4, 2).to_sparse()), TypeError, "masks must be a dense tensor"),
    ({}, (SHARED, None, SHARED[:, :1]), ValueError, "masks must lie in memory of their own"),
    ({}, (SHARED, None, SHARED[:, 1:]), ValueError, "masks must lie in memory of their own"),
    ({}, (SHARED[:, 1:], None, SHARED), ValueError, "masks must lie in memory of their own"),
    ({"backend": "chunked"}, (torch.rand(4, 2), None, FROZEN), ValueError, "masks must not be an inference"),
    *[
        (arguments | {"backend": "triton"}, inputs, ValueError, 'backend "triton" cannot run this call')
        for arguments, inputs in (
            ({}, (torch.rand(4, 2), None, torch.rand(4, 2))),
            ({"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, (torch.rand(4, 1, 3, 3), None, torch.rand(4, 3, 3))),
            ({"mean": [0.5], "std": [0.5]}, (torch.zeros(4, 1, 3, 3, dtype=torch.uint8),)),
        )
    ],
    (
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        (torch.rand(4, 1, 3, 3), None, torch.zeros(2, 3, 3)),
        ValueError,
        r"masks must have shape \(4, ...\)",
    ),
]


@pytest.mark.parametrize("arguments, inputs, error, message", BAD_BATCHES)
def test_bad_batches(arguments, inputs, error, message):
    watched = [value for value in inputs if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
    before = [value.to_dense().clone() for value in watched]
    with pytest.raises(error, match=f"^Mixup: {message}"):
        Mixup(**arguments)(*inputs)
    assert all(same_bits(value.to_dense(), old) for value, old in zip(watched, before, strict=True))


def test_targets_that_would_be_overwritten_are_refused():
    """As classes in the memory of what is mixed in place; a target that comes out new may be the batch itself."""
    x = torch.arange(16).view(4, 2, 2)
    before = x.clone()
    for masks in (None, x.clone()):
        with pytest.raises(ValueError, match=r"^Mixup: target must lie in memory of its own"):
            Mixup(0, 1.0, generator=0)(
                x if masks is None else x.clone(), (x if masks is None else masks)[:, 0, 0], masks
            )
    assert torch.equal(x, before)
    module = Mixup(1.0, generator=0)
    mixed, target = module(*[torch.arange(8.0).view(4, 2)] * 2)
    torch.testing.assert_close(mixed, target)
    side_by_side = torch.rand(4, 4, 6, 6)
    expected = side_by_side.clone()
    images, masks = Mixup(1.0, generator=3)(side_by_side[:, :3], masks=side_by_side[:, 3:])
    other = Mixup(1.0, generator=3, inplace=False)(expected[:, :3], masks=expected[:, 3:])
    torch.testing.assert_close((images, masks), other)


def test_masks_that_a_backend_cannot_take_leave_the_images_alone(monkeypatch):
    """A backend may take the images and not the masks."""
    takes = backends._operations["cutmix"]

    def unsupported(backend, *tensors):
        return "it takes floating pixels" if tensors[0].dtype == torch.int64 else takes(backend, *tensors)

    monkeypatch.setitem(backends._operations, "cutmix", unsupported)
    x, masks = torch.rand(4, 1, 6, 6), torch.arange(144).view(4, 6, 6)
    before = x.clone(), masks.clone()
    module = Mixup(0, 1.0, generator=0, backend="native")
    with pytest.raises(ValueError, match=r'^Mixup: backend "native" cannot run this call: it takes floating'):
        module(x, masks=masks)
    assert same_bits(x, before[0]) and same_bits(masks, before[1])
