"""The one exception for mistakes that a user can mend: entry points print it as one line and exit with code 2."""

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_ext.secrets import redact

SECONDS_FOR_FIRST_RANK = 5.0
LONGEST_MESSAGE = 2000


def printable(text: str) -> str:
    """The text with everything spelled out that does not show on a terminal, or would steer it.

    Control characters (line ends and escape sequences too), marks of writing direction, lone surrogates and the like become
    escapes such as `\\x1b`. Applied twice it changes nothing more.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UserError(Exception):
    """A wrong value, file or combination. The message is one line: the value, where it came from, what is allowed.

    It may quote names and values of any origin: they reach the terminal by way of `printable`.
    """

    def __init__(self, message: str) -> None:
        message = printable(str(message))
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 505]} ... {message[-500:]}"
        super().__init__(message)


class SharedError(UserError):
    """A mistake that all ranks of a run know of at the same moment. Rank 0 prints it, for all machines."""


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose complaints are a `UserError` of one line, without the usage text in front."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        raise UserError(f"{message} (see --help)")

    def options(self) -> list[str]:
        """All option words."""
        return list(self._option_string_actions)


class UnreadableError(UserError):
    """What was asked for cannot be judged here: a newer version wrote it, or the disk errs. It need not be damaged."""


def one_line(error: BaseException) -> str:
    """Somebody else's exception in one short line: its type, and how its message begins."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def say(message: str) -> None:
    """Print one line on stderr, without secrets; a terminal or log file that takes nothing is no reason to stop."""
    with contextlib.suppress(OSError):
        print(printable(redact(message)), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one line of warning as `say` does."""
    say(f"warning: {message}")


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2, any other exception its traceback and 1.

    Ctrl-C ends it with 130 and no traceback.

    Both are printed without secrets: the message of somebody else's exception may quote an address or a header.

    Under torchrun all ranks of a machine usually meet the same error. The first one speaks; the others leave it the word, for
    torchrun ends them as soon as it has exited, and speak only if they are still there: then the error was theirs alone. Of a
    `SharedError` all know, so that only rank 0 speaks, whatever machine the others are on.

    Args:
        main: the entry point; its return value is the exit code (None means 0).
    """
    try:
        code = main()
    except SharedError as error:
        _wait_for_first("RANK")
        if os.environ.get("RANK", "0") == "0":
            say(f"error: {error}")
        code = 2
    except UserError as error:
        _wait_for_first("LOCAL_RANK")
        say(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


def _wait_for_first(kind: str) -> None:
    if os.environ.get(kind, "0") != "0":
        time.sleep(SECONDS_FOR_FIRST_RANK)
