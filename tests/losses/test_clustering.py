"""Losses against prototypes, of correlations and of patches: values and gradients in float64, memory, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels import losses, nn, sinkhorn
from ssl_kernels.losses import _clusters, _features
from ssl_kernels.recipes.memory import peak_memory
from tests.distributed import processes
from tests.helpers import BACKENDS, random_rows, saved_bytes
from tests.losses import cluster_definitions as definitions
from tests.losses.cases import OTHER_CASES, on_backends, value_and_gradients

OURS = ("swav_loss", "dino_loss", "barlow_twins_loss", "vicreg_loss", "mae_loss")
CASES = [case for case in OTHER_CASES if case.loss in OURS]
every_case_and_backend = pytest.mark.parametrize("case, backend", on_backends(CASES, BACKENDS), ids=str)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MB = 1 << 20


def rows(n, d, seed=0, dtype=torch.float64):
    return random_rows(n, d, dtype, seed=seed)


def tokens(*shape, seed=0):
    return rows(math.prod(shape[:-1]), shape[-1], seed).view(shape)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Values and gradients


@every_case_and_backend
@pytest.mark.parametrize("n, d", [(5, 12), (17, 6)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_the_definitions(case, backend, n, d, reduction):
    """Both with fewer rows than half the features, where products of rows with rows are taken, and with more."""
    arguments = case.arguments(n, d)
    each = case.definition(**arguments)
    weight = rows(len(each), 1, seed=3)[:, 0] if reduction == "none" else torch.ones_like(each)
    weight = weight / len(each) if reduction == "mean" else weight
    expected = value_and_gradients(case.definition, case, arguments, weight.detach())
    run = case.ours(backend, reduction=reduction)
    found = value_and_gradients(run, case, arguments, weight if reduction == "none" else None)
    close(found[0], expected[0] if reduction == "none" else (expected[0] * weight).sum().detach())
    for ours, truth in zip(found[1:], expected[1:], strict=True):
        close(ours, truth)


@pytest.mark.parametrize("case, backend", on_backends(CASES, ("chunked", "native")), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_float32_in_every_dtype(case, backend, dtype):
    """Judged by float64 on the same rounded input, gradients rounded once to the input's dtype."""
    arguments = case.arguments(24, 20, dtype)
    wide, plain = (
        {
            name: value.detach().to(to).requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }
        for to in (torch.float64, torch.float32)
    )
    truth = value_and_gradients(case.definition, case, wide, 1.0)
    single = value_and_gradients(case.definition, case, plain, 1.0)
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, 1.0)
    for ours, theirs, exact in zip(found, single, truth, strict=True):
        error, plain_error = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
        largest = exact.abs().max().item()
        rounding = 8 * torch.finfo(torch.float32).eps + torch.finfo(ours.dtype).eps
        assert error <= 3 * plain_error + rounding * (largest + (exact.dim() == 0))


@every_case_and_backend
def test_gradcheck_and_second_derivative(case, backend):
    arguments = case.arguments(5, 4, seed=3)
    leaves = case.leaves(arguments)

    def of_leaves(*values):
        return case.ours(backend)(**arguments | dict(zip(leaves, values, strict=True)))

    constant_codes = case.loss != "swav_loss"  # which depend on the features, but give them no gradient
    if constant_codes:
        assert torch.autograd.gradcheck(of_leaves, tuple(leaves.values()), fast_mode=True)
    if backend == "reference":
        assert not constant_codes or torch.autograd.gradgradcheck(
            of_leaves, tuple(leaves.values()), fast_mode=True
        )
        return
    for reduction in ("mean", "none"):
        loss = case.ours(backend, reduction=reduction)(**arguments).sum()
        first = next(iter(leaves.values()))
        (grad,) = torch.autograd.grad(loss, first, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{case.loss}: .* has no second derivative"):
            torch.autograd.grad(grad.square().sum(), first)


@pytest.mark.parametrize("name", ["swav-queue", "swav", "dino", "dino-sinkhorn"])
@pytest.mark.parametrize("chosen", ["chunked", "native"])
def test_the_algebra_that_gpus_take_is_the_definition(name, chosen, monkeypatch):
    """`streamed`, whose steps run on the CPU as well."""
    case = next(case for case in CASES if case.name == name)
    arguments = case.arguments(7, 5)

    def as_on_a_gpu(student, prototypes, teacher, pairs, weights, **backends):
        assert weights is None
        return _clusters.streamed(student, prototypes, teacher, pairs, **backends)

    for module in (losses.swav, losses.dino):
        monkeypatch.setattr(module, "swapped_cross_entropy", as_on_a_gpu)
    weight = rows(7, 1, seed=3)[:, 0]
    expected = value_and_gradients(case.definition, case, arguments, weight)
    found = value_and_gradients(case.ours(chosen, reduction="none"), case, arguments, weight)
    for ours, truth in zip(found, expected, strict=True):
        close(ours, truth)


@every_backend
@pytest.mark.parametrize(
    "options", [{}, {"center": rows(9, 1, seed=8)[:, 0]}, {"centering": "sinkhorn"}], ids=str
)
@pytest.mark.parametrize("with_prototypes", [True, False])
def test_masked_tokens_are_ibots(backend, options, with_prototypes):
    mask = tokens(2, 3, 5, 1, seed=5)[..., 0] < -0.3
    mask[0, 0] = False
    width = 4 if with_prototypes else 9
    student, teacher = tokens(2, 3, 5, width).requires_grad_(), tokens(2, 3, 5, width, seed=1)
    weights = (rows(9, 4, 2).requires_grad_(), rows(9, 4, 3)) if with_prototypes else ()
    call = dict(options, mask=mask, teacher_temperature=0.5)
    expected = definitions.dino_loss(student, teacher, *weights, **call)
    leaves = [student, *weights[:1]]
    for reduction, value in {"none": expected, "mean": expected.mean(), "sum": expected.sum()}.items():
        found = losses.dino_loss(student, teacher, *weights, **call, reduction=reduction, backend=backend)
        close(found, value)
        seed = torch.arange(1.0, 4, dtype=torch.float64) if value.dim() else torch.ones_like(value)
        truth = torch.autograd.grad(value, leaves, seed, retain_graph=True)
        for ours, exact in zip(torch.autograd.grad(found, leaves, seed), truth, strict=True):
            close(ours, exact)


@every_backend
def test_a_mask_of_no_token_gives_0(backend):
    student = tokens(2, 3, 5, 4).requires_grad_()
    nothing = torch.zeros(2, 3, 5, dtype=torch.bool)
    loss = losses.dino_loss(student, tokens(2, 3, 5, 4, seed=1), rows(9, 4), mask=nothing, backend=backend)
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@every_backend
def test_of_blocks_of_samples_nothing_shows(backend, monkeypatch):
    """More samples than a block has, and a last block that is not full."""
    from ssl_kernels.chunked import cluster_cross_entropy

    monkeypatch.setattr(cluster_cross_entropy, "LOGITS_PER_BLOCK", 64)
    monkeypatch.setattr(cluster_cross_entropy, "LEAST_ROWS", 12)
    for case in CASES[:5]:
        arguments = case.arguments(11, 5)
        expected = value_and_gradients(case.definition, case, arguments, 1.0)
        found = value_and_gradients(case.ours(backend, reduction="sum"), case, arguments)
        close(found[0], expected[0].sum())
        for ours, truth in zip(found[1:], expected[1:], strict=True):
            close(ours, truth)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dino_of_logits_whose_temperatures_are_numbers(backend, centred, reduction):
    """Which one node of autograd takes on the CPU."""
    student = [rows(5, 11, seed).requires_grad_() for seed in (1, 2, 3)]
    teacher, center = [rows(5, 11, seed) for seed in (4, 5)], rows(1, 11, 6)[0] if centred else None
    loss = losses.dino_loss(
        student, teacher, None, None, 0.2, 0.07, center=center, reduction=reduction, backend=backend
    )
    each = definitions.dino_loss(student, teacher, None, None, 0.2, 0.07, center=center)
    expected = getattr(each, reduction)()
    close(loss, expected)
    for found, truth in zip(
        torch.autograd.grad(3 * loss, student), torch.autograd.grad(3 * expected, student), strict=True
    ):
        close(found, truth)


def test_the_published_code_of_swav():
    """With features of unit rows, over probabilities as its loop has them."""
    crops, bs = F.normalize(rows(24, 6), dim=1), 6
    weight = F.normalize(rows(10, 6, seed=1), dim=1)
    output, total = crops @ weight.T, 0
    for crop in (0, 1):
        q = torch.exp(output[bs * crop : bs * (crop + 1)] / 0.05).t()
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / 10
            q = q / q.sum(0, keepdim=True) / bs
        q = (q * bs).t()
        others = [v for v in range(4) if v != crop]
        total += sum(
            -(q * torch.log_softmax(output[bs * v : bs * (v + 1)] / 0.1, 1)).sum(1).mean() for v in others
        ) / len(others)
    close(losses.swav_loss(crops.view(4, bs, 6), weight), total / 2)


def test_mae_of_images_with_a_mask_is_the_published_code():
    prediction, target = tokens(3, 4, 12).requires_grad_(), tokens(3, 4, 12, seed=1)
    mask = (torch.arange(12).view(3, 4) % 3 != 0).double()
    normalized = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    each = ((prediction - normalized) ** 2).mean(-1)
    for given in (mask, mask.bool()):
        close(losses.mae_loss(prediction, target, given), (each * mask).sum() / mask.sum())
    close(losses.mae_loss(prediction, target, mask, reduction="none"), each * mask)
    assert losses.mae_loss(prediction, target, 0 * mask) == 0


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mae_with_a_mask_has_the_gradients_of_its_patches(backend, reduction):
    """Of weights that need a gradient too, of strided ones, and of none at all."""
    prediction, target = tokens(3, 4, 12).requires_grad_(), tokens(3, 4, 12, seed=1)
    each = losses.mae_loss(prediction, target, reduction="none", backend="reference")
    weights = (torch.arange(24, dtype=torch.float64).view(3, 8) % 5 - 1)[:, ::2]
    for mask in (weights, weights.bool(), weights.clone().requires_grad_(), 0 * weights):
        total = mask.sum() if reduction == "mean" else 1
        expected = (each * mask).sum() / total if (mask != 0).any() else 0 * each.sum()
        found = losses.mae_loss(prediction, target, mask, reduction=reduction, backend=backend)
        close(found, expected)
        inputs = [x for x in (prediction, mask) if x.requires_grad]
        for ours, truth in zip(
            *(torch.autograd.grad(3 * value, inputs, retain_graph=True) for value in (found, expected)),
            strict=True,
        ):
            close(ours, truth)


# Sinkhorn


@pytest.mark.parametrize("epsilon", [1e-4, 0.03, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_sinkhorn_is_the_definition(epsilon, iterations):
    scores = torch.tanh(rows(40, 13))
    close(sinkhorn(scores, epsilon, iterations), definitions.sinkhorn(scores, epsilon, iterations), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("epsilon", [1e-4, 0.05])
@pytest.mark.parametrize("scale", [1, 4.4, 1000])
def test_sinkhorn_overflows_at_no_temperature(dtype, epsilon, scale):
    found = sinkhorn((scale * rows(30, 7)).to(dtype), epsilon)
    assert found.dtype == torch.float32
    close(found.sum(1), torch.ones(30), 1e-5)


def test_sinkhorn_uses_all_columns_alike():
    close(sinkhorn(rows(64, 8), 0.5, 200).sum(0), torch.full((8,), 8.0, dtype=torch.float64), 1e-6)


def test_potentials_are_those_of_one_block_whatever_the_blocks(monkeypatch):
    from ssl_kernels.ops import column_potentials

    operands = rows(30, 6), rows(11, 6, 1)
    expected = column_potentials.column_potentials(*operands, iterations=4)
    monkeypatch.setattr(column_potentials, "LOGITS_PER_BLOCK", 70)
    found = column_potentials.column_potentials(*operands, iterations=4)
    close(found - found.amax(), expected - expected.amax())


# The teacher's centre


@pytest.mark.parametrize("with_prototypes", [True, False])
def test_the_centre_is_the_mean_of_the_logits(with_prototypes):
    teacher = tokens(2, 5, 4 if with_prototypes else 9).float()
    prototypes = rows(9, 4, 1).float() if with_prototypes else None
    center, expected = nn.DINOCenter(9, 0.8), torch.zeros(9)
    for step in range(3):
        logits = teacher + step
        if with_prototypes:
            logits = F.normalize(logits, dim=2) @ F.normalize(prototypes, dim=1).T
        expected = 0.8 * expected + 0.2 * logits.mean((0, 1))
        assert center.update_(teacher + step, prototypes) is center
        close(center.center, expected, 1e-5)
    again = nn.DINOCenter(9, 0.8)
    again.load_state_dict(center.state_dict())
    student = tokens(3, 5, 4 if with_prototypes else 9).float()
    given = (student, teacher, prototypes, prototypes) if with_prototypes else (student, teacher)
    assert losses.dino_loss(*given, center=again) == losses.dino_loss(*given, center=center.center)


def test_the_centre_of_masked_tokens():
    teacher, mask = tokens(2, 3, 4, 9).float(), tokens(2, 3, 4, 1, seed=2)[..., 0] < 0
    center = nn.DINOCenter(9, 0.0).update_(teacher, mask=mask)
    close(center.center, teacher[mask].mean(0), 1e-5)


# Memory


@pytest.mark.parametrize("name", ["swav", "dino", "dino-sinkhorn"])
@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_are_kept(name, backend, reduction):
    case = next(case for case in CASES if case.name == name)
    arguments = case.arguments(1500, 8, torch.float32)
    inputs = sum(value.nbytes for value in arguments.values() if isinstance(value, torch.Tensor))
    kept = saved_bytes(case.ours(backend, reduction=reduction), **arguments)
    assert kept < 4 * inputs < 4 * 1500 * 1503 / 5  # a fifth of the bytes of one view's logits


def test_a_step_needs_a_few_blocks_of_logits():
    case = next(case for case in CASES if case.name == "dino")
    arguments = case.arguments(4000, 8, torch.float32)
    assert peak_memory(lambda: case.ours("native")(**arguments).backward()) < 40 * MB < 4 * 4000 * 4003


@pytest.mark.parametrize("loss", ["barlow_twins_loss", "vicreg_loss"])
def test_few_rows_make_no_matrix_of_the_features(loss):
    z0, z1 = (rows(16, 3000, seed, torch.float32).requires_grad_() for seed in (0, 1))
    assert peak_memory(lambda: getattr(losses, loss)(z0, z1).backward()) < 4 * MB < 4 * 3000 * 3000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_barlow_twins_by_blocks_is_the_reference(frozen, dtype, monkeypatch):
    """1100 rows of 3 features, in five blocks, of which the last is not full."""
    monkeypatch.setattr(_features, "ELEMENTS_PER_BLOCK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    views = [(rows(1100, 3, k) + 2).to(dtype).requires_grad_(k != frozen) for k in (0, 1)]
    wide = [z.detach().double().requires_grad_(z.requires_grad) for z in views]
    found = losses.barlow_twins_loss(*views, 0.3)
    expected = losses.barlow_twins_loss(*wide, 0.3, backend="reference")
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-6}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    found.backward(), expected.backward()
    for ours, exact in zip(views, wide, strict=True):
        assert (ours.grad is None) == (exact.grad is None)
        if exact.grad is not None:
            assert ours.grad.dtype == dtype
            torch.testing.assert_close(ours.grad.double(), exact.grad, **tolerance)


def test_mae_keeps_no_normalised_target():
    prediction, target = rows(4000, 64, 0, torch.float32).requires_grad_(), rows(4000, 64, 1, torch.float32)
    assert saved_bytes(losses.mae_loss, prediction, target) < 1.1 * (prediction.nbytes + target.nbytes)


# Several processes


def of_rank(rank, world):
    """This rank's rows, of numbers that differ from rank to rank, and what it gets."""
    from torch import distributed as dist

    group, own = dist.group.WORLD, slice(0, 6) if rank == 0 else slice(6, 16)
    scores, teacher = torch.tanh(rows(16, 5)), rows(16, 5, 1)
    views = [rows(16, 4, seed)[own].requires_grad_() for seed in (2, 3)]
    prototypes, found = rows(7, 4, 4), {}
    found["sinkhorn"] = [sinkhorn(scores[own], epsilon, group=group) for epsilon in (0.05, 1e-3)]
    found["center"] = nn.DINOCenter(5, 0.5).update_(teacher[own][None], group=group).center
    found["swav"] = losses.swav_loss(views, prototypes, group=group, reduction="none").detach()
    with pytest.MonkeyPatch.context() as patch:  # rank 1 has too many logits for a block, rank 0 has not
        patch.setattr(_clusters, "LOGITS_PER_BLOCK", 2 * 6 * 7)
        mixed = losses.swav_loss(views, prototypes, group=group, reduction="sum").detach()
    found["swav, one rank by blocks"] = mixed
    for name in ("barlow_twins_loss", "vicreg_loss"):
        loss = getattr(losses, name)(*views, group=group)
        found[name] = [loss.detach(), *torch.autograd.grad(loss, views)]
    # As arrays: a tensor would travel as a file that this process has to keep open.
    return {
        name: [x.numpy() for x in value] if isinstance(value, list) else value.numpy()
        for name, value in found.items()
    }


def test_losses_of_two_processes_are_those_of_all_rows():
    def tensors(value):
        return [torch.from_numpy(x) for x in value] if isinstance(value, list) else torch.from_numpy(value)

    ranks = [{name: tensors(value) for name, value in of.items()} for of in processes.run(2, of_rank)]
    scores, teacher = torch.tanh(rows(16, 5)), rows(16, 5, 1)
    for k, epsilon in enumerate((0.05, 1e-3)):
        together = torch.cat([found["sinkhorn"][k] for found in ranks])
        close(together, definitions.sinkhorn(scores, epsilon), 1e-7)
    for found in ranks:
        close(found["center"].double(), teacher.mean(0) / 2, 1e-6)
    views, prototypes = [rows(16, 4, seed).requires_grad_() for seed in (2, 3)], rows(7, 4, 4)
    expected = losses.swav_loss(views, prototypes, reduction="none", backend="reference")
    close(torch.cat([found["swav"] for found in ranks]), expected)
    close(sum(found["swav, one rank by blocks"] for found in ranks), expected.sum())
    for name in ("barlow_twins_loss", "vicreg_loss"):
        loss = getattr(losses, name)(*views, backend="reference")
        expected = torch.autograd.grad(loss, views)
        for found in ranks:
            close(found[name][0].reshape(()), loss.detach())
        for k, truth in enumerate(
            expected, 1
        ):  # the mean over the ranks of gradients that are 0 for others' rows
            close(torch.cat([found[name][k] for found in ranks]) / 2, truth)
