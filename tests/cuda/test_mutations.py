"""A sample of tests/cuda/mutate.py: the checks notice a missing barrier, wait and mask. All of it is slow."""

import pytest

from tests.cuda import mutate

SAMPLE = {
    "walk: barrier of a step",
    "walk: barrier of a step of G",
    "excluded: columns past the end",
}


def test_unharmed_kernels_pass_the_checks(nvcc):
    assert mutate.noticed_by(mutate.build()) is None


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(mutation, id=mutation.name, marks=[] if mutation.name in SAMPLE else pytest.mark.slow)
        for mutation in mutate.MUTATIONS
    ],
)
def test_mutation_is_noticed(nvcc, mutation):
    assert mutate.noticed_by(mutate.build(mutation)) is not None
