"""What a command refuses: one clear sentence, printed without a traceback."""

__all__ = ["Refused"]


class Refused(Exception):
    """A sentence saying what was given, what is allowed and what to do."""
