"""The one exception for mistakes that a user can mend: entry points print it as one line and exit with code 2."""

import os
import sys
import time
from collections.abc import Callable

SECONDS_FOR_FIRST_RANK = 5.0


class UserError(Exception):
    """A wrong value, file or combination. The message is one line: the value, where it came from, what is allowed."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2.

    Under torchrun all ranks of a machine usually meet the same error. The first one speaks; the others leave it the word, for
    torchrun ends them as soon as it has exited, and speak only if they are still there: then the error was theirs alone.

    Args:
        main: the entry point; its return value is the exit code (None means 0).
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_FOR_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
