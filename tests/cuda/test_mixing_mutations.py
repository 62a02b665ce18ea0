"""A sample of tests/cuda/mutate_mixing.py: the checks notice a missing barrier and guard. All of it is slow."""

import pytest

from tests.cuda import mutate_mixing as mutate

SAMPLE = {"walk: the first held aside", "cutmix: held for this cycle only"}


@pytest.mark.slow
@pytest.mark.parametrize("operation", mutate.CHECKS)
def test_unharmed_kernels_pass_the_checks(nvcc, operation):
    assert mutate.noticed_by(operation, mutate.build(operation)) is None


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(mutation, id=mutation.name, marks=[] if mutation.name in SAMPLE else pytest.mark.slow)
        for mutation in mutate.MUTATIONS
    ],
)
def test_mutation_is_noticed(nvcc, mutation):
    assert mutate.noticed_by(mutation.operation, mutate.build(mutation.operation, mutation)) is not None
