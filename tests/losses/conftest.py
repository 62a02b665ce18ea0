"""A fixture of the tests of what losses refuse."""

import inspect

import pytest

from ssl_kernels import losses
from ssl_kernels.losses import _softmax
from tests.losses.cases import CASES

REACHED = (
    "contrastive",
    "class_contrastive",
    "one_node",
    "row_pairs",
    "row_pairs_loss",
    "paired_logits",
    "as_one_node",
)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails the test if an operation is reached."""

    def fail(*_, **__):
        pytest.fail("the operation ran on bad input")

    modules = [inspect.getmodule(getattr(losses, case.loss)) for case in CASES]
    for module in (*modules, _softmax):
        for operation in REACHED:
            if hasattr(module, operation):
                monkeypatch.setattr(module, operation, fail)
