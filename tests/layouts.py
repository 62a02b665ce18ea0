"""Every operator of the library called with every tensor in every memory layout that its values can have.

`calls_of(operator, dtype, run)` has the calls of an operator, `variants_of` the layouts of a tensor. A layout of a side
input, which is everything but the matrices and batches in `MAIN`, must not change a bit of a result; that of a main one
may change the order of sums.
"""

import math
import mmap

import torch

import ssl_kernels  # noqa: F401  defines the operators

# By operator: matrices and batches, whose strides choose another kernel or another order of sums.
MAIN = {
    "contrastive_fwd": {"rows", "columns"},
    "contrastive_bwd": {"rows", "columns"},
    "class_contrastive_fwd": {"rows"},
    "class_contrastive_bwd": {"rows"},
    "sigmoid_pairs_fwd": {"rows", "columns"},
    "sigmoid_pairs_bwd": {"rows", "columns"},
    "batch_hard": {"embeddings"},
    "row_pairs_fwd": {"x", "y", "z"},
    "row_pairs_bwd": {"x", "y", "z"},
    "cluster_cross_entropy": {"rows", "prototypes", "teacher_rows", "teacher_columns"},
    "view_cross_entropy_fwd": {"student", "teacher"},
    "view_cross_entropy_bwd": {"student", "teacher"},
    "patch_errors_fwd": {"prediction", "target"},
    "patch_errors_bwd": {"prediction", "target"},
    "queue_push_": {"keys"},
    "mixup_": {"x"},
    "mixup_fwd": {"x"},
    "mixup_bwd": {"grad", "x"},
    "cutmix_": {"x"},
    "cutmix_fwd": {"x"},
    "cutmix_bwd": {"grad"},
    "mixup_normalize": {"x"},
    "mixup_cross_entropy_fwd": {"logits"},
    "mixup_cross_entropy_bwd": {"logits"},
}
# What an operator takes in one layout only, as its checks say; it can still begin anywhere.
DENSE = {
    "queue_push_": {"storage"},
    "momentum_update_": {"masters", "shadows", "sources"},
    "mixup_cross_entropy_bwd": {"lse"},  # on the CPU
    "patch_errors_bwd": {"mean", "rstd"},
}


def operators():
    """{name: names of its tensors} of the operators that have backends."""
    names = {
        name.removeprefix("ssl_kernels::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ssl_kernels::") and name.endswith(".chunked")
    }
    return {
        name: [
            argument.name
            for argument in getattr(torch.ops.ssl_kernels, name).chunked._schema.arguments
            if "Tensor" in str(argument.type)
        ]
        for name in sorted(names)
    }


def _poison(like, shape):
    """Memory around a view: NaN, or a number that names no row, label or pixel."""
    value = (
        torch.nan
        if like.dtype.is_floating_point
        else 1
        if like.dtype == torch.bool
        else 99
        if like.dtype == torch.uint8
        else 10**12
    )
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def _in(memory, values):
    return memory.copy_(values)


# More than 32 bits count, as a stride and all the more as a place; and a stride that 32 bits hold, but not its double.
# Both are multiples of every vector.
FAR, HALF_AS_FAR = 2**31 + 64, 2**30 + 64


def far_apart(tensor, dim=0, gap=FAR):
    """The same values, those along `dim` `gap` elements apart, in address space of which only their pages exist."""
    rest = [size for i, size in enumerate(tensor.shape) if i != dim]
    strides = [math.prod(rest[i + 1 :]) for i in range(len(rest))]
    strides.insert(dim, gap)
    count = (tensor.shape[dim] - 1) * gap + math.prod(rest)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    no_reserve = 0x4000  # Linux's MAP_NORESERVE
    memory = mmap.mmap(-1, count * tensor.element_size(), flags=private | no_reserve)
    whole = torch.frombuffer(memory, dtype=tensor.dtype)
    return _in(whole.as_strided(tensor.shape, strides), tensor)


def variants_of(tensor, unaligned=False):
    """{name: view} of layouts; all have the values of `tensor` but for "expanded ...", which repeat some of them."""
    step = 1 if unaligned else 16 // tensor.element_size()
    start = _poison(tensor, (tensor.numel() + 2 * step,))[step : step + tensor.numel()]
    found = {"offset": _in(start.view(tensor.shape), tensor)}
    if tensor.dim() == 0 or tensor.numel() == 0:
        return found
    if tensor.device.type == "cpu":
        found["far apart"] = far_apart(tensor)
        found["half as far apart"] = far_apart(tensor, gap=HALF_AS_FAR)
        if tensor.dim() == 2:
            found["columns half as far apart"] = far_apart(tensor, 1, HALF_AS_FAR)
    room = _poison(tensor, (*tensor.shape[:-1], 3 * tensor.shape[-1]))
    found["every third"] = _in(room[..., 1::3], tensor)
    if tensor.dim() > 1:
        room = _poison(tensor, (*tensor.shape[:-1], tensor.shape[-1] + 16))
        found["inside wider rows"] = _in(room[..., 8 : 8 + tensor.shape[-1]], tensor)
        order = list(reversed(range(tensor.dim())))
        room = _poison(tensor, tuple(tensor.shape[dim] for dim in order))
        found["transposed"] = _in(room.permute(order), tensor)
    for dim in range(tensor.dim()):
        if tensor.shape[dim] > 1:
            found[f"expanded along {dim}"] = tensor.narrow(dim, 0, 1).clone().expand(tensor.shape)
    if tensor.dim() > 1:
        found["one number"] = tensor.flatten()[:1].clone().view([1] * tensor.dim()).expand(tensor.shape)
    return found


def layouts_of(operator, name, tensor, unaligned=False):
    """{layout: view} of one argument of an operator."""
    found = variants_of(tensor, unaligned)
    if name in DENSE.get(operator, ()):
        found = {"offset": _in(found["offset"].view(-1).as_strided(tensor.shape, tensor.stride()), tensor)}
    if name in ("permutation", "partner"):  # no permutation repeats a number
        found = {layout: view for layout, view in found.items() if 0 not in view.stride()}
    # In place: each element has memory of its own.
    if _is_written(operator, name):
        found = {layout: view for layout, view in found.items() if 0 not in view.stride()}
    return found


def _is_written(operator, name):
    (argument,) = (
        a for a in getattr(torch.ops.ssl_kernels, operator).chunked._schema.arguments if a.name == name
    )
    return argument.alias_info is not None and argument.alias_info.is_write


def results(run, operator, call):
    """What an operator returns, or the tensors that it wrote, each in its own memory; `call` stays as it was."""
    written = [name for name in call if _is_tensor(call[name]) and _is_written(operator, name)]
    arguments = dict(call)
    for name in written:
        arguments[name] = _copied(call[name])
    returned = run(operator, *arguments.values())
    if written:
        returned = [tensor for name in written for tensor in _listed(arguments[name])]
    return [tensor.clone() for tensor in _listed(returned)]


def _is_tensor(value):
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, torch.Tensor)


def _listed(value):
    return [value] if isinstance(value, torch.Tensor) else list(value)


def _copied(value):
    """A tensor or list of the same strides and the same place in other memory."""
    if isinstance(value, list):
        return [_copied(tensor) for tensor in value]
    for gap in (FAR, HALF_AS_FAR):
        if gap in value.stride():
            return far_apart(value, value.stride().index(gap), gap)
    size = value.untyped_storage().nbytes() // value.element_size()
    whole = torch.as_strided(value, (size,), (1,), 0).clone()
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def check(run, operator, dtype, device="cpu", unaligned=False, main=None):
    """Runs all calls of an operator in all layouts of each argument; returns the names of the arguments seen.

    Args:
        run: run(operator, *arguments) runs a backend.
        unaligned: Side inputs in "offset" begin between multiples of 16 bytes.
        main: Layouts of main inputs that are taken, None for all.
    """
    seen = set()
    for call in calls_of(operator, dtype, device, run):
        for name, value in call.items():
            if not _is_tensor(value):
                continue
            seen.add(name)
            lists = isinstance(value, list)
            tensors = value if lists else [value]
            for position, tensor in enumerate(tensors):
                for layout, view in layouts_of(operator, name, tensor, unaligned).items():
                    if name in MAIN.get(operator, ()) and main is not None and layout not in main:
                        continue
                    pair = []
                    dense = tensor if name in DENSE.get(operator, ()) else view.contiguous().clone()
                    for other in (view, dense):
                        changed = [*tensors[:position], other, *tensors[position + 1 :]] if lists else other
                        pair.append(results(run, operator, {**call, name: changed}))
                    what = f"{operator}: {name} {layout}"
                    for ours, expected in zip(*pair, strict=True):
                        if name in MAIN.get(operator, ()):
                            near = torch.finfo(dtype).eps ** 0.5 if ours.is_floating_point() else 0
                            size = 1 + (expected.abs().max().item() if expected.numel() else 0)
                            torch.testing.assert_close(
                                ours, expected, rtol=0, atol=near * size,
                                msg=lambda text, what=what: f"{what}: {text}",
                            )  # fmt: skip
                        else:
                            same = (ours == expected) | ((ours != ours) & (expected != expected))
                            assert same.all(), what
    return seen


# --- calls ------------------------------------------------------------------------------------------------


def calls_of(operator, dtype, device, run):
    """Calls of an operator, {argument: value} in the order of its schema; together they have every tensor.

    `run(operator, *arguments)` makes what a backward takes from its forward.
    """
    backward = operator.endswith("_bwd")
    maker = _CALLS[operator.removesuffix("_bwd").removesuffix("_fwd")]
    names = [a.name for a in getattr(torch.ops.ssl_kernels, operator).chunked._schema.arguments]
    for values in maker(_Data(dtype, device), operator, run, backward):
        assert set(values) <= set(names), f"{operator}: no argument {set(values) - set(names)}"
        missing = [name for name in names if name not in values]
        assert not missing, f"{operator}: no value of {', '.join(missing)} in tests/layouts.py"
        yield {name: values[name] for name in names}


class _Data:
    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, device
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(1)

    def floats(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(dtype or self.dtype).to(self.device)

    def shares(self, *shape, dtype=None):
        values = 0.1 + 0.8 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return values.to(dtype or self.acc).to(self.device)

    def integers(self, below, *shape):
        return torch.randint(below, shape, generator=self.generator).to(self.device)

    def permutation(self, count):
        return torch.randperm(count, generator=self.generator).to(self.device)

    def number(self, value):
        return torch.tensor(value, dtype=self.acc, device=self.device)


def _contrastive(data, operator, run, backward):
    n, m, d = 6, 9, 16
    rows, columns = data.floats(n, d), data.floats(m, d)
    ids = {"row_ids": data.integers(4, n), "column_ids": data.integers(4, m)}
    none = {"row_ids": None, "column_ids": None}
    flags = {"normalize_rows": True, "normalize_columns": True}
    shapes = [
        # square; rectangular in both directions; the expectation of the columns
        (None, {**none, "row_ids": ids["row_ids"]}, (n, 2), False, True),
        (columns, ids, (n, 2), True, True),
        (columns, none, (n,), False, True),
        (columns, ids, (n, 2), False, False),
    ]
    nothing = {
        "column_bias": None,
        "row_bias": None,
        "row_limit": None,
        "exempt": None,
        "only_equal_ids": False,
    }
    calls = [(*shape, nothing) for shape in shapes]
    added = {
        "column_bias": data.floats(m, dtype=data.acc),
        "row_bias": data.floats(n, dtype=data.acc),
        "row_limit": data.floats(n, dtype=data.acc),
        "exempt": data.integers(2, m).bool(),
        "only_equal_ids": True,
    }
    calls.append((columns, ids, (n, 2), True, True, added))
    for other, numbers, shape, both, columns_need_grad, additions in calls:
        common = {"rows": rows, "columns": other, "scale": data.number(5.0), **numbers, **flags}
        common |= {"positives": data.integers(n if other is None else m, *shape)}
        common |= {"keep_diagonal": other is not None, "both_directions": both, **additions}
        forward = {**common, "keep": True, "columns_need_grad": columns_need_grad}
        forward |= {"equal_weights": columns_need_grad}
        if not backward:
            yield forward
            continue
        saved = run("contrastive_fwd", *_ordered("contrastive_fwd", forward))
        names = ("lse", "column_lse", None, "row_rnorm", "column_rnorm", "kept")
        saved = {name: value for name, value in zip(names, saved, strict=True) if name}
        grads = {
            "grad_lse": data.floats(n, dtype=torch.float64),
            "grad_column_lse": data.floats(m, dtype=torch.float64) if both else None,
            "grad_positive_logits": data.floats(*shape, dtype=torch.float64),
        }
        needs = {"rows_need_grad": True, "columns_need_grad": columns_need_grad and other is not None}
        for name in ("column_bias", "row_bias"):
            needs[f"{name}_needs_grad"] = additions[name] is not None
        yield {**grads, **common, **saved, **needs}


def _sigmoid_pairs(data, operator, run, backward):
    common = {"rows": data.floats(6, 16), "columns": data.floats(9, 16), "diagonal": 1}
    common |= {"scale": data.number(5.0), "bias": data.number(-2.0)}
    common |= {"normalize_rows": True, "normalize_columns": True}
    needs = {"rows_need_grad": True, "columns_need_grad": True}
    if backward:
        common |= {"grad_losses": data.floats(6, dtype=torch.float64)}
    for total in (False, True):
        more = {} if backward else {"total": total, "keep": total}
        for ids in ((None, None), (data.integers(3, 6), data.integers(3, 9))):
            marks = dict(zip(("row_ids", "column_ids"), ids, strict=True))
            marks["equal_ids_are_positive"] = total and ids[0] is not None
            yield {**common, **needs, **more, **marks}


def _batch_hard(data, operator, run, backward):
    # Small integers: every key is exact, and of equal ones the first is chosen.
    embeddings, labels = (data.integers(5, 9, 16) - 2).to(data.dtype), data.integers(3, 9)
    for distance in ("euclidean", "cosine"):
        yield {"embeddings": embeddings, "labels": labels, "normalize": False, "distance": distance}


def _class_contrastive(data, operator, run, backward):
    mask = data.integers(2, 6, 6) == 1
    for positives in (data.integers(3, 6), mask | mask.T):
        common = {
            "rows": data.floats(6, 16),
            "scale": data.number(2.0),
            "positives": positives,
            "normalize": True,
        }
        forward = {**common, "keep": True}
        if not backward:
            yield forward
            continue
        _, *saved = run("class_contrastive_fwd", *_ordered("class_contrastive_fwd", forward))
        saved = dict(zip(("counts", "lse", "row_rnorm", "kept"), saved, strict=True))
        yield {"grad_losses": data.floats(6, dtype=torch.float64), **common, **saved, "rows_need_grad": True}


def _row_pairs(data, operator, run, backward):
    for measure in ("product", "distance"):
        common = {"x": data.floats(6, 16), "y": data.floats(6, 16), "z": data.floats(6, 16)}
        common |= {"normalize": True, "measure": measure}
        if not backward:
            yield common
            continue
        _, saved = run("row_pairs_fwd", *common.values())
        needs = {f"{name}_needs_grad": True for name in "xyz"}
        yield {"grad_values": data.floats(6, dtype=torch.float64), **common, "saved": saved, **needs}


def _cluster_cross_entropy(data, operator, run, backward):
    views, n, k = 3, 4, 9
    common = {
        "rows": data.floats(views * n, 16), "prototypes": data.floats(k, 16), "scale": data.number(8.0),
        "teacher_rows": data.floats(2 * n, 8, dtype=data.acc), "teacher_columns": data.floats(k, 8, dtype=data.acc),
        "biases": data.floats(2, k, dtype=data.acc), "weights": data.shares(n, dtype=torch.float64),
        "views": views, "pairs": [0, 1, 0, 2, 1, 0, 1, 2], "normalize_rows": True, "normalize_columns": True,
        "less_entropy": False, "rows_need_grad": True, "prototypes_need_grad": True,
    }  # fmt: skip
    yield common
    yield common | {"less_entropy": True}


def _view_cross_entropy(data, operator, run, backward):
    common = {
        "student": [data.floats(5, 9) for _ in range(3)], "teacher": [data.floats(5, 9) for _ in range(2)],
        "scale": data.number(8.0), "steepness": data.number(20.0), "bias": data.floats(9, dtype=data.acc),
        "pairs": [0, 1, 0, 2, 1, 0, 1, 2],
    }  # fmt: skip
    more = {"weights": data.shares(5, dtype=torch.float64), "needs": [1, 1, 1, 1]} if backward else {}
    yield common | more


def _patch_errors(data, operator, run, backward):
    common = {"prediction": data.floats(5, 16), "target": data.floats(5, 16)}
    for normalize in (True, False):
        forward = {**common, "eps": data.number(1e-6), "normalize": normalize}
        if not backward:
            yield forward
            continue
        _, mean, rstd = run("patch_errors_fwd", *forward.values())
        yield {"grad": data.shares(5), **common, "mean": mean, "rstd": rstd}


def _queue_push_(data, operator, run, backward):
    position, filled = (torch.tensor(value, device=data.device) for value in (5, 3))
    yield {
        "storage": data.floats(7, 16), "keys": data.floats(4, 16), "position": position, "filled": filled,
        "normalize": True,
    }  # fmt: skip


def _momentum_update_(data, operator, run, backward):
    half = data.dtype if data.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    masters = [data.floats(5, 8, dtype=torch.float32), data.floats(6, 16, dtype=torch.float32).T]
    shadows = [master.to(half) for master in masters]
    sources = [data.floats(5, 8, dtype=torch.float32), data.floats(6, 16, dtype=half).T]
    yield {
        "masters": masters,
        "shadows": shadows,
        "sources": sources,
        "weight": torch.tensor(0.25, device=data.device),
    }


def _mixup(data, operator, run, backward):
    common = {"lam": data.shares(5), "permutation": data.permutation(5)}
    if backward:
        grad, x = data.floats(5, 3, 8), data.floats(5, 3, 8)
        for needs, with_x in ((True, True), (False, True), (True, False)):
            yield {"grad": grad, "x": x if with_x else None, **common, "x_needs_grad": needs}
    else:
        yield {"x": data.floats(5, 3, 8), **common}


def _cutmix(data, operator, run, backward):
    ends = [data.integers(size + 1, 5, 2).sort(1).values for size in (6, 8)]
    common = {"boxes": torch.cat(ends, 1), "permutation": data.permutation(5)}
    yield {"grad" if backward else "x": data.floats(5, 2, 6, 8), **common}


def _mixup_normalize(data, operator, run, backward):
    numbers = [data.shares(3, dtype=torch.float32) for _ in range(2)]
    dtype = torch.float32 if data.dtype == torch.float64 else data.dtype
    yield {
        "x": data.integers(256, 5, 3, 4, 8).to(torch.uint8), "lam": data.shares(5, dtype=torch.float32),
        "permutation": data.permutation(5), "mean": numbers[0], "std": numbers[1], "dtype": dtype,
    }  # fmt: skip


def _mixup_cross_entropy(data, operator, run, backward):
    common = {
        "logits": data.floats(5, 24), "target": data.integers(24, 5), "partner": data.permutation(5),
        "lam": data.shares(5), "weight": data.shares(24), "label_smoothing": 0.1, "ignore_index": 3,
        "partner_is_class": False, "reduction": "none",
    }  # fmt: skip
    if backward:
        _, lse, _ = run("mixup_cross_entropy_fwd", *common.values())
        del common["reduction"]
        common |= {"grad_loss": data.floats(5, dtype=torch.float64), "lse": lse}
    yield common


_CALLS = {
    "contrastive": _contrastive,
    "class_contrastive": _class_contrastive,
    "sigmoid_pairs": _sigmoid_pairs,
    "batch_hard": _batch_hard,
    "row_pairs": _row_pairs,
    "cluster_cross_entropy": _cluster_cross_entropy,
    "view_cross_entropy": _view_cross_entropy,
    "patch_errors": _patch_errors,
    "queue_push_": _queue_push_,
    "momentum_update_": _momentum_update_,
    "mixup": _mixup,
    "mixup_": _mixup,
    "cutmix": _cutmix,
    "cutmix_": _cutmix,
    "mixup_normalize": _mixup_normalize,
    "mixup_cross_entropy": _mixup_cross_entropy,
}


def _ordered(operator, values):
    names = [a.name for a in getattr(torch.ops.ssl_kernels, operator).chunked._schema.arguments]
    return [values[name] for name in names]
