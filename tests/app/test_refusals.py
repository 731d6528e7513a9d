"""Errors as answers: one sentence, with a status of their own, that gives nothing of the server away."""

from fastapi import HTTPException
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException

from lib.checks import RequestError
from lib.refusals import refuse
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
