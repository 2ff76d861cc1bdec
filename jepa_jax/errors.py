"""Errors that a person can act on: `str(error)` is printed as it is, without a traceback."""


class JepaError(Exception):
    """Base of every error that the commands turn into a message and a non-zero exit."""

    exit_code = 2


class ConfigError(JepaError, ValueError):
    """A configuration value, or a combination of them, that cannot be run."""


class DataError(JepaError):
    """A dataset that is missing, damaged or of the wrong kind."""


class CheckpointError(JepaError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(JepaError):
    """A run that cannot go on, such as one whose loss became NaN."""

    exit_code = 1


class Interrupted(JepaError):
    """A run that was asked to stop by a signal; exits as a process killed by it would."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class ElsewhereError(JepaError):
    """What ended another process of this run, and with it this one; exits as that one does."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
