"""`patch`: adapters in the place of other libraries' classes, in code that cannot be edited."""

import collections
import functools
import gc
import importlib
import importlib.util
import inspect
import logging
import sys
import threading
import types

from ssl_kernels.adapters import _shared

ENVIRONMENT = "SSL_KERNELS_PATCH"
log = logging.getLogger("ssl_kernels.patch")
_active = []  # patches that were not undone
_running = collections.Counter()  # by library: its modules whose code is being run
_preparing = {}  # by library: the thread that gets its adapters, for which it may be imported
_lock = threading.RLock()  # of these and of all modules' names; nothing is imported under it
_prepared = threading.Condition(_lock)


def patch(*libraries: str) -> "Patch":
    """Put the adapters in the place of the classes and functions of `libraries`, until it is undone.

        patch("lightly", "open_clip")          # for good, or until .undo()
        with patch("lightly"): ...             # for a while

    Every module that holds a class under some name, as after `from lightly.loss import NTXentLoss`, holds the adapter
    afterwards; a library that is imported later is patched when it is. The logger "ssl_kernels.patch" says as a
    warning what was changed and what was left: objects and subclasses that exist already, modules whose classes
    look the original up while they work, references in containers, attributes, closures, default arguments and
    partials, losses of the library for which there is no adapter, and those whose arguments are others in the
    installed version. Of patches that overlap the last one to be undone puts the originals back.

    The environment variable SSL_KERNELS_PATCH="lightly,open_clip" does the same where ssl_kernels is imported, and
    where it is installed from a wheel in every Python process.

    Args:
        libraries: Names of modules in `ssl_kernels.adapters`; at least one.

    Returns:
        Patch, a context manager: `changed` and `left` are lists of what was said, `undo()` puts everything back.

    Raises:
        ValueError: There is no such adapter.
        ModuleNotFoundError: A library is not installed.
    """
    adapters = _adapters(libraries, "patch: libraries")
    for library, adapter in zip(libraries, adapters, strict=True):
        for root in {_root(module) for module in adapter.ORIGINALS.values()}:
            if root not in sys.modules and importlib.util.find_spec(root) is None:
                raise ModuleNotFoundError(
                    f"patch: {library} must be installed, got no module {root}", name=root
                )
    return Patch(adapters)


def _adapters(libraries, asked):
    """The adapters' modules of libraries that can be patched. `asked`: who asks and for what, for error messages."""
    from ssl_kernels.adapters import LIBRARIES

    known = {library: importlib.import_module(f"ssl_kernels.adapters.{library}") for library in LIBRARIES}
    packages = ", ".join(library for library, adapter in known.items() if adapter.ORIGINALS)
    if not libraries:
        raise ValueError(f"{asked} must name one of {packages}, got none")
    for library in libraries:
        if library not in known:
            raise ValueError(f"{asked} must be among {packages}, got {library!r}")
        if not known[library].ORIGINALS:
            raise ValueError(f"{asked} must be among {packages}, got {library!r}, a file that is copied")
    return [known[library] for library in libraries]


class Patch:
    """What `patch` returns."""

    def __init__(self, adapters):
        self.changed, self.left = [], []
        self._places = []  # (namespace, key, original, adapter)
        self._pending = {}  # (module, name) of an original: its adapter module
        for adapter in adapters:
            self._pending |= {(module, name): adapter for name, module in adapter.ORIGINALS.items()}
        self._roots = {_root(module) for module, _ in self._pending}
        self._held = set()  # places that held an adapter before
        self._shared = set()  # adapters that another patch had put there already
        with _lock:
            _active.append(self)
            sys.meta_path.insert(0, self)
        try:
            self.swap(waits=True)
        except BaseException:
            self.undo()
            raise

    def __enter__(self):
        if self not in _active:
            raise RuntimeError("patch: a patch that was undone must be made anew: call patch again")
        return self

    def __exit__(self, *_):
        self.undo()

    # The import hook: sees the modules of libraries that are not wholly there yet.

    def find_spec(self, name, path=None, target=None):
        if not self._pending or _root(name) not in self._roots:
            return None
        for finder in sys.meta_path:
            if not isinstance(finder, Patch) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None

    # What is swapped.

    def swap(self, waits=False):
        """Replace what is imported by now, of libraries of which no module is being run.

        waits: Whether to wait where another thread prepares the same for its patch; an import must not, which that
            thread may need.
        """
        while True:
            with _lock:
                while waits and self._is_prepared_elsewhere():
                    _prepared.wait()
                if self not in _active:
                    return
                ready = {
                    key: adapter
                    for key, adapter in self._pending.items()
                    if key[0] in sys.modules and not _running[_root(key[0])]
                }
                roots = {_root(module) for module, _ in ready}
                _running.update(roots)
                _preparing.update(dict.fromkeys(roots, threading.get_ident()))
            if not ready:
                return
            try:  # the adapters may import their libraries
                found = {
                    (module, name): getattr(adapter, name) if hasattr(sys.modules[module], name) else None
                    for (module, name), adapter in ready.items()
                }
            finally:
                with _lock:
                    _running.subtract(roots)
                    for root in roots:
                        del _preparing[root]
                    _prepared.notify_all()
            with _lock:
                if self in _active and self._replace(found):
                    self._say_what_has_no_adapter(set(ready.values()))
                waiting = [patch for patch in _active if patch is not self]
            for patch in waiting:
                patch.swap()

    def _is_prepared_elsewhere(self):
        elsewhere = {root for root, thread in _preparing.items() if thread != threading.get_ident()}
        return any(_root(module) in elsewhere for module, _ in self._pending)

    def _replace(self, adapters):
        """Put `adapters`, by (module, name) of their originals, in the place of these; whether there was one to put."""
        pairs = []
        for (module, name), adapter in adapters.items():
            original = getattr(sys.modules[module], name, None)
            self._pending.pop((module, name), None)
            if original is None:
                self._say(self.left, f"{module} has no {name} in this version")
            elif adapter in _shared.originals:
                self._shared.add(adapter)
            elif not _takes_the_same(original, adapter):
                arguments = inspect.signature(original)
                self._say(self.left, f"{module}.{name} takes other arguments in this version: {arguments}")
            else:
                pairs.append((original, adapter))
        if not self._pending and self in sys.meta_path:
            sys.meta_path.remove(self)
        if not pairs:
            return False
        replacements = {id(original): adapter for original, adapter in pairs}
        self._held |= {(id(space), key) for space, key, _ in _names({id(a) for _, a in pairs})}
        where, own = {}, {(id(space), key) for pair in pairs for space, key in _own_uses(pair[0])}
        for space, key, value in _names(set(replacements)):
            if (id(space), key) in own:
                self._say(self.left, f"{space['__name__']} keeps {key}, which its classes look up there")
                continue
            space[key] = adapter = replacements[id(value)]
            self._places.append((space, key, value, adapter))
            where.setdefault(id(value), []).append(space.get("__name__", "?"))
        for original, adapter in pairs:
            _shared.originals[adapter] = original
            places = ", ".join(sorted(where.get(id(original), ())))
            name = f"{original.__module__}.{original.__qualname__}"
            self._say(self.changed, f"{name} is {adapter.__module__}.{adapter.__qualname__} in {places}")
        self._say_what_is_left(pairs)
        return True

    def _say_what_has_no_adapter(self, adapters):
        for adapter in adapters:
            others = _others(adapter)
            if others:
                self._say(self.left, f"{adapter.HOME}: no adapter of {', '.join(others)}")

    def _say_what_is_left(self, pairs):
        originals = [original for original, _ in pairs]
        ours = {id(original) for original in originals} | {id(adapter) for _, adapter in pairs}
        for original in originals:
            for subclass in getattr(original, "__subclasses__", list)():
                name = f"{subclass.__module__}.{subclass.__qualname__}"
                if id(subclass) not in ours and not subclass.__module__.startswith("ssl_kernels."):
                    self._say(self.left, f"{name} is a subclass of the original {original.__qualname__}")
        gc.collect()
        instances, holders = {}, {}
        own = {id(holder) for holder in (originals, *pairs, *self._places, _shared.originals)}
        for holder in gc.get_referrers(*originals):
            for original in originals if id(holder) not in own else ():
                if type(holder) is original:
                    instances[original] = instances.get(original, 0) + 1
                elif _holds(holder, original):
                    kinds = holders.setdefault(original, set())
                    kinds.add("closure" if isinstance(holder, types.CellType) else type(holder).__name__)
        for original, count in instances.items():
            name = original.__qualname__
            text = f"{count} object(s) of the original {name} exist already: no isinstance of the new {name},"
            self._say(self.left, f"{text} and not to be pickled until undo()")
        for original, kinds in holders.items():
            text = f"the original {original.__qualname__} is still held by: {', '.join(sorted(kinds))}"
            self._say(self.left, text)

    def _say(self, sentences, sentence):
        sentences.append(sentence)
        log.warning("%s: %s", "changed" if sentences is self.changed else "left", sentence)

    def undo(self):
        """Put the originals back everywhere, also where an adapter came by an import while it stood for them."""
        with _lock:
            if self in _active:
                self._undo()

    def _undo(self):
        _active.remove(self)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._pending = {}
        own = {adapter for *_, adapter in self._places}
        heirs = {adapter: other for other in _active for adapter in other._shared & own}
        originals = {
            id(adapter): original for _, _, original, adapter in self._places if adapter not in heirs
        }
        for place in self._places:
            space, key, original, adapter = place
            if adapter in heirs:
                heirs[adapter]._places.append(place)
            elif space.get(key) is adapter:
                space[key] = original
        for adapter, heir in heirs.items():
            heir._shared.discard(adapter)
            heir._held |= self._held
        for space, key, value in _names(set(originals)):
            if (id(space), key) not in self._held and not space.get("__name__", "").startswith(
                "ssl_kernels."
            ):
                space[key] = originals[id(value)]
        for adapter in own:
            if adapter not in heirs:
                _shared.originals.pop(adapter, None)
        self._places = []


class _Loader:
    """A module's loader, which tells the patches when the module has run, and is gone then."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """Run a module's code, and swap when no other module of its library is being run."""
        module.__spec__.loader = module.__loader__ = self._loader
        root = _root(module.__name__)
        with _lock:
            _running[root] += 1
        try:
            self._loader.exec_module(module)
        finally:
            with _lock:
                _running[root] -= 1
                waiting = [] if _running[root] else list(_active)
        for patch in waiting:
            patch.swap()


def _root(module):
    return module.partition(".")[0]


def _takes_the_same(original, adapter):
    """Whether an adapter has the original's arguments, which may be others in another version, and perhaps more."""
    for method in (None, "forward"):
        found = [getattr(one, method, None) if method else one for one in (original, adapter)]
        if None not in found:
            theirs, mine = map(_arguments, found)
            if mine[: len(theirs)] != theirs:
                return False
    return True


def _arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in parameters if one.name != "strict"]


def _names(wanted):
    """(namespace, key, value) of all modules' names for objects of these ids, but for the adapters' own."""
    seen = set()  # a module may have several names
    for name, module in list(sys.modules.items()):
        own = name.startswith("ssl_kernels.") or not isinstance(module, types.ModuleType)
        if own or id(module) in seen:
            continue
        seen.add(id(module))
        space = vars(module)
        for key, value in list(space.items()):
            if id(value) in wanted:
                yield space, key, value


def _own_uses(original):
    """(namespace, key) under which methods of a class or its subclasses look itself up, as `super(Name, self)` does."""
    family = [original] if isinstance(original, type) else []
    for member in family:
        family += member.__subclasses__()
        for method in vars(member).values():
            if isinstance(method, types.FunctionType):
                space = method.__globals__
                yield from ((space, key) for key in method.__code__.co_names if space.get(key) is original)


def _holds(holder, original):
    """Whether a reference is one that a program made and that still leads to the original."""
    if isinstance(holder, dict):
        module = "__name__" in holder and "__spec__" in holder
        return not module and any(value is original for value in holder.values())
    if isinstance(holder, types.CellType):
        if holder.cell_contents is not original:
            return False
        # The cell named __class__ of methods that call super() is the class's own.
        methods = [value for value in vars(original).values() if isinstance(value, types.FunctionType)]
        return all(cell is not holder for method in methods for cell in method.__closure__ or ())
    if isinstance(holder, (list, set)):
        return original in holder
    if isinstance(holder, tuple):
        kinds = (*original.__subclasses__(), original) if isinstance(original, type) else ()
        own = any(holder is kind.__bases__ or holder is kind.__mro__ for kind in kinds)
        return original in holder and not own
    if isinstance(holder, functools.partial):
        return holder.func is original
    return any(value is original for value in getattr(holder, "__dict__", {}).values())


def _others(adapter):
    """Losses of a library's public module for which there is no adapter."""
    home = sys.modules.get(getattr(adapter, "HOME", None) or "")
    if home is None:
        return []
    return sorted(
        name
        for name, value in vars(home).items()
        if name.endswith(("Loss", "loss_func")) and callable(value) and name not in adapter.ORIGINALS
    )


def patch_from_environment(value):
    """What SSL_KERNELS_PATCH asks for; a library that is not installed is left, with a warning.

    Raises:
        ValueError: There is no such adapter; then nothing is patched.
    """
    libraries = [part.strip() for part in value.split(",") if part.strip()]
    if libraries:
        _adapters(libraries, f"{ENVIRONMENT}: its libraries, separated by commas,")
    for library in libraries:
        try:
            patch(library)
        except ModuleNotFoundError as error:
            log.warning("%s=%s: %s", ENVIRONMENT, value, error)
