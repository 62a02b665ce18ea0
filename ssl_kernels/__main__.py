"""Entry point of `python -m ssl_kernels`."""

import os
import sys

from ssl_kernels.cli import main


def run():
    """`main`, quiet where nobody reads on: `python -m ssl_kernels info | head`."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return code


if __name__ == "__main__":
    sys.exit(run())
