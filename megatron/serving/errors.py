"""Errors in the form of OpenAI's API."""

import json
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
TYPES |= {503: "server_error"}
RETRY_SECONDS = "1"  # with 429 and 503: when a client may ask again


class JsonAnswer(JSONResponse):
    """JSON of any text: a lone surrogate, which a prompt may hold, becomes a question mark."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class ApiError(Exception):
    """What a request is answered with instead of a text.

    param: the field that is wrong. code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JsonAnswer:
        """The error as an answer."""
        headers = {"Retry-After": RETRY_SECONDS} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JsonAnswer(self.body, self.status, headers)


def answer_errors(app: FastAPI) -> None:
    """Have every error of `app` answered in this form."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        answer = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed; its log says why", code="internal_error").response


def _of_validation(error: RequestValidationError) -> ApiError:
    """All wrong fields in one message: 400 for a body that is no JSON object, 422 for wrong types and values."""
    problems = error.errors()
    if problems[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problems[0]['ctx']['error']}", code="invalid_json")
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(_field(problem["loc"]), []).append(problem["msg"].removeprefix("Value error, "))
    if "" in found and problems[0]["type"] != "value_error":
        return ApiError(400, "the body must be a JSON object, with Content-Type application/json", code="invalid_json")
    listed = [(name, ", or ".join(dict.fromkeys(texts))) for name, texts in found.items()]
    message = "; ".join(f"{name}: {text}" if name else text for name, text in listed)
    return ApiError(422, message, param=listed[0][0] or None, code="invalid_value")


def _field(place: tuple[str | int, ...]) -> str:
    """The path of a field, without the type of the union that pydantic adds."""
    named = takewhile(lambda part: isinstance(part, int) or part.isidentifier(), place[1:])
    return ".".join(str(part) for part in named if part not in ("str", "bool"))
