"""Errors as answers: one sentence, with a status of their own, that gives nothing of the server away."""

import pytest
from fastapi import HTTPException
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException

from lib.checks import RequestError
from lib.refusals import refuse, refusing
from sam2sgp.errors import ConfigError, DataError, WeightsError


def test_errors_are_one_sentence_with_a_status_of_their_own():
    wrapped = RuntimeError("wrapper")
    wrapped.__cause__ = DataError("inner")
    for error, status in (
        (RequestError("x"), 400),
        (DataError("x"), 422),
        (wrapped, 422),
        (ConfigError("x"), 400),
        (WeightsError("x"), 409),
        (ImageNotFoundException("x"), 404),
        (MONAILabelException(MONAILabelError.INVALID_INPUT, "x"), 400),
        (HTTPException(418, "x"), 418),
        (OSError(28, "No space left on device"), 507),
        (KeyError("/secret/path"), 500),
    ):
        answer = refuse(error)
        assert answer.status_code == status and "/secret" not in str(answer.detail)


def test_the_log_says_what_the_answer_does_not(caplog):
    answer = refuse(ZeroDivisionError("of a secret"))
    assert answer.status_code == 500 and "secret" not in answer.detail
    assert "ZeroDivisionError: of a secret" in caplog.text


def test_a_block_that_is_refused_says_why_and_keeps_its_cause():
    with pytest.raises(HTTPException) as told, refusing():
        raise DataError("a: expected b, found c.")
    assert (told.value.status_code, told.value.detail) == (422, "a: expected b, found c.")
    assert isinstance(told.value.__cause__, DataError)
