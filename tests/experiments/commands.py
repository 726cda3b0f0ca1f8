"""Runs ``nusam`` as a user does, but in this process: starting one takes longer than most of what is tested."""

import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

from nusam.experiments.commands.main import main


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def nusam(*arguments: object, check: bool = True) -> Done:
    """Run a command line.

    Args:
        arguments: those behind ``nusam``.
        check: whether it must succeed.
    """
    out, err, before = StringIO(), StringIO(), sys.argv
    sys.argv = ["nusam", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        raise AssertionError("the command ended without an exit code")
    except SystemExit as end:
        done = Done(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    assert not check or done.returncode == 0, done.stderr
    return done
