"""What lightly's classes do beside their value: the ring, buffers, autocast, arguments."""

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels.adapters import lightly as ours


def rows(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def bank(size=(5, 8), **options):
    torch.manual_seed(0)
    return ours.MemoryBankModule(size, **options)


def test_the_ring_keeps_what_wraps():
    module, keys = bank(), rows(7)
    for part in keys.split((3, 3, 1)):
        module(part, update=True)
    assert torch.equal(module.bank, keys[[5, 6, 2, 3, 4]])
    assert module.bank_ptr.tolist() == [2]


def test_the_ring_keeps_the_last_rows_of_a_longer_batch():
    module, keys = bank(), rows(12)
    module(keys, update=True)
    assert torch.equal(module.bank, keys[[10, 11, 7, 8, 9]])
    assert module.bank_ptr.tolist() == [2]


def test_a_strict_ring_drops_what_lightly_drops():
    module, keys = bank(strict=True), rows(6)
    for part in keys.split((3, 3)):
        module(part, update=True)
    assert torch.equal(module.bank, keys[:5])
    assert module.bank_ptr.tolist() == [0]


@pytest.mark.parametrize(
    "sizes, loses", [((3, 3, 3), True), ((2, 9, 3), True), ((5, 2), False), ((4, 1, 5), False)]
)
def test_a_strict_ring_is_lightlys(sizes, loses):
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    for strict in (True, False):
        torch.manual_seed(0)
        theirs = lightly.NTXentLoss(0.2, (5, 8))
        torch.manual_seed(0)
        mine = ours.NTXentLoss(0.2, (5, 8), strict=strict)
        values = []
        for step, n in enumerate(sizes):
            out0, out1 = rows(n, seed=step).requires_grad_(), rows(n, seed=step + 50)
            values.append((mine(out0, out1) - theirs(out0, out1)).abs().item())
        differs = not torch.allclose(theirs.memory_bank.bank, mine.memory_bank.bank)
        assert differs == (loses and not strict)
        assert max(values) < 1e-5 or differs


def test_the_bank_is_stored_if_out0_requires_grad():
    loss = ours.NTXentLoss(0.2, (5, 8))
    before = loss.memory_bank.bank.clone()
    out1 = rows(2).requires_grad_()
    loss(rows(2), out1)
    with torch.no_grad():
        loss(rows(2).requires_grad_(), out1)
    assert torch.equal(loss.memory_bank.bank, before)
    loss.eval()(rows(2, seed=1).requires_grad_(), out1).backward()  # after the bank was overwritten
    assert torch.equal(loss.memory_bank.bank[:2], F.normalize(out1.detach(), dim=1))
    assert out1.grad.any()


def test_backward_is_of_the_bank_before_the_step():
    loss = ours.NTXentLoss(0.2, (4, 8))
    out0, out1 = rows(4, seed=1).requires_grad_(), rows(4, seed=2).requires_grad_()
    old = loss.memory_bank.bank.clone()
    found = torch.autograd.grad(loss(out0, out1), (out0, out1))
    x, y = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    logits = torch.cat(((x * y).sum(1, keepdim=True), x @ old.T), 1) / 0.2
    torch_loss = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    expected = torch.autograd.grad(torch_loss, (out0, out1))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_banks_draw_and_buffers_are_lightlys():
    torch.manual_seed(3)
    loss = ours.NTXentLoss(0.1, (6, 4))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(loss.memory_bank.bank, F.normalize(torch.randn(6, 4), dim=1))
    assert torch.equal(torch.rand(1), after)
    assert loss.state_dict() == {}
    loss.load_state_dict({})
    assert {name for name, _ in loss.named_buffers()} == {"memory_bank.bank", "memory_bank.bank_ptr"}
    assert loss.memory_bank(rows(2, 4))[1].shape == (4, 6)
    assert ours.MemoryBankModule((6, 4), feature_dim_first=False)(rows(2, 4))[1].shape == (6, 4)


@pytest.mark.parametrize("size", [0, (0,), (0, 128)])
def test_sizes_without_a_bank(size):
    out0, out1 = rows(4, seed=1), rows(4, seed=2)
    assert torch.equal(ours.NTXentLoss(0.5, size)(out0, out1), ours.NTXentLoss()(out0, out1))


@pytest.mark.parametrize("size", [64, True, (64,), (1, 2, 3), (-1, 4)])
def test_sizes_that_lightly_refuses(size):
    with pytest.raises(ValueError, match="MemoryBankModule: size must"):
        ours.NTXentLoss(0.5, size)


def test_temperatures():
    with pytest.raises(ValueError, match="temperature"):
        ours.NTXentLoss(1e-9)
    with pytest.raises(ValueError, match="temperature"):
        ours.NTXentLoss(-0.5)(rows(2), rows(2))
    learned = torch.nn.Parameter(torch.tensor(0.5))
    loss = ours.NTXentLoss(learned)
    assert list(loss.state_dict()) == ["temperature"]
    loss(rows(3), rows(3, seed=1)).backward()
    assert learned.grad != 0


@pytest.mark.parametrize("memory_bank_size", [0, (6, 8)])
def test_autocast_takes_two_dtypes(memory_bank_size):
    loss = ours.NTXentLoss(0.5, memory_bank_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out0 = rows(4, seed=1).bfloat16().requires_grad_()
        value = loss(out0, rows(4, seed=2))
    assert value.dtype == torch.float32
    value.backward()
    assert loss.memory_bank.bank.dtype == torch.float32


def test_a_loss_made_of_the_bank():
    """The pattern of lightly's documentation: a subclass that asks its bank for negatives."""

    class Mine(ours.MemoryBankModule):
        def forward(self, output, labels=None):
            output, negatives = super().forward(output, update=True)
            return output @ negatives

    assert Mine((6, 8))(rows(3)).shape == (3, 6)


def test_short_rows_have_a_direction():
    x = rows(4) * 1e-10
    assert ours.NegativeCosineSimilarity()(x, x) == pytest.approx(-1)
    strict = ours.NegativeCosineSimilarity(strict=True)
    assert torch.equal(strict(x, x), -F.cosine_similarity(x, x).mean())


def test_cosines_of_shapes_that_broadcast():
    x, y = rows(4), rows(1)
    torch.testing.assert_close(ours.NegativeCosineSimilarity()(x, y), -F.cosine_similarity(x, y).mean())
