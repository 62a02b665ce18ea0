#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0, CPU: torch.distributions check their parameters by default: Beta(-1, -1) raises "Expected parameter
# concentration ... to satisfy the constraint". As soon as torch.compile has been applied to any function, one that is never
# called and belongs to some imported library as well, they do not check any more, in all of the process and in eager code too:
# Distribution.set_default_validate_args is False then, without a word. A wrong parameter gives numbers, and log_prob outside
# of the support an answer. One would expect the checks to be off while a function is traced, if at all. set_stance,
# compiler.disable and importing torch._dynamo leave them on; validate_args=True keeps them for one object.
#
# Seen: three calls raise before; after a torch.compile whose result is thrown away, Beta(-1, -1) gives a sample, the
# log_prob of 2 under Beta(2, 2) is nan and the entropy of Normal(0, -1) is nan.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import torch
from torch.distributions import Beta, Normal

CALLS = {
    "Beta(-1, -1).sample()": lambda **checks: Beta(-1.0, -1.0, **checks).sample(),
    "Beta(2, 2).log_prob(2)": lambda **checks: Beta(2.0, 2.0, **checks).log_prob(torch.tensor(2.0)),
    "Normal(0, -1).entropy()": lambda **checks: Normal(0.0, -1.0, **checks).entropy(),
}


def outcomes(**checks):
    found = {}
    for name, call in CALLS.items():
        try:
            found[name] = f"a number ({call(**checks).item():.3g})"
        except ValueError:
            found[name] = "raises"
    return found


def show(when, found):
    print(f"{torch.__version__}, {when}: {found}")
    return [answer.split()[0] for answer in found.values()]


torch.compiler.set_stance("force_eager")
torch.compiler.disable(torch.sin)
assert show("before torch.compile", outcomes()) == ["raises"] * 3
torch.compile(torch.sin)
assert show("after torch.compile, nothing called", outcomes()) == ["a"] * 3, "the checks are kept now"
assert show("with validate_args=True", outcomes(validate_args=True)) == ["raises"] * 3
PY
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6
  "$folder/$version/bin/python" -W ignore "$folder/try.py"
done
