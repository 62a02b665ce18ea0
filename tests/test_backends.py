"""The choice of a backend, and the package where the extension or Triton is missing."""

import asyncio
import contextlib
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

import ssl_kernels
from ssl_kernels import _sources, backends, backends_for, nt_xent_loss, use_backend
from tests.helpers import random_rows, run_python

ROOT = Path(__file__).resolve().parents[1]
Z = random_rows(4, 8)


def chosen(**options):
    return backends.choose_backend("contrastive", options.get("backend"), "test", Z)


def test_order_of_preference():
    assert backends.BACKENDS == ("native", "triton", "chunked", "reference")
    assert chosen() == "native"


def test_use_backend_as_a_context_manager():
    with use_backend("chunked"):
        assert chosen() == "chunked"
        with use_backend("reference"):
            assert chosen() == "reference"
            with use_backend(None):
                assert chosen() == "native"
        assert chosen() == "chunked"
    assert chosen() == "native"


def test_use_backend_as_a_setter():
    try:
        use_backend("reference")
        assert chosen() == "reference"
        use_backend(None)
        assert chosen() == "native"
    finally:
        use_backend(None)


def test_backend_is_restored_after_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "native"


def test_argument_goes_before_use_backend():
    with use_backend("reference"):
        assert chosen(backend="chunked") == "chunked"


def test_forced_backend_really_runs(monkeypatch):
    def fail(*_):
        raise AssertionError("chunked ran")

    monkeypatch.setitem(ssl_kernels.ops.contrastive._fwd, "chunked", fail)
    nt_xent_loss(Z, Z)
    with use_backend("chunked"), pytest.raises(AssertionError, match="chunked ran"):
        nt_xent_loss(Z, Z)
    with pytest.raises(AssertionError, match="chunked ran"):
        nt_xent_loss(Z, Z, backend="chunked")


def test_forced_backend_that_cannot_run_says_why():
    with use_backend("triton"):
        with pytest.raises(
            ValueError, match=r'^nt_xent_loss: backend "triton" cannot run this call: it runs on cuda'
        ):
            nt_xent_loss(Z, Z)
        nt_xent_loss(Z, Z, backend="native")


def in_a_thread(function):
    """What `function()` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def automatic():
    """Takes back the plain calls of a test."""
    yield
    use_backend(None)


def test_blocks_of_two_threads_that_overlap_leave_nothing_behind():
    """The first to begin is the first to end: each sees its own, and others nothing, while both are open and after."""
    first_began, second_began, first_ended = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with use_backend("reference"):
            first_began.set()
            second_began.wait(10)
            seen["first"] = chosen()
        seen["first after"] = chosen()
        first_ended.set()

    def second():
        first_began.wait(10)
        with use_backend("chunked"):
            second_began.set()
            seen["second"] = chosen()
            first_ended.wait(10)
            seen["second still"] = chosen()
        seen["second after"] = chosen()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    second_began.wait(10)
    seen["outside"] = chosen()
    for thread in threads:
        thread.join()
    assert seen == {
        "first": "reference",
        "first after": "native",
        "second": "chunked",
        "second still": "chunked",
        "second after": "native",
        "outside": "native",
    }
    assert chosen() == in_a_thread(chosen) == "native"


def test_a_block_is_not_seen_elsewhere_not_even_while_it_is_made(automatic):
    block = use_backend("reference")  # as `with` does, one instruction before it enters
    assert (chosen(), in_a_thread(chosen)) == ("reference", "native")
    with block:
        assert (chosen(), in_a_thread(chosen)) == ("reference", "native")
    assert (chosen(), in_a_thread(chosen)) == ("native", "native")


def test_threads_that_hammer_blocks_disturb_nobody(automatic):
    use_backend("chunked")
    stop = threading.Event()

    def enter_and_leave():
        while not stop.is_set():
            with use_backend("reference"):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=enter_and_leave) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        seen = {chosen() for _ in range(3000)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert seen == {"chunked"}
    assert len(backends._calls) == 1


def test_a_plain_call_holds_in_every_thread_until_the_next(automatic):
    use_backend("reference")
    assert (chosen(), in_a_thread(chosen)) == ("reference", "reference")
    in_a_thread(lambda: use_backend("chunked") and None)
    assert (chosen(), in_a_thread(chosen)) == ("chunked", "chunked")
    with use_backend(None):
        use_backend("reference")  # holds where there is no block
        assert (chosen(), in_a_thread(chosen)) == ("native", "reference")
    assert (chosen(), in_a_thread(chosen)) == ("reference", "reference")
    use_backend(None)
    assert (chosen(), in_a_thread(chosen)) == ("native", "native")


def test_a_block_takes_back_its_own_call_alone(automatic):
    use_backend("chunked")
    kept = use_backend("reference")
    assert (chosen(), in_a_thread(chosen)) == ("reference", "chunked")
    with kept:
        pass
    assert (chosen(), in_a_thread(chosen)) == ("chunked", "chunked")
    with kept, kept:  # again, and inside itself
        assert chosen() == "reference"
    assert (chosen(), in_a_thread(chosen)) == ("chunked", "chunked")


def test_plain_calls_do_not_pile_up(automatic):
    for _ in range(100):
        use_backend("chunked")
        with use_backend("reference"):
            pass
    assert len(backends._calls) <= 2


def test_one_object_entered_by_two_threads(automatic):
    block = use_backend("reference")
    with block:
        assert in_a_thread(chosen) == "native"

        def enter():
            with block:
                return chosen()

        assert in_a_thread(enter) == "reference"
        assert chosen() == "reference"
    assert chosen() == "native"


def test_blocks_may_end_in_any_order():
    outer, inner = use_backend("reference"), use_backend("chunked")
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(outer)
        second.enter_context(inner)
        first.close()
        assert chosen() == "chunked"
        second.close()
        assert chosen() == "native"


def test_asyncio_tasks_have_blocks_of_their_own():
    async def task(name, turns):
        with use_backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert chosen() == name
        await asyncio.sleep(0)
        return chosen()

    async def both():
        with use_backend("chunked"):
            inside = asyncio.create_task(decorated())
        results = await asyncio.gather(
            task("reference", 3), task("chunked", 1), inside, asyncio.to_thread(chosen)
        )
        assert results == ["native", "native", "reference", "native"]
        assert chosen() == "native"

    @use_backend("reference")
    async def decorated():
        await asyncio.sleep(0)
        return chosen()

    asyncio.run(both())


def test_use_backend_as_a_decorator(automatic):
    @use_backend("chunked")
    def depth(count):
        assert chosen() == "chunked"
        return 0 if count == 0 else 1 + depth(count - 1)

    assert (chosen(), in_a_thread(chosen)) == ("native", "native")
    assert depth(3) == 3
    assert in_a_thread(lambda: (depth(1), chosen())) == (1, "native")
    assert depth.__name__ == "depth" and chosen() == "native"
    with pytest.raises(
        TypeError, match=r"^use_backend: it must decorate a function that is not a generator, got "
    ):

        @use_backend("chunked")
        def numbers():
            yield chosen()

    assert chosen() == "native"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_begins_with_what_held(automatic):
    use_backend("chunked")
    with use_backend("reference"):
        child = os.fork()
        if child == 0:
            os._exit(0 if (chosen(), in_a_thread(chosen)) == ("reference", "chunked") else 1)
    assert os.waitpid(child, 0)[1] == 0


def operators_of(graph):
    return {str(node.target) for node in graph.graph.nodes if "contrastive" in str(node.target)}


def test_compiled_code_follows_blocks_calls_and_threads(automatic):
    """One graph a choice, made again for none, and no graph break."""
    graphs = []

    def remember(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda z: ssl_kernels.clip_loss(z, z, 10.0), fullgraph=True, backend=remember)

    def call(name):
        before = len(graphs)
        compiled(Z)
        if len(graphs) > before:
            operators = operators_of(graphs[-1])
            assert operators == ({f"ssl_kernels.contrastive_fwd.{name}"} if name != "reference" else set())
        return len(graphs) - before

    assert call("native") == 1
    with use_backend("chunked"):
        assert call("chunked") == 1
        assert in_a_thread(lambda: call("native")) == 0
        with use_backend("reference"):
            assert call("reference") == 1
        assert call("chunked") == 0
    assert call("native") == 0
    use_backend("reference")
    assert call("reference") <= 1
    assert in_a_thread(lambda: call("reference")) == 0
    use_backend(None)
    assert call("native") == 0


def test_blocks_and_calls_inside_compiled_code(automatic):
    graphs = []

    def remember(graph, _):
        graphs.append(operators_of(graph))
        return graph

    def blocks(z):
        with use_backend("reference"):
            with use_backend("chunked"):
                first = ssl_kernels.clip_loss(z, z, 10.0)
            with use_backend(None):
                return first + ssl_kernels.clip_loss(z, z, 10.0)

    def plain(z):
        use_backend("chunked")
        return ssl_kernels.clip_loss(z, z, 10.0)

    torch._dynamo.reset()
    with use_backend("reference"):
        torch.compile(blocks, fullgraph=True, backend=remember)(Z)
    assert graphs.pop() == {"ssl_kernels.contrastive_fwd.chunked", "ssl_kernels.contrastive_fwd.native"}
    assert (chosen(), in_a_thread(chosen)) == ("native", "native")
    torch.compile(plain, fullgraph=True, backend=remember)(Z)
    assert graphs.pop() == {"ssl_kernels.contrastive_fwd.chunked"}
    assert (chosen(), in_a_thread(chosen)) == ("chunked", "chunked")
    with use_backend("reference"):
        assert chosen() == "reference"
    assert chosen() == "chunked"
    use_backend(None)
    assert chosen() == "native"


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    def fail(*_):
        raise AssertionError("chunked ran backward")

    monkeypatch.setitem(ssl_kernels.ops.contrastive._bwd, "chunked", fail)
    z = Z.clone().requires_grad_()
    with use_backend("chunked"):
        loss = nt_xent_loss(z, z)
        native = nt_xent_loss(z, z, backend="native")
    with pytest.raises(AssertionError, match="chunked ran backward"):
        in_a_thread_raising(loss.backward)
    with use_backend("chunked"):
        in_a_thread_raising(native.backward)


def in_a_thread_raising(function):
    def attempt():
        try:
            function()
        except AssertionError as error:
            return error

    error = in_a_thread(attempt)
    if error is not None:
        raise error


@pytest.mark.parametrize("name", ["cuda", "", 1, "Native"])
def test_unknown_name_is_refused_and_changes_nothing(name):
    with pytest.raises(
        ValueError, match=r'^use_backend: name must be "native", "triton", "chunked", "reference" or None'
    ):
        use_backend(name)
    assert chosen() == "native"


@pytest.mark.parametrize("op", ["contrastive", nt_xent_loss])
def test_backends_for_explains(op):
    found = backends_for(op, Z, Z, 0.5)
    assert list(found) == list(backends.BACKENDS)
    assert found["triton"] == "it runs on cuda, not on cpu"
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]
    meta = backends_for(op, Z.to("meta"), Z.to("meta"))
    assert meta["native"] == "it runs on cpu and cuda, not on meta"
    assert meta["chunked"] is None


@pytest.mark.parametrize("op", ["nt_xent", print])
def test_backends_for_an_unknown_operation(op):
    with pytest.raises(ValueError, match=r"^backends_for: op must be one of .*contrastive.* or a loss, got"):
        backends_for(op, Z)


WITHOUT = """
import sys
import torch
sys.modules[{module!r}] = None  # as if it were not there
import ssl_kernels
z0, z1 = torch.randn(2, 40, 8, requires_grad=True).unbind(0)
losses = [ssl_kernels.nt_xent_loss(z0, z1, backend=name) for name in (None, "chunked", "reference")]
torch.testing.assert_close(losses[0], losses[1])
torch.testing.assert_close(losses[0], losses[2])
sum(losses).backward()
reasons = ssl_kernels.backends_for("contrastive", z0)
print(reasons[{backend!r}])
try:
    ssl_kernels.nt_xent_loss(z0, z1, backend={backend!r})
except ValueError as error:
    print(error)
"""


def test_works_without_the_extension():
    output = run_python(WITHOUT.format(module="ssl_kernels._C", backend="native")).splitlines()
    assert output[0] == "the extension ssl_kernels._C is not built (docs/start.md says how)"
    assert output[1] == f'nt_xent_loss: backend "native" cannot run this call: {output[0]}'


def test_works_without_triton():
    """On the CPU the device is why Triton cannot run; nothing imports it."""
    output = run_python(WITHOUT.format(module="triton", backend="triton")).splitlines()
    assert output[1] == f'nt_xent_loss: backend "triton" cannot run this call: {output[0]}'


def test_importing_the_package_imports_no_optional_package():
    code = """
import sys
import torch
before = set(sys.modules)
import ssl_kernels
print(sorted(name for name in set(sys.modules) - before if "." not in name))
"""
    assert run_python(code).strip() == "['ssl_kernels']"


def test_extension_tells_what_was_built():
    info = backends.extension.build_info()
    assert info["torch"] == torch.__version__
    assert (
        info["cpu_instruction_set"] in info["cpu_instruction_sets"]
        and info["cpu_instruction_sets"][-1] == "portable"
    )


def test_the_extension_is_of_the_sources_beside_it(tmp_path):
    built = backends.extension.build_info()["sources"]
    assert _sources.staleness(built, ROOT) is None
    assert _sources.staleness(built, tmp_path) is None  # an installed package: no sources
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert _sources.staleness(built, tmp_path) is None  # another package's folder of that name
    (tmp_path / "setup.py").touch()
    assert _sources.staleness(built, tmp_path) is None
    for name in ("bindings.cpp", "cpu/tiles.h", "cuda/contrastive.cuh"):
        source = tmp_path / "csrc" / name
        text = source.read_text()
        source.write_text(text.replace("<", ">", 1))
        assert "built from other sources than those in" in _sources.staleness(built, tmp_path)
        source.write_text(text)
    source.rename(source.with_suffix(".h"))
    assert _sources.staleness(built, tmp_path) is not None


STALE = """
import pathlib
import warnings
import torch
pathlib.Path.read_bytes = lambda path: b"another source"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ssl_kernels
print(*{str(each.message) for each in caught if "numbers may be wrong" in str(each.message)})
"""


def test_an_extension_of_other_sources_is_said():
    """As after a pull without a build: arguments would mean something else, and losses be wrong without a word."""
    assert run_python(STALE).startswith("ssl_kernels: the extension was built from other sources")
