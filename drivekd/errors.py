"""The project's own exceptions; each is also a standard kind, so callers may catch either."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


class CaptureError(RuntimeError):
    """Queries and keys of a model's layers could not be captured as asked."""


class TokenMismatchError(ValueError):
    """Student and teacher did not see the same tokens."""


class RecipeError(ValueError):
    """A recipe or one of its overrides is not valid."""


class DataError(ValueError):
    """A record, an image or an answer is not usable; the message names file and record."""
