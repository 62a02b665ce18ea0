"""`momentum_update_` on every CPU backend: the average in float64, rounding, layouts, versions, what it refuses."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_kernels.ops.momentum_update import momentum_update_
from tests.helpers import BACKENDS, OPERATORS, random_rows, same_bits
from tests.support.momentum_update import check, triples

HALF = (torch.float16, torch.bfloat16)
SOURCES = (torch.float32, *HALF)
SHAPES = ((), (1,), (7,), (0, 3), (5, 33), (16, 16), (3, 11, 1), (64, 1041))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)


@every_backend
@pytest.mark.parametrize("shadow_dtype", HALF, ids=str)
@pytest.mark.parametrize("source_dtype", SOURCES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.51, 0.999, 1.0])
def test_is_the_average_in_float64_rounded(backend, shadow_dtype, source_dtype, momentum):
    given = triples(shadow_dtype, source_dtype, SHAPES)
    masters, _, sources = given
    check(lambda: momentum_update_(*given, momentum, backend=backend), *given, momentum)
    if momentum == 1 or (momentum == 0 and backend != "reference"):
        expected = (
            triples(shadow_dtype, source_dtype, SHAPES)[0] if momentum == 1 else [s.float() for s in sources]
        )
        assert all(map(torch.equal, masters, expected))


@every_operator
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_moves_as_lerp_does_in_float32(backend, dtype):
    """No further from the truth than torch's own: errors of a step at m = 0.999 are those of the last bit."""
    masters, shadows, sources = triples(dtype, torch.float32, SHAPES)
    old = [master.clone() for master in masters]
    momentum_update_(masters, shadows, sources, 0.999, backend=backend)
    for before, master, source in zip(old, masters, sources, strict=True):
        exact = torch.lerp(before.double(), source.double(), 0.001)
        plain = (torch.lerp(before, source, 0.001).double() - exact).abs()
        ours = (master.double() - exact).abs()
        # The roundings of weight, difference, product and sum, which a fused multiply-add spares in part.
        rounding = before.abs() + 2 * 0.001 * (source.float() - before).abs()
        assert (ours <= plain + rounding * torch.finfo(torch.float32).eps).all()


@every_backend
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_written_into_a_shadow_replaces_its_master(backend, dtype):
    (master,), (shadow,), (source,) = triples(dtype, torch.float32, [(37,)])
    before = master.clone()
    shadow[5], shadow[36] = 8.0, -3.0
    momentum_update_([master], [shadow], [source], 1.0, backend=backend)
    assert master[5] == 8 and master[36] == -3
    kept = torch.ones(37, dtype=torch.bool)
    kept[[5, 36]] = False
    assert torch.equal(master[kept], before[kept])


@every_backend
def test_nan_inf_and_overflow_propagate(backend):
    master = torch.tensor([torch.nan, 1.0, 2.0, 7e4, 1.0, -0.0])
    shadow = master.half()
    source = torch.tensor([1.0, torch.nan, 1.0, 7e4, torch.inf, -0.0])
    momentum_update_([master], [shadow], [source], 0.75, backend=backend)
    assert master[:2].isnan().all() and shadow[:2].isnan().all()
    # 7e4 is infinite in float16 and stays a number in the master.
    expected = torch.tensor([1.75, 7e4, torch.inf, -0.0])
    torch.testing.assert_close(master[2:], expected, rtol=1e-6, atol=0)
    assert torch.equal(shadow[2:], expected.half())


@every_backend
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_any_dense_layout(backend, dtype):
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(4, 3, 5, 5, generator=generator)
    for master in (
        kernel.contiguous(memory_format=torch.channels_last),
        torch.randn(6, 9, generator=generator).T,
    ):
        for source in (
            master + 1,
            (master + 1).contiguous(),
            (master + 1)[..., None].expand(*master.shape, 2)[..., 1],
        ):
            average, shadow = master.clone(), master.to(dtype)
            assert not average.is_contiguous()
            momentum_update_([average], [shadow], [source], 0.5, backend=backend)
            torch.testing.assert_close(average, master + 0.5)
            assert same_bits(shadow, average.to(dtype))


@every_operator
def test_many_tensors_are_one_range(backend):
    """Cuts between threads fall inside of tensors and between them, on addresses of every alignment."""
    memory = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(4))
    lengths = [1, 16383, 16384, 16385, 2, 0, 40_001, 3, 77_777]
    masters, shadows, sources = (
        [part[3:] for part in row.split([length + 3 for length in lengths] + [200_000 - sum(lengths) - 27])][
            :-1
        ]
        for row in (memory[0], memory[1].to(torch.bfloat16), memory[2])
    )
    for master, shadow in zip(masters, shadows, strict=True):
        shadow.copy_(master)
    outside = memory[0].clone()
    expected = [torch.lerp(m, s, 0.125) for m, s in zip(masters, sources, strict=True)]
    momentum_update_(masters, shadows, sources, 0.875, backend=backend)
    for master, shadow, truth in zip(masters, shadows, expected, strict=True):
        torch.testing.assert_close(master, truth, rtol=1e-6, atol=1e-7)
        assert same_bits(shadow, master.to(torch.bfloat16))
        master.fill_(0)
    gaps = memory[0] != 0
    assert torch.equal(memory[0][gaps], outside[gaps]) and int(gaps.sum()) >= 3 * len(lengths)


@every_operator
def test_advances_the_versions_of_what_it_writes(backend):
    masters, shadows, sources = triples(torch.bfloat16, torch.float32, [(3,), (4, 5)])
    versions = [t._version for t in (*masters, *shadows)]
    momentum_update_(masters, shadows, sources, 0.9, backend=backend)
    assert all(t._version > v for t, v in zip((*masters, *shadows), versions, strict=True))
    assert all(source._version == 0 for source in sources)


@every_backend
def test_no_tensors_and_sources_with_a_history(backend):
    momentum_update_([], [], [], 0.9, backend=backend)
    master, shadow = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    momentum_update_([master], [shadow], [torch.ones(3, requires_grad=True) * 2], 0.5, backend=backend)
    assert not master.requires_grad and (shadow == 1).all()


@every_operator
def test_opcheck(backend):
    operator = getattr(torch.ops.ssl_kernels.momentum_update_, backend)
    torch.library.opcheck(
        operator, (*triples(torch.bfloat16, torch.float16, [(3,), (4, 5)]), torch.tensor(0.1))
    )


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()

    def update(masters, shadows, sources):
        momentum_update_(masters, shadows, sources, 0.9, backend=backend)
        return [shadow * 2 for shadow in shadows]

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    traced, eager = (triples(torch.bfloat16, torch.float32, [(3,), (4, 5)]) for _ in range(2))
    for _ in range(2):
        assert all(map(same_bits, compiled(*traced), update(*eager)))
        assert all(map(same_bits, traced[0], eager[0]))


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_a_momentum_that_changes_is_compiled_twice(backend):
    torch._dynamo.reset()
    graphs = CompileCounter()

    def update(masters, shadows, sources, momentum):
        momentum_update_(masters, shadows, sources, momentum, backend=backend)

    compiled = torch.compile(update, fullgraph=True, backend=graphs)
    traced, eager = (triples(torch.bfloat16, torch.float32, [(3,), (4, 5)]) for _ in range(2))
    for step in range(12):
        compiled(*traced, 0.9 + step / 200)
        update(*eager, 0.9 + step / 200)
        assert all(map(same_bits, traced[0] + traced[1], eager[0] + eager[1]))
    assert graphs.frame_count <= 2


@every_backend
def test_momentum_as_a_tensor(backend):
    one, other = (triples(torch.bfloat16, torch.float32, SHAPES) for _ in range(2))
    momentum_update_(*one, 0.9, backend=backend)
    momentum_update_(*other, torch.tensor(0.9, dtype=torch.float64), backend=backend)
    assert all(map(same_bits, one[0] + one[1], other[0] + other[1]))


def test_fake_tensors_are_traced():
    call = triples(torch.bfloat16, torch.float32, [(3,), (4, 5)])
    with FakeTensorMode() as mode:
        faked = [[mode.from_tensor(t) for t in tensors] for tensors in call]
        momentum_update_(*faked, 0.9)
    assert [[t.shape for t in tensors] for tensors in faked] == [
        [t.shape for t in tensors] for tensors in call
    ]
    assert all(t._version == 1 for tensors in faked[:2] for t in tensors)


@every_backend
def test_tensors_of_inference_mode(backend):
    """Written there or, if they were made there, nowhere else: the refusal comes before anything is written."""
    with torch.inference_mode():
        inside = triples(torch.bfloat16, torch.float32, [(3,), (4, 5)])
        momentum_update_(*inside, 0.9, backend=backend)
    one, other = (triples(torch.bfloat16, torch.float32, [(3,), (4, 5)]) for _ in range(2))
    with torch.inference_mode():
        momentum_update_(*one, 0.9, backend=backend)
    momentum_update_(*other, 0.9, backend=backend)
    assert all(map(same_bits, one[0] + one[1], other[0] + other[1]))
    masters, shadows, sources = one
    before = masters[0].clone()
    with pytest.raises(
        ValueError, match=r"^momentum_update_: masters\[1\] and shadows\[1\] must not be written"
    ):
        momentum_update_([masters[0], inside[0][1]], shadows, sources, 0.9, backend=backend)
    assert same_bits(masters[0], before)


def good_call():
    masters, shadows, sources = triples(torch.bfloat16, torch.float32, [(3,), (4, 5)])
    return {"masters": masters, "shadows": shadows, "sources": sources, "momentum": 0.9}


def spoilt(name, tensor):
    return lambda call: call | {name: [call[name][0], tensor]}


@pytest.mark.parametrize("change, message", [
    (lambda call: call | {"momentum": "0.9"}, "momentum must be a number, got str"),
    (lambda call: call | {"momentum": torch.ones(2)}, r"momentum must be a number or a 0-d floating tensor, got shape"),
    (lambda call: call | {"momentum": torch.tensor(0.9, device="meta")}, "momentum must be on the device of"),
    (lambda call: call | {"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
    (lambda call: call | {"sources": call["sources"][:1]}, "masters, shadows and sources must have one length, got 2"),
    (spoilt("masters", torch.zeros(4, 5).double()), r"masters\[1\] must be float32, got torch.float64"),
    (spoilt("shadows", torch.zeros(4, 5)), r"shadows\[1\] must be float16 or bfloat16, got torch.float32"),
    (spoilt("sources", torch.zeros(4, 5).long()), r"sources\[1\] must be float32, float16 or bfloat16, got"),
    (spoilt("sources", 3), r"sources\[1\] must be a tensor, got int"),
    (spoilt("sources", torch.zeros(5, 4)), r"sources\[1\] must have the shape \(4, 5\) of its master, got \(5, 4\)"),
    (spoilt("sources", torch.zeros(4, 5, device="meta")), r"sources\[1\] must be on cpu as masters\[0\] is, got meta"),
    (spoilt("masters", torch.zeros(4, 10)[:, ::2]), r"masters\[1\] must be dense, got shape \(4, 5\) with strides"),
    (spoilt("masters", torch.zeros(1, 5).expand(4, 5)), r"masters\[1\] must be dense"),
    (spoilt("shadows", torch.zeros(5, 4).bfloat16().T), r"shadows\[1\] must have the strides \(5, 1\) of its master"),
    (spoilt("masters", torch.zeros(4, 5, requires_grad=True)), r"masters\[1\] and shadows\[1\] must not require grad"),
])  # fmt: skip
def test_refuses_what_does_not_fit(change, message):
    for backend in BACKENDS:
        call = change(good_call())
        before = [tensor.detach().clone() for tensor in call["masters"]]
        with pytest.raises((TypeError, ValueError), match=f"^momentum_update_: {message}"):
            momentum_update_(**call, backend=backend)
        assert all(map(torch.equal, call["masters"], before))


def test_native_operator_refuses_what_it_would_write_out_of_bounds():
    operator = torch.ops.ssl_kernels.momentum_update_.native
    for change in (
        spoilt("sources", torch.zeros(4, 4)),
        spoilt("sources", torch.zeros(5, 4).T),
        spoilt("shadows", torch.zeros(4, 5)),
        spoilt("masters", torch.zeros(4, 5).double()),
        lambda call: call | {"shadows": call["shadows"][:1]},
        lambda call: call | {"weight": torch.tensor(0.1).double()},
        lambda call: call | {"weight": torch.tensor([0.1])},
    ):
        call = change(good_call() | {"weight": torch.tensor(0.1)})
        with pytest.raises(RuntimeError, match="momentum_update_"):
            operator(*(call[name] for name in ("masters", "shadows", "sources", "weight")))


def test_random_rows_of_a_deep_average_stay_close():
    """Ten thousand steps at m = 0.9999: the float32 master follows float64."""
    source = random_rows(8, 16)
    master, shadow = torch.zeros(8, 16), torch.zeros(8, 16, dtype=torch.bfloat16)
    for _ in range(10_000):
        momentum_update_([master], [shadow], [source], 0.9999)
    torch.testing.assert_close(master.double(), source.double() * (1 - 0.9999**10_000), rtol=1e-4, atol=1e-6)
