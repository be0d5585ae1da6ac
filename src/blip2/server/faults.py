"""What goes wrong, as the network sees it: OpenAI's error object, a status, fixed words.

An error's own text leaves only where this project wrote it (`Blip2Error`); all else is logged and told as 500.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from blip2.errors import BadImage, Blip2Error, Busy, Closing, MissingPart, UnknownModel, UserError

log = logging.getLogger("blip2.server")

STATUS: tuple[tuple[type[Blip2Error], int], ...] = (  # the first that fits
    (Closing, 503),
    (Busy, 429),
    (UnknownModel, 404),
    (BadImage, 400),
    (MissingPart, 400),
    (UserError, 400),
)
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
WORDS = {
    404: "There is nothing at this address.",
    405: "This address does not take this method.",
    500: "Something went wrong in the server. The log has the details.",
}


class Fault(Exception):
    """A refusal with its status; `message` is for the person who asked."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as an HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def fault_of(error: BaseException, *, retry_after: int = 1) -> Fault:
    """What the network is told of an error; what this project did not foresee is logged and told as 500."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, Blip2Error):
        status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
        if status != 500:
            headers = {"Retry-After": str(retry_after)} if isinstance(error, Busy) else {}
            return Fault(status, str(error), headers=headers)
    log.error("a request failed", exc_info=error)
    return Fault(500, WORDS[500])


def answer_faults(app: FastAPI) -> None:
    """Has the app answer every error with OpenAI's error object."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return fault_of(error).response()

    async def no_such_route(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        words = WORDS.get(error.status_code, "The request was refused.")
        return Fault(error.status_code, words, headers=error.headers).response()

    app.add_exception_handler(Fault, refused)
    app.add_exception_handler(Blip2Error, refused)
    app.add_exception_handler(HTTPException, no_such_route)
    app.add_exception_handler(Exception, refused)
