"""The command line: `ssl-kernels COMMAND [options]`, or `python -m ssl_kernels COMMAND [options]`.

A command is a module with two functions: `add_arguments(parser)`, and `run(args, parser)`, which returns
the exit code and reports a user's mistake by `parser.error`. Its docstring is the text of its --help. It is
imported when it is called, so that no command pays for the dependencies of another.
"""

import argparse
import importlib
import pathlib
import sys

import torch

import ssl_kernels

# name: (module, one line for --help)
COMMANDS = {
    "info": ("ssl_kernels.info", "what is built and which backends can run here"),
    "check": ("ssl_kernels.check", "run every kernel that can run here against float64"),
    "pretrain": (
        "ssl_kernels.recipes.pretrain",
        "pretrain an encoder with SimCLR, MoCo, BYOL or another method, and judge it",
    ),
    "evaluate": (
        "ssl_kernels.recipes.evaluate",
        "judge a checkpoint: probes, fine-tuning, transfer to other images",
    ),
    "plot": ("ssl_kernels.recipes.plot", "draw what a checkpoint has learned, and whether it has collapsed"),
    "bench": ("ssl_kernels.bench", "measure against what people use today (in a clone of the repository)"),
}

INTERRUPTED = 130  # exit code after Ctrl-C, as of a shell


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, whatever the message is made of; --help has the rest."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def program():
    """The command as the user called it, for messages."""
    installed = pathlib.Path(sys.argv[0]).stem == "ssl-kernels"
    return "ssl-kernels" if installed else "python -m ssl_kernels"


def last_line(error):
    """What an exception says, without what a process of torch's puts before: its traceback, and the error's name."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")


def usable_device(name):
    """The device called `name`, which can compute here.

    Raises:
        ValueError: It cannot.
    """
    try:
        device = torch.device(name)
        computes = (torch.ones(1, device=device) + 1).item() == 2
    except Exception as error:  # each kind of device has its own
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"--device must be one that torch can use, got {name} ({lines[0]})") from error
    if not computes:
        raise ValueError(f"--device must be one that computes, got {name}")
    return device


def main(argv=None):
    """Run the command in `argv` (default: the process's arguments) and return its exit code."""
    summaries = [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    parser = _Parser(
        prog=program(),
        description=ssl_kernels.__doc__.splitlines()[0],
        epilog="\n".join(["commands:", *summaries]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssl_kernels {ssl_kernels.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    options = parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="its own: COMMAND --help lists them"
    )
    options.required = False  # up to Python 3.11 argparse asks for them where COMMAND is missing
    chosen = parser.parse_args(argv)
    return run_command(chosen.command, chosen.options)


def run_command(name, argv):
    module = importlib.import_module(COMMANDS[name][0])
    parser = _Parser(
        prog=f"{program()} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv), parser)
