"""`contrastive` on any call: hypothesis draws it, and the judge is held to notice a wrong number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kernels.ops.contrastive import contrastive
from tests.helpers import BACKENDS, DTYPES, random_rows
from tests.support.contrastive import (
    check_against_float64,
    check_results,
    on_backend,
    random_call,
    results_and_gradients,
    term_sums,
)


@st.composite
def calls(draw):
    n = draw(st.one_of(st.integers(1, 80), st.integers(257, 300)))
    m = draw(st.one_of(st.none(), st.integers(1, 80), st.integers(257, 300)))
    normalize = draw(st.booleans())
    return random_call(
        n,
        m,
        draw(st.integers(1, 40)),
        draw(st.sampled_from(DTYPES)),
        temperature=10 ** draw(st.floats(-3, 2)),
        positives=draw(st.integers(0, 3)),
        ids=draw(st.integers(0, 4)),
        spread=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 1000)),
        normalize_rows=normalize,
        normalize_columns=normalize if m is None else draw(st.booleans()),
        keep_diagonal=m is not None and draw(st.booleans()),
        both_directions=m is not None and draw(st.booleans()),
    )


@given(call=calls())
def test_any_call_matches_float64(call):
    for backend in BACKENDS:
        check_against_float64(backend, call)


@given(n=st.integers(1, 70), seed=st.integers(0, 1000), temperature=st.floats(0.01, 10))
def test_square_case_is_the_rectangular_one_without_its_diagonal(n, seed, temperature):
    z, ids = random_rows(n, 9, torch.float64, seed=seed), torch.arange(n)
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    for backend in BACKENDS:
        square = contrastive(z, None, scale, backend=backend)
        both = contrastive(z, z, scale, row_ids=ids, column_ids=ids, both_directions=True, backend=backend)
        torch.testing.assert_close(square.lse, both.lse)
        torch.testing.assert_close(square.lse, both.column_lse)


@given(
    n=st.integers(1, 60),
    cut=st.integers(1, 60),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.005, 0.1, 5.0]),
)
def test_shards_of_columns_merge_by_logaddexp(n, cut, seed, temperature):
    x, y = random_rows(n, 9, torch.float64, seed=seed), random_rows(61, 9, torch.float64, seed=seed + 1)
    scale = torch.tensor(1 / temperature, dtype=torch.float64)
    for backend in BACKENDS:
        whole, left, right = (
            contrastive(x, part, scale, backend=backend).lse for part in (y, y[:cut], y[cut:])
        )
        torch.testing.assert_close(torch.logaddexp(left, right), whole)


@given(seed=st.integers(0, 1000), m=st.integers(2, 70))
def test_order_of_columns_does_not_matter(seed, m):
    call = random_call(35, m, 9, torch.float64, seed=seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    for backend in BACKENDS:
        lse = contrastive(call.rows, call.columns, call.scale, backend=backend).lse
        permuted = contrastive(call.rows, call.columns[order], call.scale, backend=backend).lse
        torch.testing.assert_close(lse, permuted)


def test_a_wrong_number_is_noticed():
    """The rule of tests/support rejects an error of 1e-5 in one number of any result."""
    call = random_call(70, 66, 8, both_directions=True, spread=2.0)
    right = results_and_gradients(on_backend("native"), call)
    check_results(right, call)
    sums = term_sums(call)
    for name, tensor in right.items():
        wrong = tensor.clone()
        wrong.view(-1)[-1] += 1e-5 * sums[name].view(-1)[-1]
        with pytest.raises(AssertionError, match=name):
            check_results(right | {name: wrong}, call)
