#!/usr/bin/env bash
# torch 2.14.1, CPU: torch.distributions.Beta(a, a) with a = 1e-3 gives exactly 1/2 in a quarter of its draws, in float32
# and in float64; right is never (numpy 2.2: none in 20,000). Expected at most 0 and 1 by rounding: both gammas of a draw
# underflow to the least number of their dtype, and their share is then 1/2. Whoever draws mixup's lambda with a small
# alpha mixes a quarter of the batches half and half. From a = 1e-2 on it is right.
#
# Seen: a = 0.001: 0.24 exactly 1/2 in float32, 0.25 in float64, 0 in numpy; a = 0.01: 0 everywhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$folder/try.py" <<'PY'
import numpy
import torch

torch.manual_seed(0)
draws = 20_000


def share_of_halves(a, dtype):
    concentration = torch.tensor(a, dtype=dtype)
    lam = torch.distributions.Beta(concentration, concentration).sample((draws,))
    return (lam == 0.5).double().mean().item()


for a, least, most in ((1e-3, 0.2, 0.3), (1e-2, 0.0, 0.0)):
    found = {str(dtype): share_of_halves(a, dtype) for dtype in (torch.float32, torch.float64)}
    exact = (numpy.random.default_rng(0).beta(a, a, draws) == 0.5).mean()
    print(f"a = {a}: {found}, numpy {exact}")
    assert exact == 0
    assert all(least <= share <= most for share in found.values()), "torch behaves differently now"
PY
"$folder/env/bin/python" "$folder/try.py"
