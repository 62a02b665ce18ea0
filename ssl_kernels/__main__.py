"""Entry point of `python -m ssl_kernels`."""

import sys

from ssl_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
