"""nt_xent_loss and nn.NTXentLoss: the paper's formula, their arguments, and every message for bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ssl_kernels
from ssl_kernels import nt_xent_loss
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, run_python, same_bits, saved_bytes

MB = 1 << 20
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def views(batch, d, dtype=torch.float32, seed=0):
    """Two views that resemble each other, as an encoder's do."""
    common = random_rows(batch, d, torch.float64, seed=seed)
    return [(common + 0.5 * random_rows(batch, d, torch.float64, seed=seed + k)).to(dtype) for k in (1, 2)]


def simclr_loss(z0, z1, temperature):
    """Equation 1 of arXiv:2002.05709 for the 2B rows of z0 above z1, by explicit loops in float64."""
    z = [row.tolist() for row in torch.cat((z0, z1)).double()]
    half = len(z0)

    def similarity(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))

    losses = []
    for i in range(2 * half):
        partner = (i + half) % (2 * half)
        others = [math.exp(similarity(z[i], z[k]) / temperature) for k in range(2 * half) if k != i]
        losses.append(-math.log(math.exp(similarity(z[i], z[partner]) / temperature) / math.fsum(others)))
    return losses


def plain_nt_xent(z0, z1, temperature, reduction="mean"):
    """As training code writes it, in the dtype of its input."""
    z = F.normalize(torch.cat((z0, z1)), dim=1)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)), reduction=reduction)


def value_and_gradients(loss, z0, z1, temperature, **options):
    z0, z1 = (z.detach().clone().requires_grad_() for z in (z0, z1))
    value = loss(z0, z1, temperature, **options)
    return [value.detach(), *torch.autograd.grad(value, (z0, z1))]


@every_backend
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 34])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 4.0])
def test_value_is_the_papers(backend, batch, temperature):
    z0, z1 = views(batch, 6, torch.float64)
    expected = simclr_loss(z0, z1, temperature)
    each = nt_xent_loss(z0, z1, temperature, reduction="none", backend=backend)
    assert each.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert nt_xent_loss(z0, z1, temperature, backend=backend).item() == pytest.approx(
        math.fsum(expected) / (2 * batch)
    )
    total = nt_xent_loss(z0, z1, temperature, reduction="sum", backend=backend)
    assert total.item() == pytest.approx(math.fsum(expected))


def test_value_of_a_case_worked_by_hand():
    """Two orthogonal pairs of equal views: every row sees e^(1/t) once and e^0 twice."""
    z = torch.eye(2)
    assert nt_xent_loss(z, z, 0.5).item() == pytest.approx(math.log(math.exp(2) + 2) - 2)


def test_default_temperature_is_that_of_the_signature():
    z0, z1 = views(5, 4)
    assert nt_xent_loss(z0, z1).item() == nt_xent_loss(z0, z1, 0.5).item()
    assert nt_xent_loss(z0, z1).item() != pytest.approx(nt_xent_loss(z0, z1, 0.1).item())


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch, d", [(1, 8), (7, 33), (64, 128), (65, 127)])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_no_worse_than_plain_pytorch_in_the_same_dtype(backend, dtype, batch, d, temperature):
    z0, z1 = views(batch, d, dtype)
    truth = value_and_gradients(plain_nt_xent, z0.double(), z1.double(), temperature)
    plain = value_and_gradients(plain_nt_xent, z0, z1, temperature)
    found = value_and_gradients(nt_xent_loss, z0, z1, temperature, backend=backend)
    for ours, theirs, value in zip(found, plain, truth, strict=True):
        # A gradient is a difference of terms of this size.
        size = (
            value.abs().item()
            if value.dim() == 0
            else 1 / temperature / value.shape[0] / z0.norm(dim=1).min().item()
        )
        rounding = torch.finfo(dtype).eps * max(size, 1 / temperature if value.dim() == 0 else 0)
        error, plain_error = ((t.double() - value).abs().max().item() for t in (ours, theirs))
        assert error <= 2 * plain_error + 2 * rounding


@every_backend
@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtype_and_shape_of_the_result(backend, dtype, reduction):
    z0, z1 = views(9, 8, dtype)
    loss = nt_xent_loss(z0.requires_grad_(), z1, reduction=reduction, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((18,) if reduction == "none" else ())
    loss.sum().backward()
    assert z0.grad.dtype == dtype
    assert z0.grad.shape == z0.shape


@every_backend
def test_gradient_of_weighted_rows(backend):
    """reduction="none" takes any weight a row, of either sign and zero."""
    z0, z1 = views(33, 8, torch.float64)
    weight = random_rows(66, 1, torch.float64)[:, 0]
    weight[::5] = 0

    def weighted(loss, *args, **options):
        return (weight * loss(*args, reduction="none", **options)).sum()

    found = value_and_gradients(lambda *a: weighted(nt_xent_loss, *a, backend=backend), z0, z1, 0.2)
    expected = value_and_gradients(lambda *a: weighted(plain_nt_xent, *a), z0, z1, 0.2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_backend
def test_temperature_tensor_gets_its_gradient(backend):
    z0, z1 = views(20, 8, torch.float64)
    expected = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    plain_nt_xent(z0, z1, expected).backward()
    for dtype in (torch.float64, torch.float32, torch.float16):
        temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        value = nt_xent_loss(z0, z1, temperature, backend=backend)
        value.backward()
        assert temperature.grad.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        assert temperature.grad.item() == pytest.approx(expected.grad.item(), rel=10 * tolerance)
        assert value.item() == pytest.approx(nt_xent_loss(z0, z1, 0.3).item(), rel=tolerance)


@every_backend
def test_temperature_alone_may_be_learnt(backend):
    """A frozen encoder: the embeddings take no gradient."""
    z0, z1 = views(33, 40)
    temperature = nn.Parameter(torch.tensor(0.3))
    nt_xent_loss(z0, z1, temperature, backend=backend).backward()
    step = 1e-3
    above, below = (plain_nt_xent(z0.double(), z1.double(), 0.3 + h).item() for h in (step, -step))
    assert temperature.grad.item() == pytest.approx((above - below) / (2 * step), rel=1e-3)


@every_backend
@pytest.mark.parametrize("temperature", [1, 0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_temperature_may_be_any_number(backend, temperature):
    z0, z1 = views(5, 4)
    loss = nt_xent_loss(z0, z1, temperature, backend=backend)
    assert loss.item() == pytest.approx(nt_xent_loss(z0, z1, float(temperature)).item(), rel=1e-6)


@every_backend
@pytest.mark.parametrize("temperature", [1e-4, 5e-3, 1e3])
def test_extreme_temperatures_are_exact(backend, temperature):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        z0, z1 = views(40, 32, dtype)
        truth = plain_nt_xent(z0.double(), z1.double(), temperature).item()
        loss = nt_xent_loss(z0, z1, temperature, backend=backend).item()
        assert loss == pytest.approx(truth, rel=1e-5, abs=1e-6 / temperature)


@every_backend
def test_equal_views_and_equal_rows(backend):
    z = random_rows(1, 16).expand(40, 16)
    z0 = z.clone().requires_grad_()
    loss = nt_xent_loss(z0, z, 0.1, backend=backend)
    assert loss.item() == pytest.approx(math.log(79), rel=1e-6)
    loss.backward()
    assert z0.grad.abs().max() < 1e-6


@every_backend
def test_zero_rows_have_finite_loss_and_gradient(backend):
    z0, z1 = views(8, 4)
    z0[3] = 0
    found = value_and_gradients(nt_xent_loss, z0, z1, 0.5, backend=backend)
    expected = value_and_gradients(plain_nt_xent, z0.double(), z1.double(), 0.5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@every_backend
def test_without_normalization(backend):
    z0, z1 = views(33, 8, torch.float64)
    z = torch.cat((z0, z1))
    logits = (z @ z.T / 2.0).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(66).roll(33))
    assert nt_xent_loss(z0, z1, 2.0, normalize=False, backend=backend).item() == pytest.approx(
        expected.item()
    )


@every_backend
def test_any_strides_and_views_of_different_layout(backend):
    z0, z1 = views(34, 8)
    expected = value_and_gradients(nt_xent_loss, z0, z1, 0.5, backend=backend)
    both = torch.stack((z0, z1), 2)  # (B, D, 2)
    found = [both[:, :, 0].requires_grad_(), z1.T.contiguous().T]
    loss = nt_xent_loss(*found, 0.5, backend=backend)
    assert loss.item() == expected[0].item()
    torch.testing.assert_close(torch.autograd.grad(loss, found[0])[0], expected[1])


@every_backend
def test_one_view_may_take_no_gradient(backend):
    z0, z1 = views(20, 8)
    z0.requires_grad_()
    nt_xent_loss(z0, z1, backend=backend).backward()
    assert z1.grad is None
    torch.testing.assert_close(z0.grad, value_and_gradients(nt_xent_loss, z0, z1, 0.5, backend=backend)[1])


@every_backend
def test_same_tensor_twice_adds_both_gradients(backend):
    z = random_rows(20, 8, torch.float64)
    leaf = z.clone().requires_grad_()
    nt_xent_loss(leaf, leaf, backend=backend).backward()
    _, grad0, grad1 = value_and_gradients(plain_nt_xent, z, z, 0.5)
    torch.testing.assert_close(leaf.grad, grad0 + grad1)


batches = st.integers(1, 40)
widths = st.integers(1, 20)
seeds = st.integers(0, 10_000)
temperatures = st.floats(0.01, 10)


@given(batch=batches, d=widths, seed=seeds, temperature=temperatures)
def test_views_may_be_swapped(batch, d, seed, temperature):
    z0, z1 = views(batch, d, torch.float64, seed)
    for backend in BACKENDS:
        loss = nt_xent_loss(z0, z1, temperature, backend=backend)
        torch.testing.assert_close(nt_xent_loss(z1, z0, temperature, backend=backend), loss)


@given(batch=batches, d=widths, seed=seeds, temperature=temperatures)
def test_order_of_the_samples_does_not_matter(batch, d, seed, temperature):
    z0, z1 = views(batch, d, torch.float64, seed)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    for backend in BACKENDS:
        each = nt_xent_loss(z0, z1, temperature, reduction="none", backend=backend)
        permuted = nt_xent_loss(z0[order], z1[order], temperature, reduction="none", backend=backend)
        torch.testing.assert_close(permuted, each.view(2, batch)[:, order].flatten())


@given(batch=batches, d=widths, seed=seeds, factor=st.floats(1e-3, 1e3))
def test_length_of_the_rows_does_not_matter(batch, d, seed, factor):
    """The loss stays, and the gradient, which is orthogonal to its row, shrinks by the factor."""
    z0, z1 = views(batch, d, torch.float64, seed)
    for backend in BACKENDS:
        loss, grad, _ = value_and_gradients(nt_xent_loss, z0, z1, 0.5, backend=backend)
        scaled_loss, scaled_grad, _ = value_and_gradients(nt_xent_loss, z0 * factor, z1, 0.5, backend=backend)
        torch.testing.assert_close(scaled_loss, loss)
        torch.testing.assert_close(scaled_grad * factor, grad)
        assert ((grad * z0).sum(1).abs() <= 1e-12 * (1 + grad.abs().max() * z0.abs().max())).all()


@given(batch=batches, d=widths, seed=seeds, temperature=temperatures)
def test_loss_lies_between_its_bounds(batch, d, seed, temperature):
    """Each row's loss is that of one class among 2B − 1, with logits within ±1 / temperature."""
    z0, z1 = views(batch, d, torch.float64, seed)
    for backend in BACKENDS:
        each = nt_xent_loss(z0, z1, temperature, reduction="none", backend=backend)
        assert (each >= -1e-9).all()
        assert (each <= math.log(2 * batch - 1) + 2 / temperature + 1e-9).all()


@every_backend
def test_gradcheck(backend):
    z0, z1 = (z.requires_grad_() for z in views(4, 3, torch.float64))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda *args, reduction=reduction: nt_xent_loss(*args, reduction=reduction, backend=backend),
            (z0, z1, temperature),
        )


def test_second_derivative_of_the_reference():
    z0, z1 = (z.requires_grad_() for z in views(3, 3, torch.float64))
    assert torch.autograd.gradgradcheck(lambda *args: nt_xent_loss(*args, 0.4, backend="reference"), (z0, z1))


@pytest.mark.parametrize("backend", OPERATORS)
def test_second_derivative_of_a_kernel_is_an_error(backend):
    z0, z1 = (z.requires_grad_() for z in views(3, 3))
    (grad,) = torch.autograd.grad(nt_xent_loss(z0, z1, backend=backend), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), z1)


@pytest.mark.filterwarnings("ignore")
@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_a_learnable_temperature(backend, dynamic):
    torch._dynamo.reset()
    loss = ssl_kernels.nn.NTXentLoss(nn.Parameter(torch.tensor(0.3)), backend=backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (6, 9) if dynamic else (6,):
        z0, z1 = views(batch, 8)
        results = []
        for function in (loss, compiled):
            loss.temperature.grad = None
            z0.requires_grad_().grad = None
            function(z0, z1).backward()
            results.append((z0.grad.clone(), loss.temperature.grad.clone()))
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(found, eager)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    z0, z1 = views(20, 8)

    def step(z0, z1):
        return nt_xent_loss(2 * z0, z1, 0.2, backend=backend)

    found = value_and_gradients(lambda a, b, _: torch.compile(step, fullgraph=True)(a, b), z0, z1, None)
    for ours, eager in zip(found, value_and_gradients(lambda a, b, _: step(a, b), z0, z1, None), strict=True):
        torch.testing.assert_close(ours, eager)


@every_backend
def test_autocast_takes_views_of_two_dtypes(backend):
    z0, z1 = views(20, 8)
    half = z0.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent_loss(half, z1, backend=backend)
    assert loss.item() == nt_xent_loss(half.float(), z1, backend=backend).item()
    with pytest.raises(TypeError, match="z1 must be bfloat16 as z0 is, got float32"):
        nt_xent_loss(half, z1, backend=backend)


@every_backend
def test_nan_reaches_the_loss_and_the_gradient(backend):
    z0, z1 = views(40, 8)
    z0[7, 2] = torch.nan
    value, grad, _ = value_and_gradients(nt_xent_loss, z0, z1, 0.5, backend=backend)
    assert value.isnan()
    assert grad.isnan().all()


@every_backend
def test_repeated_calls_are_equal_bit_for_bit(backend):
    z0, z1 = views(150, 40)
    first = value_and_gradients(nt_xent_loss, z0, z1, 0.1, backend=backend)
    for _ in range(3):
        again = value_and_gradients(nt_xent_loss, z0, z1, 0.1, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(again, first, strict=True))


@every_backend
def test_inputs_stay_as_they_were(backend):
    z0, z1 = views(34, 8)
    before = z0.clone(), z1.clone()
    value_and_gradients(nt_xent_loss, z0, z1, 0.5, backend=backend)
    assert same_bits(z0, before[0])
    assert same_bits(z1, before[1])


# Memory


@pytest.mark.parametrize("backend", OPERATORS)
def test_extra_memory_is_far_from_the_matrix_of_logits(backend):
    """At B = 4096 the logits alone would be 256 MB."""
    z0, z1 = (z.requires_grad_() for z in views(4096, 64))

    def step():
        nt_xent_loss(z0, z1, 0.5, backend=backend).backward()

    gradients = z0.nbytes + z1.nbytes
    allowed = 128 * MB if backend == "native" else 100 * MB
    assert peak_memory(step) - gradients < allowed


@pytest.mark.parametrize("backend", OPERATORS)
def test_saved_memory_is_linear_in_the_batch(backend):
    z0, z1 = (z.requires_grad_() for z in views(4096, 16))
    saved = saved_bytes(nt_xent_loss, z0, z1, backend=backend)
    assert saved < 4 * (z0.nbytes + z1.nbytes)


PEAK_OF_A_STEP = """
import torch
from ssl_kernels import nt_xent_loss

def resident(field):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024

def step(z0, z1):
    nt_xent_loss(z0, z1, 0.5, backend="native").backward()

step(*[torch.randn(600, 128, requires_grad=True) for _ in range(2)])  # libraries' own buffers
z0, z1 = (torch.randn({batch}, 128, requires_grad=True) for _ in range(2))
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak starts again from here
before = resident("VmRSS")
step(z0, z1)
print(resident("VmHWM") - before - z0.grad.nbytes - z1.grad.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("batch, allowed", [(4096, 128 * MB), (16384, 128 * MB)])
def test_extra_memory_of_the_process(batch, allowed):
    """Everything that the process takes beyond inputs and gradients, the C++ code's own included."""
    assert int(run_python(PEAK_OF_A_STEP.replace("{batch}", str(batch)))) < allowed
