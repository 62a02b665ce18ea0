"""`patch` on a library made for it, in every order of imports, and on the real ones where they are installed."""

import functools
import importlib
import sys
import textwrap
import threading
import types

import pytest

import ssl_kernels
from ssl_kernels.adapters import _patching, _shared
from tests.helpers import run_python


class Adapter:
    pass


def adapter_function():
    return "adapter"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library `pretended` with a class and a function in a module of its package, and its adapter."""
    package = tmp_path / "pretended"
    (package / "loss").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "loss" / "__init__.py").write_text(
        "from pretended.loss.one import Thing, function\nclass OtherLoss: pass\n"
    )
    (package / "loss" / "one.py").write_text(
        "class Base: pass\nclass Thing(Base):\n    def who(self): return super().__str__()\n"
        "def function(): return 'original'\n"
    )
    (tmp_path / "user.py").write_text(
        "from pretended.loss import Thing as Mine, function\nheld = {'x': Mine}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    adapter = types.ModuleType("ssl_kernels.adapters.pretended")
    adapter.ORIGINALS = {"Thing": "pretended.loss.one", "function": "pretended.loss.one"}
    adapter.HOME = "pretended.loss"
    adapter.Thing, adapter.function = Adapter, adapter_function
    monkeypatch.setitem(sys.modules, adapter.__name__, adapter)
    monkeypatch.setattr(ssl_kernels.adapters, "LIBRARIES", ("pretended",))
    yield adapter
    for patch in list(_patching._active):
        patch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pretended", "user")]:
        del sys.modules[name]


def test_a_library_that_is_imported_already(library):
    user = importlib.import_module("user")
    original, function = user.Mine, user.function
    patch = ssl_kernels.patch("pretended")
    import pretended.loss

    assert user.Mine is pretended.loss.Thing is pretended.loss.one.Thing is Adapter
    assert user.function() == "adapter"
    patch.undo()
    assert user.Mine is pretended.loss.Thing is pretended.loss.one.Thing is original
    assert user.function is pretended.loss.function is function
    assert not _shared.originals
    patch.undo()


def test_a_library_that_is_imported_later(library):
    with ssl_kernels.patch("pretended") as patch:
        assert patch in sys.meta_path and not patch.changed
        user = importlib.import_module("user")
        assert user.Mine is Adapter and len(patch.changed) == 2
        assert patch not in sys.meta_path
        module = sys.modules["pretended.loss.one"]
        assert type(module.__loader__) is type(module.__spec__.loader) is not _patching._Loader
    assert user.Mine is not Adapter and user.Mine is sys.modules["pretended.loss"].Thing
    assert user.function() == "original"


def test_undone_before_the_library_is_imported(library):
    with ssl_kernels.patch("pretended"):
        pass
    assert importlib.import_module("user").Mine is not Adapter


def test_names_that_were_the_adapters_stay(library):
    own = types.ModuleType("own")
    own.Mine = Adapter
    sys.modules["own"] = own
    try:
        importlib.import_module("user")
        with ssl_kernels.patch("pretended"):
            pass
        assert own.Mine is Adapter
    finally:
        del sys.modules["own"]


def test_what_is_changed_and_left_is_said(library, caplog):
    user = importlib.import_module("user")
    thing = user.Mine()

    class Derived(user.Mine):
        pass

    patch = ssl_kernels.patch("pretended")
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert (
        "changed: pretended.loss.one.Thing is" in said and "pretended.loss, pretended.loss.one, user" in said
    )
    assert "left: 1 object(s) of the original Thing exist already" in said
    assert "Derived is a subclass of the original Thing" in said
    assert "the original Thing is still held by: dict" in said  # user.held
    assert "the original function is still held" not in said
    assert "left: pretended.loss: no adapter of OtherLoss" in said
    assert len(patch.changed) == 2
    assert thing and Derived


class Trainer:
    """Holds a class as an attribute of its own or of an object."""

    def __init__(self, kind):
        self.kind = kind


def with_default(kind):
    def build(kind=kind):
        return kind

    return build


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda kind: functools.partial(kind), "partial"),
        (lambda kind: types.SimpleNamespace(kind=kind), "dict"),
        (lambda kind: type("Task", (), {"kind": kind}), "dict"),
        (with_default, "tuple"),
        (lambda kind: [kind], "list"),
    ],
)
def test_every_kind_of_reference_that_is_left_is_said(library, make, name):
    holder = make(importlib.import_module("pretended.loss").Thing)
    with ssl_kernels.patch("pretended") as patch:
        said = [line for line in patch.left if line.startswith("the original Thing is still held by: ")]
    assert holder and len(said) == 1 and name in said[0]


def test_an_attribute_of_an_object_is_said(library):
    holder = Trainer(importlib.import_module("pretended.loss").Thing)
    with ssl_kernels.patch("pretended") as patch:
        assert "the original Thing is still held by: Trainer" in patch.left
    assert holder.kind is sys.modules["pretended.loss"].Thing


def other_adapter(library, monkeypatch, module="pretended.loss.one"):
    """A second adapter, `other`, of a function in a module."""
    adapter = types.ModuleType("ssl_kernels.adapters.other")
    adapter.ORIGINALS = {"function": module}
    adapter.function = adapter_function
    monkeypatch.setitem(sys.modules, adapter.__name__, adapter)
    monkeypatch.setattr(ssl_kernels.adapters, "LIBRARIES", ("other", "pretended"))
    library.ORIGINALS = {"Thing": "pretended.loss.one"}


@pytest.mark.parametrize("imported", [False, True])
def test_patches_of_several_libraries_that_overlap(library, monkeypatch, imported):
    """Undone in another order than made; one of another library than the one that is undone stands."""
    other_adapter(library, monkeypatch)
    if imported:
        importlib.import_module("user")
    first, both, last = (
        ssl_kernels.patch(*names) for names in (("pretended",), ("pretended", "other"), ("other",))
    )
    user = importlib.import_module("user")
    assert user.Mine is Adapter and user.function is adapter_function
    first.undo()
    assert user.Mine is Adapter and user.function is adapter_function
    both.undo()
    assert user.Mine.__module__ == "pretended.loss.one" and user.function is adapter_function
    last.undo()
    assert user.function() == "original" and not _shared.originals


def test_an_adapter_that_cannot_be_had_leaves_no_patch(library):
    importlib.import_module("user")
    del library.Thing
    with pytest.raises(AttributeError, match="Thing"):
        ssl_kernels.patch("pretended")
    assert not _patching._active and not any(isinstance(one, _patching.Patch) for one in sys.meta_path)


def test_threads_may_patch_at_the_same_time(library):
    user = importlib.import_module("user")
    original, failures = user.Mine, []

    def work():
        for _ in range(2):
            with ssl_kernels.patch("pretended"):
                if user.Mine is not Adapter:
                    failures.append(user.Mine)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and user.Mine is original and not _shared.originals


@pytest.fixture
def first(library):
    """A thread that makes a patch, `patches[0]`, and stands still while it gets the adapter until `may_go_on`."""
    asked, may_go_on, patches = threading.Event(), threading.Event(), []

    class Slow(types.ModuleType):
        def __getattribute__(self, name):
            if name == "Thing" and threading.current_thread() is thread:
                asked.set()
                assert may_go_on.wait(60)
            return super().__getattribute__(name)

    thread = threading.Thread(target=lambda: patches.append(ssl_kernels.patch("pretended")))
    thread.patches, thread.may_go_on = patches, may_go_on
    library.__class__ = Slow
    importlib.import_module("user")
    thread.start()
    assert asked.wait(60)
    yield thread
    may_go_on.set()
    thread.join(60)


def test_a_patch_waits_while_another_thread_gets_the_adapters(first):
    user, found = importlib.import_module("user"), []

    def work():
        with ssl_kernels.patch("pretended"):
            found.append(user.Mine)

    second = threading.Thread(target=work)
    second.start()
    second.join(0.3)
    assert second.is_alive() and not found
    first.may_go_on.set()
    second.join(60)
    assert found == [Adapter]


def test_a_patch_that_cannot_wait_is_made_by_the_thread_that_was_at_it(first, monkeypatch):
    """As one is that an import would make."""
    user = importlib.import_module("user")
    original = user.Mine
    monkeypatch.setattr(_patching.Patch, "_is_prepared_elsewhere", lambda self: False)
    second = ssl_kernels.patch("pretended")
    assert user.Mine is original
    first.may_go_on.set()
    first.join(60)
    first.patches[0].undo()
    assert user.Mine is Adapter
    second.undo()
    assert user.Mine is original and not _shared.originals


@pytest.mark.parametrize("first", [0, 1])
def test_patches_that_overlap_stand_until_the_last_is_undone(library, first):
    user = importlib.import_module("user")
    original, function = user.Mine, user.function
    patches = [ssl_kernels.patch("pretended") for _ in range(2)]
    patches[first].undo()
    assert user.Mine is Adapter and user.function is adapter_function
    patches[1 - first].undo()
    assert user.Mine is original and user.function is function and not _shared.originals


def test_an_undone_patch_is_not_entered_again(library):
    patch = ssl_kernels.patch("pretended")
    patch.undo()
    with pytest.raises(RuntimeError, match="call patch again"), patch:
        pass


def test_classes_that_look_themselves_up_go_on_working(library, tmp_path):
    (tmp_path / "user.py").write_text(
        "from pretended.loss import Thing\n"
        "class Mine(Thing):\n    def who(self): return Thing.__repr__(self)\n"
        "    def below(self): return super(Thing, self).__repr__()\n"
    )
    user = importlib.import_module("user")
    mine = user.Mine()
    with ssl_kernels.patch("pretended") as patch:
        assert "user keeps Thing, which its classes look up there" in patch.left
        assert mine.who() == mine.below()
        assert sys.modules["pretended.loss"].Thing is Adapter


def test_a_second_patch_of_the_same_changes_nothing(library):
    user = importlib.import_module("user")
    original = user.Mine
    with ssl_kernels.patch("pretended"):
        with ssl_kernels.patch("pretended") as second:
            assert not second.changed
        assert user.Mine is Adapter
    assert user.Mine is original


def test_a_missing_name_is_said(library):
    library.ORIGINALS["Gone"] = "pretended.loss.one"
    importlib.import_module("user")
    with ssl_kernels.patch("pretended") as patch:
        assert "pretended.loss.one has no Gone in this version" in patch.left


@pytest.mark.parametrize(
    ("mine", "swapped"),
    [
        (lambda x, scale=1.0: 0, True),
        (lambda x, scale=1.0, added=None: 0, True),
        (lambda x, scale=1.0, *, strict=False: 0, True),
        (lambda x: 0, False),
        (lambda x, scale=2.0: 0, False),
        (lambda x, added=None, scale=1.0: 0, False),
        (lambda x, *, scale=1.0: 0, False),
    ],
)
@pytest.mark.parametrize("kind", ["function", "forward"])
def test_an_original_of_other_arguments_is_left(library, tmp_path, mine, swapped, kind):
    """In another version of its library."""
    text = "def function(x, scale=1.0): return 'original'\nclass Thing:\n    forward = function\n"
    (tmp_path / "pretended" / "loss" / "one.py").write_text(text)
    library.function, library.Thing = mine, type("Thing", (), {"forward": mine})
    library.ORIGINALS = {"function" if kind == "function" else "Thing": "pretended.loss.one"}
    user = importlib.import_module("user")
    with ssl_kernels.patch("pretended") as patch:
        assert (user.function is mine or user.Mine is library.Thing) == swapped
        said = [line for line in patch.left if "takes other arguments in this version: (" in line]
        assert len(said) == (not swapped)


def test_libraries_that_do_not_exist(library, monkeypatch):
    with pytest.raises(ValueError, match=r"^patch: libraries must be among pretended, got 'lightli'$"):
        ssl_kernels.patch("lightli")
    with pytest.raises(ValueError, match="got none"):
        ssl_kernels.patch()
    library.ORIGINALS = {}
    with pytest.raises(ValueError, match="a file that is copied"):
        ssl_kernels.patch("pretended")
    library.ORIGINALS = {"Thing": "not_installed_here.loss"}
    with pytest.raises(ModuleNotFoundError, match="must be installed, got no module not_installed_here"):
        ssl_kernels.patch("pretended")


def test_the_environment_variable():
    """A script that imports ssl_kernels only because something of its environment does."""
    code = """
    import ssl_kernels, sys
    import torchvision.transforms.v2 as v2
    print(v2.MixUp.__module__)
    """
    if "torchvision" in ssl_kernels.adapters.LIBRARIES:
        pytest.importorskip("torchvision", reason="torchvision is not installed")
        found = run_python(textwrap.dedent(code), SSL_KERNELS_PATCH=" torchvision,")
        assert found.split()[-1].startswith("ssl_kernels.adapters.")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("pretended, lightli", "its libraries, separated by commas, must be among pretended, got 'lightli'"),
        ("pretended;lightly", "must be among pretended, got 'pretended;lightly'"),
    ],
)
def test_the_environment_variable_with_a_name_that_is_none(library, value, message):
    """Of which nothing is patched, the libraries before it neither."""
    original = importlib.import_module("user").Mine
    with pytest.raises(ValueError, match=rf"^SSL_KERNELS_PATCH: .*{message}$"):
        _patching.patch_from_environment(value)
    assert importlib.import_module("user").Mine is original and not _patching._active
    for nothing in ("", " , "):
        _patching.patch_from_environment(nothing)
    assert not _patching._active


@pytest.mark.parametrize("when", ["before", "after"])
def test_lightly(when):
    pytest.importorskip("lightly.loss", reason="lightly is not installed")
    imports = "from lightly.loss import NTXentLoss\nimport lightly.loss"
    patches = "import ssl_kernels; patch = ssl_kernels.patch('lightly')"
    lines = [patches, imports] if when == "before" else [imports, patches]
    code = "\n".join(
        [
            *lines,
            "import torch",
            "assert NTXentLoss is lightly.loss.NTXentLoss is ssl_kernels.adapters.lightly.NTXentLoss",
            "print(lightly.loss.NTXentLoss(0.5)(*torch.randn(2, 4, 8)).item())",
            "patch.undo()",
            "assert NTXentLoss is lightly.loss.NTXentLoss is not ssl_kernels.adapters.lightly.NTXentLoss",
        ]
    )
    assert float(run_python(code)) > 0
