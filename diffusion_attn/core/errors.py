"""The errors of the library: each message gives the value, what was expected and the remedy."""


class DiffusionAttnError(Exception):
    """Base of every error that the library raises on purpose."""


class UnsupportedModelError(DiffusionAttnError):
    """The model, pipeline or call is not one that a method serves."""


class MethodConflictError(DiffusionAttnError):
    """Two methods, or a method and another extension, claim the same layers."""


class CheckpointFormatError(DiffusionAttnError):
    """A file or folder of weights does not hold what its format asks for."""


class GridError(DiffusionAttnError, ValueError):
    """A token sequence does not fit the height and width it is said to have."""
