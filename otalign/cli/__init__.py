"""The command line, `python -m otalign`: one module for each command, and modules that they share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import otalign

from . import align, bench, doctor, score
from .errors import InputError

PROGRAM = "python -m otalign"
COMMANDS = (doctor, align, score, bench)
EXAMPLES = """\
examples:
  python -m otalign
  python -m otalign align speech.npy text.npy --tokens "the,cat,sat" --plot plan.png
  python -m otalign score speech_states.npz text_states.npz --plot layers.png
  python -m otalign bench --frames 750 --tokens 128

`python -m otalign COMMAND --help` has the options and more examples of each. Exit status: 0; 1 if the doctor finds a
backend that is broken; 2 for bad arguments or files."""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog=PROGRAM,
        description="Aligns speech with text by entropic optimal transport. Without a command: doctor.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"otalign {otalign.__version__}")
    top.set_defaults(run=doctor.run, command="doctor", report_only=False)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (None = the arguments of this process), and return the exit status.

    0 on success; 1 if the doctor finds a broken backend, or if the reader of the output stops early; 2 for bad files. Bad
    arguments exit with status 2.

    Example:
        >>> otalign.cli.main(["align", "missing.npy", "text.npy"])  # and on stderr: missing.npy: no such file
        2
    """
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"{PROGRAM} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `| head`; the interpreter's flush at exit must not raise it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
