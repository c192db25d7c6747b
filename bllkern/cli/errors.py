"""What a user can mend: reported in one line, without a traceback."""

from __future__ import annotations

from contextlib import contextmanager

from ..execution.ownership import CrossedBoundary


class UserError(Exception):
    """The message names the option or the file, what was found and what is allowed."""


@contextmanager
def user_errors(source: str = ""):
    """Report the library's complaints about arguments as mistakes of the user, who gave them on the command line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OSError, CrossedBoundary) as exception:
        message = str(exception) or type(exception).__name__
        raise UserError(f"{source}: {message}" if source else message) from exception
