"""JSON that strangers sent: read with limits, and taken apart with a sentence for every mistake."""

from functools import cache
from typing import TYPE_CHECKING, Any

from mdpd_deploy.serve.core.refusal import invalid, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def read_json_body(body: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object in a body.

    pydantic's parser refuses nesting beyond 200 levels, invalid UTF-8 and lone surrogates; NaN and
    Infinity come through as such.

    Raises:
        Refusal: 400 if it is anything but one JSON object.
    """
    from pydantic import ValidationError

    try:
        return _object().validate_json(bytes(body))
    except ValidationError as err:
        problem = err.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            raise invalid(
                f"the body is not valid JSON: {problem.get('ctx', {}).get('error')}."
            ) from None
        raise invalid("the body must be a JSON object.") from None


@cache
def _object() -> "TypeAdapter[dict[str, Any]]":
    from pydantic import TypeAdapter

    return TypeAdapter(dict[str, Any])


def take_list(plain: dict[str, Any], key: str, where: str, most: int) -> list[Any]:
    """Return `plain[key]`, a list of at most `most` entries; empty when the key is not there."""
    value = plain.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise invalid(f"{where}{key!r} must be a list.")
    if len(value) > most:
        raise invalid(f"{where}{key!r} has {len(value)} entries: at most {most} are accepted.")
    return value


def take_object(plain: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return `plain[key]`, an object; empty when the key is not there."""
    value = plain.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"{where}{key!r} must be an object.")
    return value


def take_text(plain: dict[str, Any], key: str, where: str) -> str | None:
    """Return `plain[key]`, a string; None when the key is not there."""
    value = plain.get(key)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{where}{key!r} must be a string.")
    return value


def take_flag(plain: dict[str, Any], key: str, where: str) -> bool | None:
    """Return `plain[key]`, true or false; None when the key is not there."""
    value = plain.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{where}{key!r} must be true or false.")
    return value


def take_count(plain: dict[str, Any], key: str, where: str) -> int | None:
    """Return `plain[key]`, a whole number of at least 0; None when the key is not there."""
    value = plain.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise invalid(f"{where}{key!r} must be a whole number, not negative: given {shown(value)}.")
    return value
