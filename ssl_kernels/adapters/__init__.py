"""Other libraries' losses and mixers over the kernels of this one, a module for each library, with their signatures.

    from ssl_kernels.adapters.lightly import NTXentLoss     # instead of: from lightly.loss import NTXentLoss

An adapter imports the library it stands for only where it has to fall back to it. docs/migration.md lists what each
class does otherwise than the original, and how both were compared.
"""

import importlib
import pkgutil

from ssl_kernels.adapters._patching import patch

LIBRARIES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"))
__all__ = [*LIBRARIES, "patch"]


def __getattr__(name):
    if name in LIBRARIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
