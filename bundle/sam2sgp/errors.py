"""Errors that a user can act on: the message names the file or setting, what was expected, what was found, what to do.

`report_in_one_line` makes a program print such an error as one line instead of a traceback.
"""

import sys
from types import TracebackType


class Sam2SgpError(Exception):
    """Base of every error that this package raises on purpose."""


class DataError(Sam2SgpError):
    """An image, a label or a data folder can't be used as it is."""


class FormatError(DataError):
    """A file's content isn't what its name says, or is written in a way that isn't read."""


class TooLargeError(DataError):
    """An image takes more memory than is allowed."""


class WeightsError(Sam2SgpError):
    """A weights file can't be fetched, read or fitted to the network."""


class ConfigError(Sam2SgpError):
    """A setting has a value that can't work."""


def _is_of_absent_package(error: BaseException) -> bool:
    """Whether MONAI says that a package is missing which a setting asks for.

    MONAI is not imported for this: without it there is no such error, and the command's help should not wait for it.
    """
    monai = sys.modules.get("monai.utils")
    return monai is not None and isinstance(error, monai.OptionalImportError)


def cause_of(error: BaseException) -> BaseException:
    """The first error that a user can act on among an exception and its causes, else the first cause of all.

    MONAI wraps what a transform or a config expression raises in several exceptions of its own, whose texts say
    nothing to a user.
    """
    while not isinstance(error, Sam2SgpError) and not _is_of_absent_package(error):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def sentence_for_users(error: BaseException) -> str | None:
    """What a user can act on of an error, in one line; None where it is a fault of the program."""
    cause = cause_of(error)
    if isinstance(cause, Sam2SgpError):
        return str(cause)
    return str(cause).partition("\n")[0] if _is_of_absent_package(cause) else None


def report_in_one_line() -> None:
    """From now on, end the process with one line on standard error where an error for users is the cause of its end.

    Every other exception is still shown with its traceback. In a process that is somebody else's program, such as a
    notebook that runs a config, nothing is changed.
    """
    if not _is_own_command():
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        told = sentence_for_users(error)
        if told is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"error: {told}", file=sys.stderr)

    sys.excepthook = hook


def _is_own_command() -> bool:
    """Whether this process was started as `python -m monai.bundle` or by a module of this package."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith(("monai.bundle.", "sam2sgp."))
