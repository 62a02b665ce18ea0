"""Masters, shadows and sources of `momentum_update_`, and the rule by which every backend's averages are judged."""

import torch


def triples(shadow_dtype, source_dtype, shapes, *, seed=1, device="cpu"):
    """Masters, shadows rounded from them, and sources."""
    generator = torch.Generator().manual_seed(seed)
    masters = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    sources = [torch.randn(shape, generator=generator).to(source_dtype).to(device) for shape in shapes]
    return masters, [master.to(shadow_dtype) for master in masters], sources


def check(update, masters, shadows, sources, momentum):
    """The average in float64, rounded to the master, and that to the shadow; returns what update() does.

    What was written into a shadow replaces its master.
    """
    exact = []
    for master, shadow, source in zip(masters, shadows, sources, strict=True):
        average = torch.where(master.to(shadow.dtype) == shadow, master, shadow.float()).double()
        exact.append((momentum * average + (1 - momentum) * source.double()).cpu())
    result = update()
    for master, shadow, truth in zip(masters, shadows, exact, strict=True):
        torch.testing.assert_close(master.cpu().double(), truth, rtol=2e-7, atol=5e-7, equal_nan=True)
        assert torch.equal(shadow.nan_to_num(9), master.to(shadow.dtype).nan_to_num(9))
    return result
