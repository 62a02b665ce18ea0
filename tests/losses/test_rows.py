"""`row_pairs_loss`, of which some losses are made: on the CPU one node of autograd, elsewhere torch's operators."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_kernels.losses import byol_loss
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.ops.row_pairs import MEASURES
from ssl_kernels.reference.row_pairs import row_pairs
from tests.helpers import BACKENDS, random_rows

OPTIONS = {"normalize": False, "measure": "product", "reduction": "mean", "caller": "loss"}


class Passing(TorchDispatchMode):
    """Sees every operator, and runs it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def rows(*seeds, n=9, d=5):
    return [random_rows(n, d, torch.float64, seed=seed).requires_grad_() for seed in seeds]


def weights(n=9):
    return random_rows(n, 1, torch.float64, seed=8)[:, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)], ids=["pairs", "triplets"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_formula(backend, seeds, measure, hinge, reduction):
    operands, normalize, factor = rows(*seeds), measure == "distance", -1.5
    values = row_pairs(*operands, *[None] * (3 - len(seeds)), normalize, measure)
    offset = 0.1 - factor * values.median().item()
    each = factor * values + offset
    if hinge:
        each = each.clamp(min=0)
        assert 0 < (each == 0).sum() < len(each)
    found = row_pairs_loss(
        *operands,
        factor=factor,
        constant=offset,
        rule="hinge" if hinge else "linear",
        **OPTIONS | {"normalize": normalize, "measure": measure, "reduction": reduction},
        backend=backend,
    )
    expected = each if reduction == "none" else getattr(each, reduction)()
    seed = weights() if reduction == "none" else torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    truth = torch.autograd.grad(expected, operands, seed)
    for ours, exact in zip(torch.autograd.grad(found, operands, seed), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_have_float32_losses_and_gradients_of_their_dtype(dtype):
    x, y = (random_rows(7, 5, dtype, seed=seed).requires_grad_() for seed in (0, 1))
    each = row_pairs_loss(x, y, factor=2.0, **OPTIONS | {"reduction": "none"})
    assert each.dtype == torch.float32
    torch.testing.assert_close(each.double(), 2 * (x.double() * y.double()).sum(1), rtol=1e-6, atol=1e-6)
    (by_x,) = torch.autograd.grad(each.sum(), x)  # of a gradient that is one number, expanded
    assert by_x.dtype == dtype
    torch.testing.assert_close(by_x, 2 * y.detach(), rtol=0, atol=0)
    (by_x,) = torch.autograd.grad(row_pairs_loss(x, y, factor=7.0, **OPTIONS), x)  # of the mean of 7
    torch.testing.assert_close(by_x, y.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hinge_at_zero_has_no_gradient_and_nan_stays(backend):
    x, y = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[0.5, 0.0]])
    options = {"constant": -1.0, "rule": "hinge", **OPTIONS, "backend": backend}
    loss = row_pairs_loss(x, y, **options)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
    assert row_pairs_loss(x, y * torch.nan, **options).isnan()


def test_is_one_node_where_that_can_be():
    x, y = rows(0, 1)
    for reduction in ("mean", "none"):
        assert "RowPairsLoss" in byol_loss(x, y, reduction=reduction).grad_fn.name()
    assert "RowPairsLoss" not in byol_loss(x, y, backend="chunked").grad_fn.name()
    assert "RowPairsLoss" not in byol_loss(x, y, row_weights=weights()).grad_fn.name()
    with Passing():
        composed = byol_loss(x, y)
    assert "RowPairsLoss" not in composed.grad_fn.name()
    torch.testing.assert_close(composed, byol_loss(x, y))
    (gradient,) = torch.autograd.grad(byol_loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'backend "native" has no second derivative'):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alone", range(3))
def test_a_second_derivative_is_refused_whatever_is_learned(alone, reduction):
    """Of one operand alone; the others are frozen, and the node has no other input that could refuse it."""
    operands = [x.detach().requires_grad_(place == alone) for place, x in enumerate(rows(0, 1, 2))]
    options = OPTIONS | {"normalize": True, "measure": "distance", "reduction": reduction}
    loss = row_pairs_loss(*operands, factor=1.0, constant=5.0, **options)
    assert "RowPairsLoss" in loss.grad_fn.name()
    (gradient,) = torch.autograd.grad(loss.sum(), operands[alone], create_graph=True)
    assert gradient.any()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), operands[alone])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_a_power_of_distance_0_has_no_gradient(backend, power):
    x, y = rows(0, 1, n=2)
    y.data[0] = x.data[0]
    options = OPTIONS | {"measure": "distance", "reduction": "sum", "backend": backend}
    loss = row_pairs_loss(x, y, rule="power", constant=power, **options)
    distance = (x[1] - y[1]).norm()
    torch.testing.assert_close(loss, distance**power)
    found, expected = (torch.autograd.grad(each, (x, y)) for each in (loss, distance**power))
    torch.testing.assert_close(found, expected)
    assert not found[0][0].any()


def test_the_rule_of_a_softmax_is_not_below_zero_and_leaves_out_empty_sums():
    """Rounding may leave a sum below the logit in it; the derivative is that of the difference all the same."""
    lse, logit, bias = (
        torch.tensor(each, dtype=torch.float64, requires_grad=True)
        for each in ([1.0, 2.0, -torch.inf, torch.nan], [1.5, 0.5, -torch.inf, 0.0], [0.25, 0.5, 0.0, 0.0])
    )
    found = torch.ops.ssl_kernels.row_losses.native("softmax", [lse, logit, bias], [], "none", True)
    assert found.tolist()[:3] == [0.0, 1.0, 0.0] and found[3].isnan()
    found.backward(torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64))
    assert lse.grad.tolist()[:3] == [2.0, 3.0, 0.0]
    assert logit.grad.tolist()[:3] == bias.grad.tolist()[:3] == [-2.0, -3.0, 0.0]


def test_log_sum_exp_is_that_of_torch():
    for values in (
        [0.3],
        [1e3, 1e3 - 2, -1e3],
        [-torch.inf, 2.0],
        [torch.inf, 2.0],
        [torch.nan, 2.0],
        [-torch.inf],
    ):
        x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        found = torch.ops.ssl_kernels.log_sum_exp.native(x, 0.25, True)
        expected = x.logsumexp(0) + 0.25
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)
        if expected.isfinite():
            torch.testing.assert_close(*(torch.autograd.grad(-3 * y, x)[0] for y in (found, expected)))
    assert torch.ops.ssl_kernels.log_sum_exp.native(x, 0.25, False).dtype == torch.float32
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        torch.ops.ssl_kernels.log_sum_exp.native(x, 0.0, True), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("measure", MEASURES)
def test_rows_of_x_itself_get_both_gradients(measure):
    """-1 is the row itself, a row may stand for several, and what is not one node gathers them."""
    (x,) = rows(0)
    index = torch.tensor([1, 0, 1, 1, -1, 8, 2, 2, 0])
    rule = (
        {"rule": "logarithm", "constant": 0.5} if measure == "distance" else {"factor": -1.5, "constant": 0.5}
    )
    options = {**rule, **OPTIONS, "measure": measure}
    found = [row_pairs_loss(x, index, **options | {"backend": backend}) for backend in BACKENDS]
    y = x[index.where(index >= 0, torch.arange(9))]
    if measure == "distance":
        expected = -((x - y).square().sum(1) + 1e-300).sqrt().add(0.5).log().mean()
    else:
        expected = (0.5 - 1.5 * (x * y).sum(1)).mean()
    (truth,) = torch.autograd.grad(2 * expected, x)
    for loss in (*found, row_pairs_loss(x, index, **options | {"reduction": "none"}).mean()):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(2 * loss, x)[0], truth)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_rows_of_any_length(dtype, normalize):
    """Many rows are taken together; squares of the longest and of the shortest leave float32's range."""
    lengths = torch.tensor([1e-30, 1e-13, 1e-9, 1e-4, 1.0, 1e4, 1e12, 1e25], dtype=torch.float64)
    lengths = lengths if normalize else lengths[3:6]
    place = torch.arange(37)
    x, y = (random_rows(37, 19, torch.float64, seed=seed) for seed in (0, 1))
    x, y = x * lengths[place % len(lengths), None], y * lengths[place // len(lengths) % len(lengths), None]
    x, y = (each.to(dtype).requires_grad_() for each in (x, y))
    options = OPTIONS | {"normalize": normalize, "reduction": "sum", "factor": -2.0, "constant": 0.25}
    found = row_pairs_loss(x, y, **options)
    wide = [each.detach().double().requires_grad_() for each in (x, y)]
    used = [torch.nn.functional.normalize(each, dim=1) for each in wide] if normalize else wide
    expected = (0.25 - 2 * (used[0] * used[1]).sum(1)).sum()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    truth = torch.autograd.grad(3 * expected, wide)

    def within(ours, exact):
        least = torch.finfo(dtype).tiny  # numbers below it have fewer digits
        return ((ours - exact).abs().amax(1) <= tolerance * exact.abs().amax(1).clamp_min(least)).all()

    for ours, exact in zip(torch.autograd.grad(3 * found, (x, y)), truth, strict=True):
        assert within(ours, exact)
    assert within(3 * torch.autograd.grad(row_pairs_loss(x.detach(), y, **options), y)[0], truth[1])


def test_a_row_that_is_no_number_stays_alone():
    x, y = (each.requires_grad_() for each in (torch.randn(20, 4), torch.randn(20, 4)))
    x.data[17, 2], y.data[3, 0] = torch.nan, torch.inf
    loss = row_pairs_loss(x, y, **OPTIONS | {"normalize": True})
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (x, y)):
        assert gradient.isnan().any(1).nonzero().flatten().tolist() == [3, 17]
