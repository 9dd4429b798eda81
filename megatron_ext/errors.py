"""The one exception for mistakes that a user can mend: entry points print it as one line and exit with code 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A wrong value, file or combination. The message is one line: the value, where it came from, what is allowed."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2.

    Args:
        main: the entry point; its return value is the exit code (None means 0).
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
