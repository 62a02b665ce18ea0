"""Losses by classes that are one node of autograd on the CPU (csrc/ops/contrastive_loss.cpp): SupCon, of rows or of
views, and infonce's SupervisedInfoNCE, which has two sums of each row, against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

import ssl_kernels
from ssl_kernels import backends, losses
from ssl_kernels.adapters.infonce import SupervisedInfoNCE
from ssl_kernels.losses.sup_con import sup_con_sum
from ssl_kernels.memory import kept_at_most
from tests.helpers import BACKENDS, random_rows, run_python
from tests.losses import definitions
from tests.losses.test_one_node import agree

NODE = "ContrastiveLoss"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05}
THREADS = pytest.mark.parametrize("threads", [1, 2])
ROWS = pytest.mark.parametrize("n", [15, 17, 65, 130, 300])
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def rows(n, d=5, seed=0, dtype=torch.float64):
    return random_rows(n, d, dtype, seed=seed)


def classes(n, count=None):
    return torch.randint(count or n // 4, (n,), generator=torch.Generator().manual_seed(n))


def learned(temperature):
    return torch.tensor(temperature, dtype=torch.float64, requires_grad=True)


@THREADS
@DTYPES
@ROWS
@pytest.mark.parametrize("unit", [1, 2**33], ids=["narrow", "wide"])
def test_classes_in_tiles_on_and_off_the_diagonal(unit, n, dtype, threads, set_threads):
    """No row is its own positive; labels of more than 32 bits are ranked first."""
    set_threads(threads)
    labels, temperature = classes(n) * unit, learned(0.3)
    x = rows(n, 21, dtype=dtype).requires_grad_()
    found = losses.sup_con_loss(x, labels, temperature, reduction="sum")
    assert NODE in found.grad_fn.name()
    expected = definitions.sup_con_loss(x.double(), labels, temperature).sum().to(found.dtype)
    agree(found, expected, (x, temperature), TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_over_a_divisor(backend):
    """Of views, also of those that begin later in memory or lie apart there; labels are those of the rows."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 5, 3])
    later, spread = rows(14).view(7, 2, 5)[1:], rows(12, 10).view(2, 6, 10).transpose(0, 1)[..., ::2]
    for x in (rows(12).view(6, 2, 5), later, spread):
        x.requires_grad_()
        with ssl_kernels.use_backend(backend):
            found = sup_con_sum(x, labels, 0.3, 11.0, normalize=True)
            expected = losses.sup_con_loss(x.flatten(0, 1), labels, 0.3, reduction="sum") / 11
        assert (NODE in found.grad_fn.name()) == (backend == "native")
        agree(found, expected, (x,), 1e-12)


def test_views_have_no_second_derivative():
    x = rows(12).view(6, 2, 5).requires_grad_()
    found = sup_con_sum(x, classes(12), 0.3, 11.0, normalize=True)
    (grad,) = torch.autograd.grad(found, x, create_graph=True)
    assert grad.shape == x.shape
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def apart(x, labels, temperature):
    """infonce's SupervisedInfoNCE in float64; a sum over nothing is 0."""
    z = F.normalize(x.double(), dim=1)
    logits, same = z @ z.T / temperature, labels[:, None] == labels
    sums = []
    for left_out in (same, ~same | torch.eye(len(z), dtype=torch.bool)):
        beside = torch.cat((logits.masked_fill(left_out, -torch.inf), torch.zeros(len(z), 1)), 1)
        sums.append(beside.logsumexp(1))
    return (sums[0] - sums[1]).mean()


@THREADS
@DTYPES
@pytest.mark.parametrize("n", [2, 15, 17, 65, 130, 300])
@pytest.mark.parametrize("d", [21, 40], ids=["recomputed", "kept"])
@pytest.mark.parametrize("temperature", [0.3, 0.01], ids=["one-shift", "shift-per-row"])
def test_sums_of_other_classes_and_of_ones_own(temperature, d, n, dtype, threads, set_threads):
    set_threads(threads)
    labels, temperature = classes(n, n // 4 + 1) * 2**33, learned(temperature)
    x = rows(n, d, dtype=dtype).requires_grad_()
    found = SupervisedInfoNCE(temperature)(x, labels)
    assert NODE in found.grad_fn.name()
    expected = apart(x, labels, temperature).to(found.dtype)
    tolerance = TOLERANCES[dtype] * (5 if dtype == torch.float32 and temperature < 0.1 else 1)
    agree(found, expected, (x, temperature), tolerance)


@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_half_of_the_tiles_are_kept(temperature, set_threads):
    set_threads(2)
    x, labels, temperature = rows(700, 40).requires_grad_(), classes(700), learned(temperature)
    with kept_at_most(1 << 20):
        found = SupervisedInfoNCE(temperature)(x, labels)
        agree(found, apart(x, labels, temperature), (x, temperature), 1e-10)


@pytest.mark.parametrize("labels", [torch.zeros(9).long(), torch.arange(9)], ids=["one", "all"])
def test_one_class_and_as_many_as_rows(labels):
    x = rows(9).requires_grad_()
    agree(SupervisedInfoNCE(0.2)(x, labels), apart(x, labels, 0.2), (x,), 1e-12)


def test_a_class_far_above_the_others():
    """Its sum must not be what all have less what is its own: of 1e12 float32 leaves nothing of the others."""
    x = rows(40, 64, dtype=torch.float32)
    x[:20] = x[0] + 1e-3 * x[:20]
    labels = (torch.arange(40) >= 20).long()
    x.requires_grad_()
    found = SupervisedInfoNCE(0.05)(x, labels)
    agree(found, apart(x, labels, 0.05).float(), (x,), 2e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_values_that_are_not_finite(value, temperature):
    """As in the sums of two calls of `contrastive`."""
    x, labels = rows(20, dtype=torch.float32), torch.arange(20) % 3
    x[4, 2] = value
    assert SupervisedInfoNCE(temperature)(x, labels).isnan()
    apart_from_it = SupervisedInfoNCE(temperature)(x[5:], labels[5:])
    assert apart_from_it.isfinite()


def instruction_set_results():
    """Values and gradients, of each dtype and temperature."""
    found = []
    for dtype in TOLERANCES:
        for temperature in (0.3, 0.01):
            x, labels = rows(150, 37, dtype=dtype).requires_grad_(), classes(150)
            for loss in (
                SupervisedInfoNCE(temperature)(x, labels),
                losses.sup_con_loss(x, labels, temperature),
            ):
                found += [loss.detach(), *torch.autograd.grad(loss, x)]
    return found


SAVE_RESULTS = """
import sys, torch
from tests.losses.test_class_node import instruction_set_results
torch.save(instruction_set_results(), sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    for name in backends.extension.build_info()["cpu_instruction_sets"]:
        run_python(SAVE_RESULTS, str(tmp_path / name), SSL_KERNELS_CPU=name)
        for found, here in zip(torch.load(tmp_path / name), instruction_set_results(), strict=True):
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.02}[here.dtype]
            torch.testing.assert_close(found, here, rtol=tolerance, atol=tolerance)
