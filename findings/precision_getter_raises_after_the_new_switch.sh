#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0, CPU: a program that sets float32 precision by the new switch alone, as the documentation suggests
# (torch.backends.mkldnn.matmul.fp32_precision = "bf16", or torch.backends.fp32_precision = "tf32"), and never calls the
# legacy functions: from then on torch.get_float32_matmul_precision() raises "you have used mix of the legacy and new APIs".
# A getter is expected to answer, or to warn. A library that asks it, only to know, fails in the user's program. The new
# attributes can still be read, and "ieee" on the new switch does not raise.
#
# Seen: bf16 on mkldnn.matmul: RuntimeError; tf32 on all backends: RuntimeError; ieee on mkldnn.matmul: "highest".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import subprocess
import sys

ASK = """
import torch
{switch}
try:
    print(torch.get_float32_matmul_precision())
except RuntimeError as error:
    assert "mix of the legacy and new APIs" in str(error), error
    print("RuntimeError")
"""
SWITCHES = {
    'torch.backends.mkldnn.matmul.fp32_precision = "bf16"': "RuntimeError",
    'torch.backends.fp32_precision = "tf32"': "RuntimeError",
    'torch.backends.mkldnn.matmul.fp32_precision = "ieee"': "highest",
}
for switch, expected in SWITCHES.items():
    command = [sys.executable, "-W", "ignore", "-c", ASK.format(switch=switch)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    print(f"{switch}: {found}")
    assert found == expected, "torch behaves differently now"
PY
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6
  "$folder/$version/bin/python" "$folder/try.py"
done
