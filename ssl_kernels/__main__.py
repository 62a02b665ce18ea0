"""Entry point of `python -m ssl_kernels` and of the command `ssl-kernels`."""

import os
import sys

from ssl_kernels.cli import INTERRUPTED, main, program


def run():
    """`main`, quiet where nobody reads on: `python -m ssl_kernels info | head`; one line where the system refuses."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program()}: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        code = 1
        _drop_output()
    except OSError as error:
        print(f"{program()}: error: {error}", file=sys.stderr)
        code = 2
        _drop_output()
    return code


def _drop_output():
    """Python flushes once more as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(run())
