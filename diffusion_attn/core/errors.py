"""The errors of the library: each message gives the value, what was expected and the remedy."""

_MISSING_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on any device: only CUDA has an exception of its own for it."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MISSING_MEMORY)
