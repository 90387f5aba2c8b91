"""Why a request was not answered: one class, with the HTTP status that says the same."""

from collections.abc import Sequence
from http import HTTPStatus


class Refusal(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
        status: The HTTP status; below 500 the client is to change something, 503 and 504 mean that
            the same request may work later, 500 is a bug of ours.
        kind: One word for metrics and logs.
        retry_after_s: Seconds after which another try makes sense; None where it does not.
        methods: What the path takes instead, where the request's method is wrong.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        retry_after_s: int | None = None,
        methods: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status = HTTPStatus(status)
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.methods = methods


def invalid(message: str) -> Refusal:
    """The request itself is wrong."""
    return Refusal(400, "invalid", message)


def not_found(message: str) -> Refusal:
    """The model, version or path does not exist."""
    return Refusal(404, "not_found", message)


def too_large(message: str) -> Refusal:
    """The body, a text or a picture is over its limit."""
    return Refusal(413, "too_large", message)


def unsupported(message: str) -> Refusal:
    """The body comes in a form that is not read here."""
    return Refusal(415, "unsupported", message)


def overloaded(message: str, retry_after_s: int = 1) -> Refusal:
    """There is more work than may wait."""
    return Refusal(503, "overloaded", message, retry_after_s=retry_after_s)


def draining() -> Refusal:
    """The server is on its way out."""
    return Refusal(503, "draining", "the server is shutting down.", retry_after_s=1)


def expired() -> Refusal:
    """The answer was not ready in time."""
    return Refusal(504, "expired", "the answer was not ready in time: try again later.")


def internal() -> Refusal:
    """A bug of ours; what went wrong is in the log and not in the answer."""
    return Refusal(500, "internal", "the server failed at this request; its log has the reason.")


def shown(value: object, length: int = 60) -> str:
    """Return a client's value as an error message may repeat it: short and on one line."""
    text = ascii(value[: 4 * length] if isinstance(value, str) else value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
