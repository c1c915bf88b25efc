"""Errors a user can fix, each with the exit code of the command line. Imports nothing.

A message is one sentence: what is wrong, where, and what to do.
"""


class OtMergeError(Exception):
    """Base of all errors that are the input's fault and not the program's."""

    exit_code = 1


class RecipeError(OtMergeError):
    """A recipe, a flag or a combination of settings is not usable (exit code 2)."""

    exit_code = 2


class InputError(OtMergeError):
    """A model, a text or a folder is missing, damaged or unsupported (exit code 3)."""

    exit_code = 3


class VersionError(InputError):
    """A file of a run was written by a later version of this program (exit code 3)."""


class ResourceError(OtMergeError):
    """Not enough memory or disk (exit code 4)."""

    exit_code = 4


class NonFiniteError(OtMergeError):
    """NaN or infinity appeared in a computation with finite inputs (exit code 5)."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device had no memory left; XLA has no exception of its own."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


class DivergedError(NonFiniteError):
    """Training met NaN or infinity; the last good state is kept (exit code 5)."""


class StrictError(OtMergeError):
    """A warning that ``--strict`` turns into a failure (exit code 5)."""

    exit_code = 5
