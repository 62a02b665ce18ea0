"""`batch_hard` on every backend of the CPU: its choices judged by float64, ties, NaN, and its operators."""

import pytest
import torch

from ssl_kernels.ops.batch_hard import DISTANCES, batch_hard
from ssl_kernels.reference.batch_hard import batch_hard as reference
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, run_python
from tests.support.batch_hard import check_choice, labels_of

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_distance = pytest.mark.parametrize("distance", DISTANCES)


def by_definition(embeddings, labels, normalize, distance):
    """Each row's best indices by loops over exact integers, or None where the sets are empty."""
    x = [[int(v) for v in row] for row in embeddings.tolist()]
    assert not normalize

    def between(a, b):
        if distance == "cosine":
            return -sum(p * q for p, q in zip(a, b, strict=True))
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    found = []
    for i in range(len(x)):
        own = [j for j in range(len(x)) if j != i and labels[j] == labels[i]]
        other = [j for j in range(len(x)) if labels[j] != labels[i]]
        farthest = max(own, key=lambda j: (between(x[i], x[j]), -j), default=-1)
        nearest = min(other, key=lambda j: (between(x[i], x[j]), j), default=-1)
        found.append((farthest, nearest))
    return found


@every_backend
@every_distance
@every_dtype
@pytest.mark.parametrize(
    "n, d, classes", [(1, 1, 1), (2, 3, 2), (9, 2, 3), (40, 3, 7), (40, 4, 40), (300, 2, 30)]
)
def test_choice_is_the_definitions_where_keys_are_exact(backend, dtype, n, d, classes, distance):
    """Small integers: no key is rounded, and most are equal to others, so the lowest index is chosen."""
    x = torch.randint(-3, 4, (n, d), generator=torch.Generator().manual_seed(n)).to(dtype)
    labels = labels_of(n, classes)
    found = batch_hard(x, labels, normalize=False, distance=distance, backend=backend)
    expected = by_definition(x, labels.tolist(), False, distance)
    assert list(zip(*(index.tolist() for index in found), strict=True)) == expected


@every_backend
@every_distance
@every_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n, d, classes", [(2, 5, 1), (70, 33, 20), (257, 16, 3), (650, 9, 200)])
def test_choice_is_the_best_of_float64(backend, dtype, n, d, classes, distance, normalize):
    x, labels = random_rows(n, d, dtype, spread=0.5), labels_of(n, classes)
    found = batch_hard(x, labels, normalize=normalize, distance=distance, backend=backend)
    check_choice(found, x, labels, normalize, distance)


@every_backend
def test_any_labels(backend):
    """Only their equality counts: negative ones, and ones that differ beyond 32 bits."""
    x, labels = random_rows(300, 8), labels_of(300, 50) // 2**33
    expected = reference(x, labels)
    for values in (labels - 25, labels * 2**32, labels * 2**33 + 5, -(2**63) + labels):
        found = batch_hard(x, values, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_backend
@every_distance
def test_rows_without_a_positive_or_negative(backend, distance):
    x = random_rows(300, 8)
    positive, negative = batch_hard(x, torch.arange(300), distance=distance, backend=backend)
    assert (positive == -1).all() and (negative >= 0).all()
    positive, negative = batch_hard(x, torch.full((300,), 7), distance=distance, backend=backend)
    assert (positive >= 0).all() and (negative == -1).all()
    labels = torch.zeros(300, dtype=torch.int64)
    labels[280] = 1
    positive, negative = batch_hard(x, labels, distance=distance, backend=backend)
    assert (positive == -1).nonzero().flatten().tolist() == [280]
    assert (negative[labels == 0] == 280).all()


@every_backend
@every_distance
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rows_and_zero_rows(backend, distance, normalize):
    """All distances equal: each row's first other of its label, and the first of another."""
    labels = torch.arange(600) % 3
    for x in (torch.full((600, 4), 0.5), torch.zeros(600, 4)):
        positive, negative = batch_hard(x, labels, normalize=normalize, distance=distance, backend=backend)
        first = torch.arange(3)
        assert torch.equal(positive[3:], first[labels[3:]])
        assert torch.equal(positive[:3], first + 3)
        assert torch.equal(negative, torch.where(labels == 0, 1, 0))


@every_backend
@every_distance
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_goes_first(backend, distance, normalize):
    x = random_rows(300, 4)
    x[[270, 200], 1] = torch.nan
    x[201] = torch.nan
    labels = torch.arange(300) // 100
    positive, negative = batch_hard(x, labels, normalize=normalize, distance=distance, backend=backend)
    assert (negative[:200] == 200).all()
    rest = [i for i in range(200, 300) if i not in (200, 201, 270)]
    assert (positive[rest] == 200).all()
    assert positive[200] == 201 and positive[201] == positive[270] == 200
    assert (negative[[200, 201, 270]] == 0).all()  # every key of theirs is NaN


@every_backend
@pytest.mark.parametrize("value", [torch.inf, 3e25])
def test_infinite_keys_are_compared(backend, value):
    """Rows too long for float32's squares: infinite keys count as numbers, those that are NaN go first."""
    x = torch.zeros(6, 2)
    x[:, 0] = torch.tensor([1.0, 2.0, -value, 3.0, value, 4.0])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = batch_hard(x, labels, normalize=False, distance="cosine", backend=backend)
    expected = reference(x, labels, False, "cosine")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if value != torch.inf:
        # As seen from row 0 every key is finite; row 2 has the one of −value · value.
        assert found[0].tolist()[:2] == [2, 2] and found[1].tolist()[0] == 4


@every_backend
def test_any_strides(backend):
    x, labels = random_rows(80, 6), labels_of(80, 9)
    expected = reference(x, labels)
    wide = torch.randn(80, 2, 9)
    wide[:, 1, 3:] = x
    every_other = torch.stack((labels, labels + 100), 1)[:, 0]
    for rows in (wide[:, 1, 3:], x.T.contiguous().T):
        found = batch_hard(rows, every_other, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("n", [200, 1500])
def test_any_number_of_threads(n, set_threads):
    x, labels = random_rows(n, 24), labels_of(n, n // 15)
    exact = torch.randint(-3, 4, (n, 2), generator=torch.Generator().manual_seed(n)).float()
    expected = batch_hard(exact, labels, normalize=False, backend="reference")
    for threads in (1, 2, 3):
        set_threads(threads)
        check_choice(batch_hard(x, labels, backend="native"), x, labels, True, "euclidean")
        found = batch_hard(exact, labels, normalize=False, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


CHECK = """
import sys
from ssl_kernels import _C
from tests.ops.test_batch_hard import *
assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
for dtype in DTYPES:
    for distance in DISTANCES:
        test_choice_is_the_definitions_where_keys_are_exact("native", dtype, 300, 2, 30, distance)
        test_choice_is_the_best_of_float64("native", dtype, 257, 16, 3, distance, True)
test_equal_rows_and_zero_rows("native", "euclidean", True)
"""


@pytest.mark.parametrize("instruction_set", [pytest.param("portable", marks=pytest.mark.slow), "avx2"])
def test_narrower_instruction_sets(instruction_set):
    if instruction_set == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    run_python(CHECK, instruction_set, SSL_KERNELS_CPU=instruction_set)


# The operators


@every_operator
@every_distance
def test_opcheck(backend, distance):
    operator = getattr(torch.ops.ssl_kernels.batch_hard, backend)
    torch.library.opcheck(operator, (random_rows(7, 4, torch.bfloat16), labels_of(7, 3), True, distance))


@pytest.mark.filterwarnings("ignore")
@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    torch._dynamo.reset()

    def mine(x, labels):
        return batch_hard(x, labels, backend=backend)

    compiled = torch.compile(mine, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11) if dynamic else (6,):
        x, labels = random_rows(n, 8).requires_grad_(), labels_of(n, 3)
        for found, expected in zip(compiled(x, labels), mine(x, labels), strict=True):
            assert torch.equal(found, expected)
            assert not found.requires_grad


@every_backend
def test_autocast_changes_nothing(backend):
    x, labels = random_rows(300, 24), labels_of(300, 30)
    expected = batch_hard(x, labels, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = batch_hard(x, labels, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("change, message", [
    ({"embeddings": torch.zeros(4)}, "embeddings must have shape"),
    ({"embeddings": torch.zeros(0, 3)}, "embeddings must have shape"),
    ({"embeddings": torch.zeros(4, 0)}, "embeddings must have shape"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be int64 of shape"),
    ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, "labels must be int64 of shape"),
    ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels must be int64 of shape"),
    ({"distance": "manhattan"}, 'distance must be "euclidean" or "cosine", got "manhattan"'),
])  # fmt: skip
def test_native_operator_refuses_what_it_would_read_out_of_bounds(change, message):
    named = {
        "embeddings": torch.zeros(4, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "normalize": True,
        "distance": "euclidean",
    } | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssl_kernels.batch_hard.native(*named.values())
