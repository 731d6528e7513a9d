"""Errors that a user can act on: the message names the file or setting, what was expected, what was found, what to do.

`report_in_one_line` makes a program print such an error as one line instead of a traceback.
"""

import sys
from types import TracebackType

from monai.utils import OptionalImportError


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


# With MONAI's own, of a package that is not installed and that a setting asks for.
FOR_USERS = (Sam2SgpError, OptionalImportError)


def cause_of(error: BaseException) -> BaseException:
    """The first error that a user can act on among an exception and its causes, else the first cause of all.

    MONAI wraps what a transform or a config expression raises in several exceptions of its own, whose texts say
    nothing to a user.
    """
    while not isinstance(error, FOR_USERS):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def report_in_one_line() -> None:
    """From now on, end the process with one line on standard error where an error for users is the cause of its end.

    Every other exception is still shown with its traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        cause = cause_of(error)
        if isinstance(cause, Sam2SgpError):
            print(f"error: {cause}", file=sys.stderr)
        elif isinstance(cause, OptionalImportError):
            print(f"error: {str(cause).partition(chr(10))[0]}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook
