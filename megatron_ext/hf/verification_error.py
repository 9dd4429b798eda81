"""The error of a model that left, or came in, as another one."""


class VerificationError(Exception):
    """A converted model is not the original; the message names the check and what it found."""
