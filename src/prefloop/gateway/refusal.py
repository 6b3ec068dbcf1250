"""Why a request is not answered, in the shape that OpenAI's clients understand."""

from __future__ import annotations

from prefloop.records import JSONObject, PrefloopError


class RefusedError(PrefloopError):
    """A request that is refused: the status of the response, and a code that programs can tell apart.

    `param` names the key of the request that is to blame, `retry_after_s` when to ask again (None: not at all).
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> JSONObject:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that say whether to ask again: OpenAI's clients would repeat a 409 or a 504, to no avail."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        return {"retry-after": str(self.retry_after_s)}
