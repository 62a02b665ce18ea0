"""Whether the built extension is of the C++ and CUDA sources beside it. setup.py runs this file by its path."""

import hashlib
import pathlib

SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".inc")


def fingerprint(folder):
    """Hexadecimal digest of the names and contents of the sources in `folder` and below."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.suffix in SUFFIXES:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def staleness(built, root):
    """A sentence if `root` holds other sources than those with the fingerprint `built`, else None.

    An installed package has no sources beside it, and nothing to compare.
    """
    folder = root / "csrc"
    if not (root / "setup.py").is_file() or not folder.is_dir() or fingerprint(folder) == built:
        return None
    return (
        f"ssl_kernels: the extension was built from other sources than those in {folder}, and its numbers may be wrong."
        " Build it again: make test does, and so does python setup.py build_ext --inplace"
    )
