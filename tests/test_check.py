"""`python -m ssl_kernels check`: every operation is in it, right kernels pass, and a wrong one fails."""

import re

import pytest
import torch

from ssl_kernels import backends, check, cli
from ssl_kernels.triton.tiles import TILES


def test_every_operation_is_checked():
    assert set(check.CALLS) == set(backends.operations())


@pytest.mark.parametrize("op", check.CALLS)
def test_kernels_of_this_machine_pass(op, capsys):
    assert cli.main(["check", op, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("ok") for line in lines) >= 3 and not any("FAILED" in line for line in lines)


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_a_wrong_kernel_fails(wrong, monkeypatch, capsys):
    def found(backend, function, inputs, options, right=check.value_and_gradients):
        values, gradients = right(backend, function, inputs, options)
        if backend == "chunked" and inputs[0].dtype == torch.float32:
            spoilt = gradients if wrong == "gradient" else values
            spoilt[0] = spoilt[0] * (float("nan") if wrong == "nan" else 1.001)
        return values, gradients

    monkeypatch.setattr(check, "value_and_gradients", found)
    assert cli.main(["check", "sigmoid_pairs", "--device", "cpu"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert len(failed) == 1 and "chunked" in failed[0] and "float32" in failed[0]


def test_unknown_operation_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", "nonesuch"])
    assert "nonesuch" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nope", "", "meta", "cuda:99", "hpu"])
def test_a_device_that_cannot_be_used_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "mixup", "--device", name])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert re.fullmatch(
        rf"python -m ssl_kernels check: error: --device must be .*, got {name} ?(\(.*\))?\n", printed.err
    )


def test_an_error_that_is_not_finite_fails_even_if_plain_pytorch_shares_it(monkeypatch, capsys):
    infinite = (float("inf"), 0.0)
    monkeypatch.setattr(check, "worst_errors", lambda *_: (infinite, infinite))
    assert cli.main(["check", "mixup", "--device", "cpu"]) == 1
    assert not any(line.endswith("ok") for line in capsys.readouterr().out.splitlines())


def test_every_tile_shape_of_the_gpu_kernels_is_checked():
    """Widths on both sides of each limit at which csrc/cuda/launcher.cuh and the Triton tables change kernels."""
    rows, widths = zip(*check.SHAPES, strict=True)
    assert {128, 200, 520} <= set(widths) and max(rows) > 512
    for table in (kernels for classes in TILES.values() for kernels in classes.values()):
        for kernel, entries in table.items():
            needed = [limit for limit, _ in entries if limit is not None and limit >= 128]
            assert all(any(width > limit for width in widths) for limit in needed), kernel
    calls = check.CALLS["contrastive"](8, 16, torch.float32, torch.Generator())
    queues = [options["queue"] for *_, options in calls if "queue" in options]
    assert any(queue.dtype == torch.bfloat16 for queue in queues)
