"""Breaks the CUDA kernels of an operation at one place, in a copy of csrc/cuda, and says which check notices."""

import contextlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests import sites
from tests.gpu_emulation import EmulatedCudaLibrary, PtxError

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"

# Left out of the mutated copies, in the operation's launchers and in those that are shared, to compile in seconds:
# float64, bfloat16, TF32 and some of cutmix's vector widths.
UNUSED = r"case kFloat64: .*|case kBFloat16: .*|if \(allow_tf32\) .*|return widen\(__nv_bfloat16.*|case (1|8): cutmix.*"

# Of these everything stays: their checks look at every dtype, and they compile in seconds.
WHOLE = ("queue_push", "row_pairs")

# Multiprocessors of the emulated card: one, so that a block of `contrastive` has several blocks of rows to walk.
MULTIPROCESSORS = {"contrastive": 1, "contrastive_additions": 1}


class Mutation(NamedTuple):
    """`old` in `file` becomes `new`, where `tests.sites` finds it.

    With `harmless`, the reason why, no check can notice, and none may.
    """

    name: str
    file: str
    old: str
    new: str = ""
    at: str = ""
    harmless: str = ""

    @property
    def kind(self):
        """What is broken: barrier, fence, wait, commit, sign, index or lane; or mask, which is the rest."""
        named = re.match("(sign|index|lane): ", self.name)
        if named:
            return named[1]
        marks = {"barrier": "__syncthreads", "fence": "__syncwarp", "wait": "wait", "commit": "commit"}
        return next((kind for kind, mark in marks.items() if mark in self.old), "mask")

    def changed_span(self):
        """(start, end) in the file of what becomes something else."""
        text = (SOURCES / self.file).read_text()
        return sites.changed(text, sites.find(text, self.old, self.at), self.new)


class Noticed(Exception):
    """What a check says of a mutated kernel."""


@contextlib.contextmanager
def check(name):
    """Turns what the emulator or a comparison complains of into `Noticed`."""
    try:
        yield
    except PtxError as error:
        said = re.sub(r"^_Z\w+:?\s*", "", str(error).splitlines()[0])
        raise Noticed(f"{name}: {said}") from error
    except AssertionError as error:
        raise Noticed(f"{name}: wrong numbers: {(str(error).splitlines() or [''])[0]}") from error


def require(claim, what):
    if not claim:
        raise AssertionError(what)


def build(operation, mutation=None):
    """The operation's launchers for emulated sm_80, from a copy of csrc/cuda with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cuda"
        shutil.copytree(SOURCES, copy)
        if mutation is not None:
            path = copy / mutation.file
            path.write_text(sites.replaced(path.read_text(), mutation.old, mutation.new, mutation.at))
        for name in () if operation in WHOLE else (f"{operation}.cu", "launcher.cuh"):
            path = copy / name
            path.write_text(re.sub(UNUSED, "", path.read_text()))
        return EmulatedCudaLibrary(
            [copy / f"{operation}.cu"], 80, multiprocessors=MULTIPROCESSORS.get(operation)
        )


def noticed_by(checks, library):
    """What the first complaint of `checks(library)` says, or None. The library is closed."""
    try:
        with check("parity"):
            checks(library)
    except Noticed as noticed:
        return str(noticed)
    finally:
        library.close()
    return None
