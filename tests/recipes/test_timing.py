import torch

from ssl_kernels.recipes.timing import TimedLoss


def product(x, pair, *, scale, note):
    assert note == "as it is"
    return (x * pair[0] * pair[1]).sum() * scale


def test_gradients_are_those_of_the_loss():
    """Of tensors anywhere among the arguments, times what comes from above; none where none is asked for."""
    x, a = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b = torch.randn(5, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    timed = TimedLoss(product)
    for call in (1, 2):
        value = timed(x, [a, b], scale=scale, note="as it is")
        expected = product(x, [a, b], scale=scale, note="as it is")
        assert torch.equal(value, expected)
        ours, theirs = (torch.autograd.grad(3 * each, [x, a, scale]) for each in (value, expected))
        torch.testing.assert_close(ours, theirs)
        if call == 1:
            once = timed.seconds
    assert timed.seconds > once > 0


def test_loss_is_computed_in_float32_under_autocast():
    seen = []

    def loss(x):
        seen.append(((x @ x.T).dtype, x.dtype))
        return (x @ x.T).sum()

    x = torch.randn(4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        TimedLoss(loss)(x).backward()
    assert seen == [(torch.float32, torch.float32)]
    assert x.grad.dtype == torch.bfloat16
