"""The project's own exceptions; each is also a standard kind, so callers may catch either."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


class CaptureError(RuntimeError):
    """Queries and keys of a model's layers could not be captured as asked."""


class TokenMismatchError(ValueError):
    """Student and teacher did not see the same tokens.

    Attributes:
        sample: index in the batch of the sample that differs, where one is known.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


class RecipeError(ValueError):
    """A recipe or one of its overrides is not valid."""


class DataError(ValueError):
    """A record, an image or an answer is not usable; the message names file and record."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged; the message says what to do."""


class CacheError(RuntimeError):
    """Cached targets are missing or damaged, or could not be written; says what to do."""


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; the message names task, layers and records."""


class RunFailedError(RuntimeError):
    """Some of a study's runs failed; the message names them and where the others' results are."""


class TrainingMemoryError(RuntimeError):
    """Training ran out of memory; the message says which settings to change."""


class UnsupportedEngineError(NotImplementedError):
    """Several devices are used in a way that is not supported; the message names one that is."""
