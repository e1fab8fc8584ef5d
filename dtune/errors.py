"""Errors that users see. Everything else that goes wrong is a bug and fails an assertion."""


class ConfigError(ValueError):
    """The user's config or data is wrong: says what, where, and which key to turn. Exit code 2."""


class DataError(ConfigError):
    """A data file, row or column is wrong. Names the file and line. Exit code 2."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, such as on a full disk. Names the file. Exit code 2.

    What was published before stays good.
    """


class HungError(RuntimeError):
    """A rank did not come to where all ranks meet. ``rank`` is the first of those that did not."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class DivergedError(RuntimeError):
    """Loss or gradient is NaN or infinite. Carries the path of the report of the batch."""
