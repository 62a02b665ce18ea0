#!/usr/bin/env bash
# torch 2.14.1, CPU, float16: log_softmax over 65537 equal columns is -inf, though every logit is 0 and the answer, -11.09,
# is far inside float16; cross_entropy's mean over 16384 rows whose loss is 9.01 is inf, and over 70000 rows NaN. The sums
# inside are taken in float16 or pass through it. Expected the float32 sums that float16 has on CUDA and that bfloat16 has
# on the CPU (right there, see the assertions). 65537 columns are MoCo's queue of 65536 beside its positive.
#
# Seen: log_softmax -inf; mean over 4096, 16384 and 70000 rows 9.0078, inf, nan.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$folder/try.py" <<'PY'
import math

import torch
import torch.nn.functional as F


def log_softmax(dtype):
    return F.log_softmax(torch.zeros(1, 65537, dtype=dtype), dim=1)[0, 0].item()


def mean_loss(rows, dtype):
    return F.cross_entropy(torch.zeros(rows, 8192, dtype=dtype), torch.zeros(rows, dtype=torch.long)).item()


print("log_softmax", log_softmax(torch.float16), log_softmax(torch.bfloat16))
means = {rows: mean_loss(rows, torch.float16) for rows in (4096, 16384, 70000)}
print("cross_entropy", means)
assert abs(log_softmax(torch.bfloat16) + math.log(65537)) < 0.1
assert abs(mean_loss(16384, torch.bfloat16) - math.log(8192)) < 0.1
assert log_softmax(torch.float16) == -math.inf, "torch behaves differently now"
assert abs(means[4096] - math.log(8192)) < 0.1 and means[16384] == math.inf, "torch behaves differently now"
assert math.isnan(means[70000]), "torch behaves differently now"
PY
"$folder/env/bin/python" "$folder/try.py"
