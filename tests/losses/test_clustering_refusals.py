"""What losses against prototypes, of correlations and of patches refuse."""

import pytest
import torch

from ssl_kernels import losses, nn, sinkhorn

X, Y, V = torch.ones(4, 8), torch.ones(6, 8), torch.ones(3, 4, 8)
M = torch.ones(2, 4, 5, dtype=torch.bool)
T = torch.ones(2, 4, 5, 8)
BAD = [
    (sinkhorn, (X[0],), {}, ValueError, r"sinkhorn: scores must have shape \(N, D\)"),
    (sinkhorn, (X, 0.0), {}, ValueError, "sinkhorn: epsilon must be finite and > 0, got 0.0"),
    (sinkhorn, (X, 0.05, 0), {}, ValueError, "sinkhorn: iterations must be an integer >= 1, got 0"),
    (sinkhorn, (X,), {"group": "all"}, RuntimeError, "sinkhorn: torch.distributed must be initialised"),
    (losses.swav_loss, (X, Y), {}, ValueError, r"swav_loss: features must have shape \(V, N, D\)"),
    (losses.swav_loss, (3, Y), {}, TypeError, "swav_loss: features must be a tensor or a sequence"),
    (losses.swav_loss, ([], Y), {}, ValueError, "swav_loss: features must hold at least one view, got none"),
    (losses.swav_loss, ([X, Y], Y), {}, ValueError, r"swav_loss: features\[1\] must have 4 rows"),
    (
        losses.swav_loss,
        ([X], Y),
        {"assign": (0,)},
        ValueError,
        "swav_loss: features must hold at least 2 crops, got 1",
    ),
    (
        losses.swav_loss,
        (V, Y[:, :5]),
        {},
        ValueError,
        "swav_loss: prototypes must have width 8 as features has, got 5",
    ),
    (
        losses.swav_loss,
        (V, Y),
        {"assign": (0, 3)},
        ValueError,
        "swav_loss: assign must hold crops from 0 to 2, got 3",
    ),
    (losses.swav_loss, (V, Y), {"assign": (1, 1)}, ValueError, "swav_loss: assign must hold different crops"),
    (
        losses.swav_loss,
        (V, Y),
        {"queue": [X]},
        ValueError,
        "swav_loss: queue must hold 2 tensors as assign has",
    ),
    (losses.swav_loss, (V, Y), {"queue": X[:, :3]}, ValueError, "swav_loss: queue must have width 8"),
    (losses.swav_loss, (V, Y), {"reduction": "avg"}, ValueError, "swav_loss: reduction must be"),
    (losses.swav_loss, (V.long(), Y), {}, TypeError, r"swav_loss: features\[0\] must be float64, float32"),
    (
        losses.dino_loss,
        (V[:1], V[:1], Y),
        {},
        ValueError,
        "dino_loss: student must hold a crop beside the teacher's",
    ),
    (losses.dino_loss, (V[:2], V, Y), {}, ValueError, "dino_loss: teacher must hold at most the 2 crops"),
    (
        losses.dino_loss,
        (V, V[..., :3]),
        {},
        ValueError,
        "dino_loss: teacher must have width 8 as student has, got 3",
    ),
    (losses.dino_loss, (V, V, Y, X), {}, ValueError, "dino_loss: teacher_prototypes must have 6 rows"),
    (losses.dino_loss, (V, V, None, Y), {}, ValueError, "dino_loss: teacher_prototypes must be None without"),
    (
        losses.dino_loss,
        (V, V, Y),
        {"center": X[0]},
        ValueError,
        r"dino_loss: center must have shape \(6,\), got \(8,\)",
    ),
    (
        losses.dino_loss,
        (V, V, Y),
        {"centering": "mean"},
        ValueError,
        'dino_loss: centering must be "center" or',
    ),
    (
        losses.dino_loss,
        (V, V, Y),
        {"centering": "sinkhorn", "center": Y[:, 0]},
        ValueError,
        'dino_loss: center must be None with centering "sinkhorn"',
    ),
    (
        losses.dino_loss,
        (V, V, Y),
        {"teacher_temperature": 0},
        ValueError,
        "dino_loss: teacher_temperature must be",
    ),
    (
        losses.dino_loss,
        (T, T, Y),
        {"mask": M.float()},
        TypeError,
        "dino_loss: mask must be bool, got float32",
    ),
    (
        losses.dino_loss,
        (T, V, Y),
        {"mask": M},
        ValueError,
        r"dino_loss: teacher must have shape \(2, 4, 5, D\)",
    ),
    (
        losses.barlow_twins_loss,
        (X, Y),
        {},
        ValueError,
        "barlow_twins_loss: z1 must have 4 rows as z0 has, got 6",
    ),
    (
        losses.barlow_twins_loss,
        (X[:1], X[:1]),
        {},
        ValueError,
        "barlow_twins_loss: z0 must have at least 2 rows",
    ),
    (
        losses.barlow_twins_loss,
        (X, X),
        {"eps": 0.0},
        ValueError,
        "barlow_twins_loss: eps must be finite and > 0",
    ),
    (losses.vicreg_loss, (X, X, "1"), {}, TypeError, "vicreg_loss: invariance must be a number or a tensor"),
    (losses.vicreg_loss, (X, X), {"backend": "cuda"}, ValueError, 'vicreg_loss: backend must be "native", '),
    (losses.mae_loss, (X, Y), {}, ValueError, r"mae_loss: target must have shape \(4, 8\) as prediction has"),
    (
        losses.mae_loss,
        (X, X, X),
        {},
        ValueError,
        r"mae_loss: mask must have shape \(4,\) as prediction has patches",
    ),
    (
        losses.mae_loss,
        (X[:, :1], X[:, :1]),
        {},
        ValueError,
        "mae_loss: prediction must have patches of C >= 2",
    ),
    (nn.DINOCenter, (0,), {}, ValueError, "DINOCenter: size must be an integer >= 1, got 0"),
    (
        nn.DINOCenter(5).update_,
        (V,),
        {},
        ValueError,
        "DINOCenter.update_: teacher must have width 5 as center has",
    ),
]


@pytest.mark.parametrize("call, arguments, options, error, message", BAD)
def test_bad_input_is_named(call, arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(*arguments, **options)
