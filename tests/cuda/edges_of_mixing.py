"""CUDA's mixing operations at the edges of what they promise: see edges.py."""

import torch

from tests.cuda import mixing_calls as mixing
from tests.cuda.edge_rows import odd_address, require_halves
from tests.cuda.mutation import check, require
from tests.layouts import far_apart
from tests.support.queue_push import keys_of


def check_mixup(library):
    # From 4097 samples on their order is made in global memory.
    samples = ((63, 3), (64, 4), (65, 5), (1023, 1), (1025, 1), (4096, 1), (4097, 1))
    for count, features in ((3, 511), (4, 512), (5, 513), *samples):
        with check(f"{count} samples of {features} numbers"):
            x, lam = keys_of(count, features, torch.float32), torch.linspace(0, 1, count)
            permutation = torch.arange(count).roll(1)
            exact = lam[:, None].double() * x + (1 - lam[:, None].double()) * x[permutation]
            for parts in (1, 2):
                out, _ = mixing.mixup(library, x, lam, permutation, parts=parts)
                torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    with check("samples far apart"):
        x, lam, permutation = keys_of(5, 24, torch.float32), torch.rand(5), torch.tensor([3, 4, 1, 2, 0])
        right, _ = mixing.mixup(library, x, lam, permutation)
        found, _ = mixing.mixup(library, far_apart(x), lam, permutation, torch.full_like(x, torch.nan))
        require(torch.equal(found, right), "out of place")
        for parts in (1, 2):
            far = far_apart(x)
            mixing.mixup(library, far, lam, permutation, far, parts=parts)
            require(torch.equal(far.contiguous(), right), "in place")
        expected = mixing.mixup_bwd(library, right, x, lam, permutation)[:2]
        found = mixing.mixup_bwd(
            library, far_apart(right), far_apart(x), lam, permutation, grad_x=far_apart(torch.zeros_like(x))
        )[:2]
        require(all(map(torch.equal, found, expected)), "gradient")
    with check("one operand at an odd address"):
        found = mixing.mixup_bwd(library, right, odd_address(x), lam, permutation)[:2]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with check("weights of 0 beside infinite numbers"):
        x = torch.tensor([[1.0, torch.inf, -torch.inf], [2.0, 3.0, 4.0]])
        out, _ = mixing.mixup(library, x, torch.tensor([0.0, 1.0]), torch.tensor([1, 0]))
        require(torch.equal(out, x[[1, 1]]), "a weight of 0 multiplied")
        lam = torch.tensor([0.5, 1.0])
        grad = mixing.mixup_bwd(library, x.flip(0), None, lam, torch.tensor([1, 0]))[0]
        require(torch.equal(grad[0], x[1] / 2), "a weight of 0 multiplied in the gradient")
    with check("halves beyond 65504, and NaN"):
        x = torch.tensor([[65504.0, -65504.0, torch.nan], [65504.0, -65504.0, 1.0]]).half()
        out, _ = mixing.mixup(library, x, torch.full((2,), 0.5), torch.tensor([1, 0]))
        require(torch.equal(out[:, :2], x[:, :2]) and out[:, 2].isnan().all(), "clamped")
        lam, swap = torch.tensor([1.0, 0.0]), torch.tensor([1, 0])
        grad = mixing.mixup_bwd(library, x[:, :2].contiguous(), None, lam, swap)[0]
        require(torch.equal(grad[0], 2 * x[0, :2]) and (grad[1] == 0).all(), "a clamped gradient")


def check_cutmix(library):
    x = keys_of(5, 35, torch.float32).view(5, 1, 5, 7)
    boxes = torch.tensor([[0, 4, 1, 6], [1, 3, 0, 7], [2, 5, 2, 3], [0, 5, 0, 7], [3, 3, 1, 2]])
    permutation = torch.tensor([3, 4, 1, 2, 0])
    for count in (15, 16, 17, 127, 128, 129, 4096, 4097):
        with check(f"{count} samples"):
            pixels = torch.arange(count * 15.0).view(count, 1, 3, 5)
            inside, order = torch.tensor([[1, 3, 0, 4]]).expand(count, 4), torch.arange(count).roll(1)
            exact = pixels.clone()
            exact[:, :, 1:, :4] = pixels[order][:, :, 1:, :4]
            out, _ = mixing.cutmix(library, pixels, inside, order)
            require(torch.equal(out, exact), "out of place")
            mixing.cutmix(library, pixels, inside, order, pixels)
            require(torch.equal(pixels, exact), "in place")
    with check("samples far apart"):
        right, _ = mixing.cutmix(library, x, boxes, permutation)
        found, _ = mixing.cutmix(library, far_apart(x), boxes, permutation, torch.zeros_like(x))
        require(torch.equal(found, right), "out of place")
        far = far_apart(x)
        mixing.cutmix(library, far, boxes, permutation, far)
        require(torch.equal(far.contiguous(), right), "in place")
        expected, _ = mixing.cutmix_bwd(library, x, boxes, permutation)
        args = (far_apart(x), boxes, permutation, torch.zeros_like(x))
        require(torch.equal(mixing.cutmix(library, *args, function="cutmix_bwd")[0], expected), "gradient")
        found, _ = mixing.cutmix(library, x, boxes, permutation, far_apart(torch.zeros_like(x)))
        require(torch.equal(found, right), "into samples far apart")
    with check("images at an odd address"):
        images = keys_of(5, 24, torch.float32).view(5, 1, 4, 6)
        for function in ("cutmix_fwd", "cutmix_bwd"):
            found, right = (
                mixing.cutmix(library, each, boxes, permutation, torch.zeros(5, 1, 4, 6), function=function)[
                    0
                ]
                for each in (odd_address(images), images)
            )
            require(torch.equal(found, right), "other images")
    with check("a gradient beyond float16"):
        grad = torch.tensor([65504.0, -40000.0, 2.0]).half().view(1, 1, 1, 3).expand(2, 1, 1, 3).contiguous()
        halves = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 3]])
        found, _ = mixing.cutmix_bwd(library, grad, halves, torch.tensor([1, 0]))
        require(torch.equal(found[0], 2 * grad[0]) and (found[1] == 0).all(), "clamped")
    with check("groups of samples"):
        many = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 33, 33).contiguous()
        whole, order = torch.tensor([[0, 33, 0, 33]]).expand(40, 4), torch.arange(40).roll(1)
        out, _ = mixing.cutmix(library, many, whole, order)
        require(torch.equal(out, many[order]), "other samples")
        grad, _ = mixing.cutmix_bwd(library, many, whole, order)
        require(torch.equal(grad, many.roll(-1, 0)), "the gradient of other samples")


def check_mixup_normalize(library):
    mean, std = torch.tensor([0.4]), torch.tensor([0.3])
    for count, features in ((3, 2047), (4, 2048), (5, 2049), (1, 15), (8, 16), (9, 17), (1023, 1), (1025, 1)):
        with check(f"{count} images of {features} numbers"):
            generator = torch.Generator().manual_seed(count)
            x = torch.randint(0, 256, (count, 1, 1, features), generator=generator).to(torch.uint8)
            lam, permutation = torch.linspace(0, 1, count), torch.arange(count).roll(1)
            share = lam.double().view(-1, 1, 1, 1)
            exact = (share * x + (1 - share) * x[permutation]) / 255
            for parts in (1, 2):
                out, _ = mixing.mixup_normalize(
                    library, x, lam, permutation, mean, std, torch.float32, parts=parts
                )
                expected = (exact - mean.double()) / std.double()
                torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    with check("samples far apart"):
        operands = (lam, permutation, mean, std, torch.float32)
        right, found = (mixing.mixup_normalize(library, images, *operands)[0] for images in (x, far_apart(x)))
        require(torch.equal(found, right), "other samples")
        x, lam, permutation = x[:120].reshape(5, 1, 4, 6), lam[:5], torch.tensor([3, 4, 1, 2, 0])
        operands = (lam, permutation, mean, std, torch.float32)
        right, _ = mixing.mixup_normalize(library, x, *operands)
        results = far_apart(torch.zeros_like(right))
        require(
            torch.equal(mixing.mixup_normalize(library, x, *operands, out=results)[0], right), "far results"
        )
    with check("images that are no vectors"):
        wider = torch.zeros(5, 27, dtype=torch.uint8)[:, :24].copy_(x.view(5, 24)).unflatten(1, (1, 4, 6))
        for images in (odd_address(x), wider):
            out = torch.zeros_like(right)
            require(
                torch.equal(mixing.mixup_normalize(library, images, *operands, out=out)[0], right),
                "other samples",
            )


def check_mixup_cross_entropy(library):
    for classes in (31, 32, 33, 127, 128, 129, 511, 512, 513, 2047, 2048, 2049):
        with check(f"{classes} classes"):
            logits, target = keys_of(3, classes, torch.float32), torch.tensor([0, classes - 1, classes // 2])
            same, ones = torch.arange(3), torch.ones(3)
            loss, lse, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, target, same, ones)
            exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
            torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
            grad, _ = mixing.mixup_cross_entropy_bwd(library, ones.double(), logits, target, same, ones, lse)
            one_hot = torch.nn.functional.one_hot(target, classes)
            torch.testing.assert_close(
                grad.double(), logits.double().softmax(1) - one_hot, rtol=1e-5, atol=1e-6
            )
    with check("rows far apart"):
        logits, target, same, ones = (
            keys_of(3, 40, torch.float32),
            torch.arange(3),
            torch.arange(3),
            torch.ones(3),
        )
        right = mixing.mixup_cross_entropy_fwd(library, logits, target, same, ones)[:2]
        found = mixing.mixup_cross_entropy_fwd(library, far_apart(logits), target, same, ones)[:2]
        require(all(map(torch.equal, found, right)), "loss")
        grads = [
            mixing.mixup_cross_entropy_bwd(library, ones.double(), rows, target, same, ones, right[1])[0]
            for rows in (logits, far_apart(logits))
        ]
        require(torch.equal(*grads), "gradient")
    with check("rows of two classes count 1"):
        share = torch.full((3,), 0.1)
        _, _, counted, _ = mixing.mixup_cross_entropy_fwd(library, logits, target, same, share)
        require((counted == 1).all(), "shares that add up to nearly 1")
    with check("gradients beyond float16"):
        logits, order, lam = keys_of(3, 9, torch.float16), torch.arange(3), torch.ones(3)
        *_, lse, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, order, order, lam)
        grads = torch.full((3,), 3e5, dtype=torch.float64)
        found, _ = mixing.mixup_cross_entropy_bwd(library, grads, logits, order, order, lam, lse)
        require_halves(found, 3e5 * (logits.double().softmax(1) - torch.eye(3, 9)))
    with check("targets of weight 0 beside infinite logits"):
        logits = keys_of(2, 5, torch.float32)
        logits[0, 3] = logits[1, 1] = -torch.inf
        target, permutation, lam = torch.tensor([1, 3]), torch.tensor([1, 0]), torch.tensor([1.0, 1.0])
        loss, _, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, target, permutation, lam)
        require(loss.isfinite().all(), "the partner's class counts")
        loss, _, _, _ = mixing.mixup_cross_entropy_fwd(library, logits, target.flip(0), permutation, 1 - lam)
        require(loss.isfinite().all(), "the own class counts")
