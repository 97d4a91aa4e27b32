"""Errors as clients of OpenAI's API expect them: {"error": {"message", "type", "param", "code"}}.

A message is made of our own words, of names that we know and of numbers, never of what a client sent, so that an error
is always short.
"""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what is wrong and the way out.
        param: field of the request that is wrong.
        code: for programs.
        retry_after: seconds after which the same request may succeed; None = it never will.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {**(headers or {}), **({} if retry_after is None else {"Retry-After": str(retry_after)})}

    def response(self) -> JSONResponse:
        error = {"message": self.message, "type": _type_of(self.status), "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def explain_body(error: ValidationError, fields: Mapping[str, object]) -> ApiError:
    """A 400 that names the first wrong field of a request's body.

    Args:
        fields: the names that a body may have; another name is not repeated.
    """
    found = error.errors(include_url=False, include_input=False)[0]
    name = str(found["loc"][0]) if found["loc"] else None
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['msg']}", code="invalid_json")
    if name is None:
        return ApiError(400, "the body must be a JSON object", code="invalid_type")
    if name not in fields:
        known = ", ".join(fields)
        return ApiError(
            400, f"the body has a field that this server does not know; it knows {known}", code="unknown_field"
        )
    reason = str(found["ctx"]["error"]) if found["type"] == "value_error" else f"{name}: {found['msg']}"
    return ApiError(400, reason, param=name, code=found["type"])


def install_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def answer(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def answer_routing(_: Request, error: HTTPException) -> JSONResponse:
        message = {404: "there is no such path; /openapi.json lists all", 405: "this path has another method"}
        return ApiError(
            error.status_code, message.get(error.status_code, error.detail), headers=error.headers
        ).response()

    @app.exception_handler(Exception)
    async def answer_fault(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "a fault of the server; its log says more").response()
