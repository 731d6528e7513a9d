"""A run that a user can mend ends with one line, not with a traceback."""

import sys

import pytest
from monai.utils import optional_import

from sam2sgp import errors
from sam2sgp.errors import ConfigError, report_in_one_line


def ask_for_an_absent_package():
    """As MONAI's handlers do with MLflow."""
    absent, _ = optional_import("absent", descriptor="Please install absent before using AbsentHandler.")
    absent.Client()


def refuse_a_setting():
    raise ConfigError("k is -1: expected at least 1.")


def fail():
    raise KeyError("image")


@pytest.mark.parametrize(
    "cause, printed",
    [
        (
            ask_for_an_absent_package,
            "error: Please install absent before using AbsentHandler. (No module named",
        ),
        (refuse_a_setting, "error: k is -1: expected at least 1.\n"),
        (fail, "Traceback"),
    ],
)
def test_one_line_tells_what_a_user_can_mend(monkeypatch, capsys, cause, printed):
    before = sys.excepthook
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    report_in_one_line()
    assert sys.excepthook is before
    monkeypatch.setattr(errors, "_is_own_command", lambda: True)
    report_in_one_line()
    try:
        try:
            cause()
        except Exception as error:
            raise RuntimeError("Failed to instantiate a component") from error
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert told.startswith(printed)
    assert (told.count("\n") == 1) == (cause is not fail)
