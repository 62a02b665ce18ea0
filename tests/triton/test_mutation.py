"""Every mutation of the Triton kernels has its place in the sources, also those that only slow tests try."""

import pytest

from tests import sites
from tests.triton import test_additions, test_edges, test_exponentials, test_layouts, test_panels
from tests.triton.mutation import SOURCES

TABLES = {
    "additions": test_additions.MUTATIONS,
    "edges": [mutation[1:] for mutation in test_edges.MUTATIONS],
    "exponentials": test_exponentials.MUTATIONS,
    "layouts": [mutation[1:] for mutation in test_layouts.MUTATIONS],
    "panels": [mutation[1:] for mutation in test_panels.MUTATIONS],
}


@pytest.mark.parametrize("table", TABLES)
def test_every_mutation_changes_one_place(table):
    for file, *mutation in TABLES[table]:
        text = (SOURCES / f"{file}.py").read_text()
        assert sites.replaced(text, *mutation) != text, mutation
