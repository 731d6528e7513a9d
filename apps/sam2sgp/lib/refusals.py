"""Errors as answers of the server and as the last line of a process that works for it.

In: any exception. Out: an HTTPException of one sentence. Handlers only raise: `lib.http.guard` answers whatever they
raise. Whoever asks here logs what is the server's own fault.
"""

import errno

from fastapi import HTTPException
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)

from lib.checks import RequestError
from sam2sgp.errors import ConfigError, DataError, Sam2SgpError, WeightsError, cause_of

FAILED = "The server failed; its log says why."


def refuse(error: BaseException) -> HTTPException:
    """An error as an answer: one sentence and a status that says whose fault it is.

    `Sam2SgpError`s and MONAI Label's errors become 4xx, or 507 for a full disk; an HTTPException stays as it is;
    anything else is a 500 whose text gives nothing of the server away.
    """
    error = cause_of(error) if not isinstance(error, HTTPException | MONAILabelException) else error
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, RequestError):
        return HTTPException(error.status, str(error))
    if isinstance(error, ImageNotFoundException | LabelNotFoundException):
        return HTTPException(404, str(error.msg))
    if isinstance(error, MONAILabelException) and error.error == MONAILabelError.INVALID_INPUT:
        return HTTPException(400, str(error.msg))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return HTTPException(507, f"The server can't store this: {error.strerror}; nothing was changed.")
    for kind, status in ((DataError, 422), (WeightsError, 409), (ConfigError, 400), (Sam2SgpError, 400)):
        if isinstance(error, kind):
            return HTTPException(status, str(error))
    return HTTPException(500, FAILED)
