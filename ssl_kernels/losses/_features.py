"""Second moments of features over a batch and what the losses of correlations make of them, gradients written out.

C = X̄ᵀ Ȳ of the centred rows is the large product; what else there is costs O(N · D + D · D). Over a process group
the sums are those of all ranks' rows, and each rank's gradient is `world` times that of the global loss by its rows, so
that the mean over the ranks, which data parallelism takes, is the global gradient.

With half as many rows as features or fewer, the products of rows with rows are the smaller ones, and they are enough
for the sum of all squares: |X̄ᵀ Ȳ|² = Σ_nm (X̄ X̄ᵀ)_nm (Ȳ Ȳᵀ)_nm. So sums over the features cost N · N · D where they
may.
"""

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import check_least_rows, check_reduction, check_scalar
from ssl_kernels.losses._shared import as_scalar, checked_rows
from ssl_kernels.ops.library import accumulation_dtype, all_savable, refuse_torch_func
from ssl_kernels.ops.operation import once
from ssl_kernels.reference.clustering import diagonal_of

ELEMENTS_PER_BLOCK = 1 << 17  # 512 KB in float32, of each view and thread


def checked_views(op, z0, z1, weights, eps, reduction, group, backend):
    """What the losses of features have in common: their checks, and how the call runs.

    Returns:
        z0, z1, the weights as tensors, eps, the backend, the group's name and the number of its ranks.
    """
    z0, z1 = checked_rows(op, 2, z0=z0, z1=z1)
    for name, weight in weights.items():
        check_scalar(op, name, weight, z0)
    check_scalar(op, "eps", eps, z0, positive=True)
    check_reduction(op, reduction)
    name, world = group_and_world(op, group)
    if not name:
        check_least_rows(op, "z0", z0, 2, "so that features vary")
    chosen = choose_backend("row_pairs", backend, op, z0, z1)
    if chosen != "reference":
        refuse_torch_func(op, chosen)
    elif name:
        raise ValueError(f'{op}: group must be None with backend "reference", got a process group')
    weights = [as_scalar(weight, z0) for weight in weights.values()]
    return z0, z1, weights, as_scalar(eps, z0).detach(), chosen, name, world


def summed(tensor, group):
    """The sum over the ranks of a group, by its name; the tensor itself for ""."""
    if not group:
        return tensor
    from ssl_kernels.distributed.groups import all_reduce

    return all_reduce(tensor, group)


def _mean(rows, count, group):
    """The mean of the rows of all ranks, in the accumulation dtype."""
    return summed(rows.sum(0, dtype=accumulation_dtype(rows)), group) / count


def _centred(rows, count, group):
    """(rows less their mean, the mean), in the accumulation dtype."""
    mean = _mean(rows, count, group)
    return rows - mean, mean


def _blocks(rows):
    """Slices of the rows. On the CPU what is made of a block stays in a cache, where whole tensors would be fetched
    from the system page by page. A matrix of more features than that is not to be gone through for each block, and few
    rows are not worth it."""
    n, d = rows.shape
    if torch.compiler.is_compiling() or not rows.is_cpu or d > 1024:
        return [slice(0, n)]
    size = max(256, ELEMENTS_PER_BLOCK // d) * torch.get_num_threads()
    if n < 4 * size:
        return [slice(0, n)]
    return [slice(begin, begin + size) for begin in range(0, n, size)]


def _joined(make, rows, needs):
    """What make(block) returns, two times rows in any dtype, one block below the other in the dtype of `rows`; (0,)
    where not needed."""
    blocks = _blocks(rows)
    if len(blocks) == 1:
        return tuple(made.to(rows.dtype) for made in make(blocks[0]))
    joined = tuple(rows.new_empty(rows.shape if need else 0) for need in needs)
    for block in blocks:
        for whole, part, need in zip(joined, make(block), needs, strict=True):
            if need:
                whole[block] = part
    return joined


def count_of(rows, group):
    """How many rows all ranks have: a 0-d tensor in the accumulation dtype."""
    own = torch.ones((), dtype=accumulation_dtype(rows), device=rows.device) * rows.shape[0]
    return summed(own, group)


class _Correlation(torch.autograd.Function):
    """(D,) losses of the features: (1 − c_dd)² and the sum of c_dj² over the other features j."""

    @staticmethod
    def forward(ctx, op, chosen, group, world, x, y, eps):
        with torch.autocast(x.device.type, enabled=False):
            count = count_of(x, group)
            mean, other_mean = (_mean(rows, count, group) for rows in (x, y))
            squares, product = [], None
            for block in _blocks(x):
                first, second = x[block] - mean, y[block] - other_mean
                squares.append((first.square().sum(0), second.square().sum(0)))
                product = first.T @ second if product is None else product.addmm_(first.T, second)
            squares = [sum(each) for each in zip(*squares, strict=True)]
            if group:  # at once; without one they stay two tensors, which torch.compile keeps apart
                squares = summed(torch.stack(squares), group).unbind(0)
            scale = [(each / count + eps).rsqrt() for each in squares]
            correlation = summed(product, group).mul_(scale[0][:, None] / count).mul_(scale[1])
        on_diagonal = diagonal_of(correlation)
        ctx.save_for_backward(*all_savable(x, y, mean, other_mean, *scale, correlation, count))
        ctx.op, ctx.chosen, ctx.world = op, chosen, world
        return (1 - on_diagonal).square(), correlation.square().sum(1) - on_diagonal.square()

    @staticmethod
    def backward(ctx, grad_on, grad_off):
        x, y, mean, other_mean, *scale, correlation, count = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:6]

        def make(grad_on, grad_off):
            with torch.autocast(x.device.type, enabled=False):
                on_diagonal = correlation.diagonal()
                by_correlation = (2 * grad_off)[:, None] * correlation
                by_correlation.diagonal().copy_(2 * grad_on * (on_diagonal - 1))
                along = by_correlation * correlation
                factor = ctx.world / count
                by_correlation.mul_(factor * scale[0][:, None]).mul_(scale[1])
                shrink = [factor * scale[k].square() * along.sum(1 - k) for k in (0, 1)]

                def of_block(block):
                    first, second = x[block] - mean, y[block] - other_mean
                    return tuple(
                        (other @ matrix).addcmul_(own, shrink[k], value=-1) if needs[k] else own.new_empty(0)
                        for k, own, other, matrix in (
                            (0, first, second, by_correlation.T),
                            (1, second, first, by_correlation),
                        )
                    )

                return _joined(of_block, x, needs)

        made = once(ctx.op, ctx.chosen, needs, make, (grad_on, grad_off), x, y)
        return None, None, None, None, *made, None


class _CorrelationSums(torch.autograd.Function):
    """The sums over the features of what `_Correlation` gives, by products of rows with rows."""

    @staticmethod
    def forward(ctx, op, chosen, x, y, eps):
        with torch.autocast(x.device.type, enabled=False):
            n = x.shape[0]
            units, moments, grams = [], [], []
            for rows in (x, y):
                centred, mean = _centred(rows, n, "")
                scale = (centred.square().sum(0) / n + eps).rsqrt()
                unit = centred.mul_(scale)
                units.append(unit)
                moments += [mean, scale]
                grams.append(unit @ unit.T)
            on_diagonal = (units[0] * units[1]).sum(0) / n
            squares = (grams[0] * grams[1]).sum(dtype=torch.float64) / n**2
        ctx.save_for_backward(*all_savable(x, y, on_diagonal, *moments, *grams))
        ctx.op, ctx.chosen = op, chosen
        off = squares - on_diagonal.square().sum(dtype=torch.float64)
        return (1 - on_diagonal).square().sum(dtype=torch.float64), off

    @staticmethod
    def backward(ctx, grad_on, grad_off):
        x, y, on_diagonal, mean, scale, other_mean, other_scale, gram, other_gram = ctx.saved_tensors
        needs, n = ctx.needs_input_grad[2:4], x.shape[0]

        def make(grad_on, grad_off):
            with torch.autocast(x.device.type, enabled=False):
                acc = mean.dtype
                twice = (2 * grad_off).to(acc)
                diagonal = (2 * grad_on).to(acc) * (on_diagonal - 1) - twice * on_diagonal
                first, second = (x.to(acc) - mean).mul_(scale), (y.to(acc) - other_mean).mul_(other_scale)
                grads = []
                for need, own, other, matrix, shrink in (
                    (needs[0], first, second, other_gram, scale),
                    (needs[1], second, first, gram, other_scale),
                ):
                    if not need:
                        grads.append(x.new_empty(0))
                        continue
                    mixed = (matrix @ own).mul_(twice / n)  # N times what the squares give
                    along = ((own * mixed).sum(0) / n + diagonal * on_diagonal) / n
                    made = mixed.addcmul_(other, diagonal).div_(n).addcmul_(own, along, value=-1)
                    grads.append(made.mul_(shrink).to(x.dtype))
            return tuple(grads)

        return None, None, *once(ctx.op, ctx.chosen, needs, make, (grad_on, grad_off), x, y), None


class _Covariance(torch.autograd.Function):
    """(D,) of the features of rows: the variance, and the sum of the squared covariances with the other features."""

    @staticmethod
    def forward(ctx, op, chosen, group, world, x):
        with torch.autocast(x.device.type, enabled=False):
            count = count_of(x, group)
            centred, mean = _centred(x, count, group)
            covariance = summed(centred.T @ centred, group) / (count - 1)
        variance = diagonal_of(covariance)
        ctx.save_for_backward(*all_savable(x, mean, covariance, count))
        ctx.op, ctx.chosen, ctx.world = op, chosen, world
        return variance, covariance.square().sum(1) - variance.square()

    @staticmethod
    def backward(ctx, grad_variance, grad_off):
        x, mean, covariance, count = ctx.saved_tensors

        def make(grad_variance, grad_off):
            with torch.autocast(x.device.type, enabled=False):
                by_covariance = 2 * (grad_off[:, None] + grad_off) * covariance
                by_covariance.diagonal().copy_(2 * grad_variance)
                centred = x.to(mean.dtype) - mean
                return ((centred @ by_covariance).mul_(ctx.world / (count - 1)).to(x.dtype),)

        return None, None, None, None, *once(ctx.op, ctx.chosen, (True,), make, (grad_variance, grad_off), x)


class _CovarianceSums(torch.autograd.Function):
    """(D,) variances, and the sum over the features of the other result of `_Covariance`, of few rows by products of
    rows with rows."""

    @staticmethod
    def forward(ctx, op, chosen, x):
        last = x.shape[0] - 1
        with torch.autocast(x.device.type, enabled=False):
            centred, mean = _centred(x, x.shape[0], "")
            if few_rows(x):
                product = centred @ centred.T
                variance = centred.square_().sum(0) / last
                squares = product.square().sum(dtype=torch.float64) / last**2
                off = squares - variance.square().sum(dtype=torch.float64)
            else:
                product = centred.T @ centred
                variance = product.diagonal() / last
                off = product.fill_diagonal_(0).square().sum(dtype=torch.float64) / last**2
        ctx.save_for_backward(*all_savable(x, mean, variance, product))
        ctx.op, ctx.chosen = op, chosen
        return variance.clone(), off

    @staticmethod
    def backward(ctx, grad_variance, grad_off):
        x, mean, variance, gram = ctx.saved_tensors

        def make(grad_variance, grad_off):
            with torch.autocast(x.device.type, enabled=False):
                last = x.shape[0] - 1
                factor = (4 * grad_off).to(mean.dtype) / last
                centred = x.to(mean.dtype) - mean
                own = 2 / last * grad_variance
                product = gram * (factor / last)
                if few_rows(x):  # whose product holds the variances too
                    own, made = own - factor * variance, product @ centred
                else:
                    made = centred @ product
                return (made.addcmul_(centred, own).to(x.dtype),)

        return None, None, *once(ctx.op, ctx.chosen, (True,), make, (grad_variance, grad_off), x)


class _MeanSquares(torch.autograd.Function):
    """(D,) means over the rows of (x − y)²."""

    @staticmethod
    def forward(ctx, op, chosen, group, world, x, y):
        acc = accumulation_dtype(x)
        count = count_of(x, group)
        ctx.save_for_backward(*all_savable(x, y, count))
        ctx.op, ctx.chosen, ctx.world = op, chosen, world
        return summed((x.to(acc) - y.to(acc)).square_().sum(0), group) / count

    @staticmethod
    def backward(ctx, grad):
        x, y, count = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:6]

        def make(grad):
            by_x = (x.to(grad.dtype) - y.to(grad.dtype)).mul_(2 * ctx.world / count * grad).to(x.dtype)
            return by_x, -by_x

        return None, None, None, None, *once(ctx.op, ctx.chosen, needs, make, (grad,), x, y)


def few_rows(x):
    """Whether products of rows with rows are the smaller ones."""
    return 2 * x.shape[0] <= x.shape[1]


def _sums_suffice(group):
    """Not where ranks add up their products; and sizes that change between the two ways would compile anew."""
    return not group and not torch.compiler.is_compiling()


def correlations(op, chosen, group, world, x, y, eps, summed_up):
    """`_Correlation` of a backend other than the reference, or with summed_up its results' sums over the features."""
    if summed_up and _sums_suffice(group) and few_rows(x):
        return _CorrelationSums.apply(op, chosen, x, y, eps)
    results = _Correlation.apply(op, chosen, group, world, x, y, eps)
    return tuple(each.sum() for each in results) if summed_up else results


def covariances(op, chosen, group, world, x, summed_up):
    """`_Covariance` of a backend other than the reference; with summed_up the second result's sum over the features."""
    if summed_up and _sums_suffice(group):
        return _CovarianceSums.apply(op, chosen, x)
    variance, others = _Covariance.apply(op, chosen, group, world, x)
    return variance, others.sum() if summed_up else others


def mean_squares(op, chosen, group, world, x, y):
    """`_MeanSquares` of a backend other than the reference."""
    return _MeanSquares.apply(op, chosen, group, world, x, y)


def group_and_world(op, group):
    """(name, number of ranks) of a process group; ("", 1) for None."""
    if group is None:
        return "", 1
    from ssl_kernels.distributed.groups import ranks_of  # which imports the losses

    ranks = ranks_of(op, group)[1]
    return ranks.name, ranks.world
