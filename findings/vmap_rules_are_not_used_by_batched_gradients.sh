#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0: torch.autograd.grad(..., is_grads_batched=True), and with it jacobian(vectorize=True) and
# gradcheck(check_batched_grad=True), does not know the rules of torch.vmap. A custom operator's rule from
# torch.library.register_vmap, and the `vmap` of a torch.autograd.Function, are called under torch.vmap of the same backward and
# not here. An operator of tensors goes by a fallback of its own, slowly and right; one that takes a list of tensors raises
# "Batching rule not implemented ... We could not generate a fallback", although its rule is there; and the Function's forward
# gets the stand-in of the whole batch, which says that it is of one gradient, and reading its memory raises. Expected what
# torch.vmap gives: its documentation names vmap as what it uses.
#
# Seen: torch.vmap right with each rule called once; is_grads_batched no rule called, right for the operator of tensors,
# RuntimeError for the operator of a list, and for the Function whose forward reads its gradient's memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import torch

called = []


@torch.library.custom_op("demo::scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(2 * x.numpy())


@torch.library.custom_op("demo::scale_all", mutates_args=())
def scale_all(several: list[torch.Tensor]) -> torch.Tensor:
    return torch.from_numpy(2 * several[0].numpy())


@torch.library.register_vmap("demo::scale")
def _(info, in_dims, x):
    called.append("rule")
    return scale(x.contiguous()), in_dims[0]


@torch.library.register_vmap("demo::scale_all")
def _(info, in_dims, several):
    called.append("rule")
    return scale_all([x.contiguous() for x in several]), in_dims[0][0]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return torch.from_numpy(2 * x.numpy())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        called.append("rule")
        return Doubled.apply(x), in_dims[0]


def node(of_gradient):
    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return of_gradient(grad)

    return Node.apply


def outcome(slopes):
    called.clear()
    try:
        right = torch.equal(slopes(), 2 * torch.eye(3))
    except RuntimeError as error:
        return f"{type(error).__name__}, rule called {len(called)} times"
    return f"{'right' if right else 'wrong'}, rule called {len(called)} times"


for name, of_gradient, expected in (
    ("operator of a tensor", scale, "right, rule called 0 times"),
    ("operator of a list", lambda grad: scale_all([grad]), "RuntimeError, rule called 0 times"),
    ("Function with vmap", Doubled.apply, "RuntimeError, rule called 0 times"),
):
    x = torch.ones(3, requires_grad=True)
    y = node(of_gradient)(x)
    mapped = outcome(lambda: torch.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(torch.eye(3)))
    batched = outcome(lambda: torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)[0])
    print(f"{torch.__version__}, {name}: torch.vmap {mapped}; is_grads_batched {batched}")
    assert mapped == "right, rule called 1 times" and batched == expected, "torch behaves differently now"
PY
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6
  "$folder/$version/bin/python" -W ignore "$folder/try.py"
  rm -rf "${folder:?}/$version"
done
