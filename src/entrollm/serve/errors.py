"""Errors in the shape that OpenAI's clients know."""

from __future__ import annotations


class ApiError(Exception):
    """A request that is refused or fails.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do.
        param: the field of the request that is at fault, or `None`.
        code: a word for programs, such as model_not_found, or `None`.
        retry_after_s: seconds after which another try makes sense, or `None`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def to_json(self) -> dict[str, object]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is at fault itself."""
    return ApiError(400, message, param=param, code=code)
