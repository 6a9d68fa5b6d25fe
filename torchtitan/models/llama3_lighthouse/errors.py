"""Errors that a user can mend; commands print the message without a traceback."""

from collections.abc import Generator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend. The message names the rule, what was given and the fix."""


class UserValueError(UserError, ValueError):
    """A value breaks a rule."""


class UserTypeError(UserError, TypeError):
    """A value has the wrong type."""


class UserFileError(UserError, OSError):
    """A file or folder cannot be used as it is."""


class NonFiniteError(UserError, RuntimeError):
    """A loss, a gradient norm, a weight or an optimizer's moment is NaN or infinite."""


@contextmanager
def in_place(place: str) -> Generator[None]:
    """Let messages about wrong values and types begin with the place of the mistake."""
    try:
        yield
    except (UserValueError, UserTypeError) as error:
        raise type(error)(f"{place}: {error}") from None
