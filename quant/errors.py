"""The exception that ends a command with exit code 2 and a single line."""


class UserError(ValueError):
    """Wrong input: the message names the flag or file, the value and the choices, on one line."""


class NotFiniteError(UserError):
    """NaN or infinity where ranges should be found, which no range can span."""
