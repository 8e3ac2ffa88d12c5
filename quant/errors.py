"""Exceptions that end a command with exit code 2 and a single line."""


class UserError(ValueError):
    """Wrong input: the message names the flag or file, the value and the choices, on one line."""


class NotFiniteError(UserError):
    """NaN or infinity in data that a range should be computed from."""
