"""Annotations: every public name has them, whole, and mypy reads them in a user's program."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import ssl_kernels
from ssl_kernels import distributed

ROOT = pathlib.Path(__file__).parent.parent
ADAPTERS = [
    importlib.import_module(f"ssl_kernels.adapters.{name}") for name in ssl_kernels.adapters.LIBRARIES
]

USER = """\
import torch
import ssl_kernels
from ssl_kernels import distributed, moco_loss, nn, nt_xent_loss
from ssl_kernels.adapters.lightly import NTXentLoss

z0, z1 = torch.randn(8, 4), torch.randn(8, 4)
loss: torch.Tensor = nt_xent_loss(z0, z1, 0.5)
loss = ssl_kernels.clip_loss(z0, z1, torch.tensor(2.0).exp(), label_smoothing=0.1)
loss = moco_loss(z0, z1, nn.MoCoQueue(8, 4, torch.bfloat16))
loss = distributed.nt_xent_loss(z0, z1)
loss = NTXentLoss(0.1, memory_bank_size=(64, 4)).forward(z0, z1)
loss = ssl_kernels.mixup_cross_entropy(z0, torch.arange(8), lam=0.3, permutation=torch.arange(8))
reasons: dict[str, str | None] = ssl_kernels.backends_for(nt_xent_loss, z0, z1)
nn.MomentumEncoder(torch.nn.Linear(4, 4)).update_(torch.nn.Linear(4, 4)).updates += 1
with ssl_kernels.use_backend("reference"):
    nt_xent_loss(z0, "z1")  # wrong
nn.NTXentLoss(temperature="warm")  # wrong
nt_xent_loss(z0, z1).no_such_attribute  # wrong
ssl_kernels.no_such_loss(z0, z1)  # wrong
"""


def public_functions():
    """{name: function} of what users call: functions, and constructors and public methods of classes."""
    found = {}
    for module in (ssl_kernels, ssl_kernels.nn, distributed, *ADAPTERS):
        for name in set(module.__all__) - {"adapters", "nn", *ssl_kernels.adapters.LIBRARIES}:
            value = vars(module).get(name)  # None: made of a class of the library that it stands for
            if value is None or not value.__module__.startswith("ssl_kernels."):
                continue
            if inspect.isfunction(value):
                found[f"{module.__name__}.{name}"] = value
                continue
            for member, function in vars(value).items():
                if inspect.isfunction(function) and (member == "__init__" or member[0] != "_"):
                    found[f"{module.__name__}.{name}.{member}"] = function
    return found


@pytest.mark.slow
def test_every_public_function_is_annotated_whole():
    missing = []
    for name, function in public_functions().items():
        signature = inspect.signature(function)
        empty = [
            each.name
            for each in signature.parameters.values()
            if each.annotation is each.empty and each.name != "self"
        ]
        if signature.return_annotation is signature.empty:
            empty.append("return")
        missing += [f"{name}: {', '.join(empty)}"] * bool(empty)
    assert not missing
    assert len(public_functions()) > 100


def test_annotations_of_a_loss():
    hints = {
        name: each.annotation for name, each in inspect.signature(ssl_kernels.clip_loss).parameters.items()
    }
    assert hints["image_features"] is torch.Tensor and hints["logit_scale"] == float | torch.Tensor
    assert hints["ids"] == torch.Tensor | None and hints["backend"] == str | None


@pytest.mark.slow
def test_mypy_reads_them_in_a_program_of_a_user(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed (make test-peers installs it)")
    (tmp_path / "user.py").write_text(USER)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        "user.py",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    wrong = [i for i, line in enumerate(USER.splitlines(), 1) if line.endswith("# wrong")]
    told = [int(line) for line in re.findall(r"^user\.py:(\d+): error", done.stdout, re.MULTILINE)]
    assert sorted(set(told)) == wrong, done.stdout + done.stderr
