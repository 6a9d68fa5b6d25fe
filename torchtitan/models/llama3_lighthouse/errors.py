"""Errors that a user can mend; commands show their message alone, without a traceback."""


class UserError(Exception):
    """A mistake of the user's. The message names what was given, the rule and the fix."""


class UserValueError(UserError, ValueError):
    """A value breaks a rule."""


class UserTypeError(UserError, TypeError):
    """A value has the wrong type."""


class UserFileError(UserError, OSError):
    """A file or folder cannot be used as it is."""
