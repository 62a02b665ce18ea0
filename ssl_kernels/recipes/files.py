"""Files that are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile


def write_whole(path, content):
    """Write the bytes `content` aside and move them to `path`: whatever happens meanwhile, what was there stays whole.

    Raises:
        OSError: They cannot be written; it names `path`, and nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_folder(folder, files, bytes_needed):
    """Make `folder`, and refuse it where the `files` cannot be written to it.

    Raises:
        ValueError: It is no folder, nothing can be written there, or it has less room than `bytes_needed`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"--out must be a folder that can be written to, got {folder} ({error.strerror})"
        ) from error
    for name in files:
        if (folder / name).is_dir():
            raise ValueError(f"--out must be a folder without a folder {name} in it, got {folder}")
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise ValueError(
            f"--out must have room for {bytes_needed / 1e6:.1f} MB of checkpoints, got {folder} with"
            f" {free / 1e6:.1f} MB"
        )
