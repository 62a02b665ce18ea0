import torch

import ssl_kernels
from ssl_kernels.recipes.baseline import plain_nt_xent_loss


def test_plain_loss_is_nt_xent():
    z0, z1 = torch.randn(2, 13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = [z0.requires_grad_(), z1.requires_grad_()]
    plain = plain_nt_xent_loss(*views, temperature=0.3)
    ours = ssl_kernels.nt_xent_loss(*views, temperature=0.3, backend="reference")
    torch.testing.assert_close(plain, ours)
    torch.testing.assert_close(torch.autograd.grad(plain, views), torch.autograd.grad(ours, views))
