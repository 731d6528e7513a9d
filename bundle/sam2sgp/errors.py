"""Errors that a user can act on: the message names the file or setting, what was expected, what was found, what to do.

`report_in_one_line` makes a program print such an error as one line instead of a traceback.
"""

import sys
from types import TracebackType


class Sam2SgpError(Exception):
    """Base of every error that this package raises on purpose."""


class DataError(Sam2SgpError):
    """An image, a label or a data folder can't be used as it is."""


class WeightsError(Sam2SgpError):
    """A weights file can't be fetched, read or fitted to the network."""


class ConfigError(Sam2SgpError):
    """A setting has a value that can't work."""


def report_in_one_line() -> None:
    """From now on, end the process with one line on standard error where a `Sam2SgpError` is the cause of its end.

    MONAI wraps what a config expression raises in several exceptions of its own; the cause is looked for through them.
    Every other exception is still shown with its traceback.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Sam2SgpError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"error: {cause}", file=sys.stderr)

    sys.excepthook = hook
