"""JSON that strangers sent: read with limits, and taken apart with a sentence for every mistake."""

from typing import Any

from mdpd_deploy.serve.core.json_limit import JsonLimit
from mdpd_deploy.serve.core.refusal import invalid, shown

MOST_COUNT = 2**63 - 1


def read_json_body(body: bytes, limit: JsonLimit) -> dict[str, Any]:
    """Return the JSON object in a body.

    pydantic's parser refuses nesting beyond 200 levels, invalid UTF-8 and lone surrogates; NaN and
    Infinity come through as such.

    Args:
        body: The JSON.
        limit: What is too much to be read.

    Raises:
        Refusal: 413 beyond the limit, 400 if it is anything but one JSON object.
    """
    from pydantic_core import from_json

    limit.check(body)
    try:
        plain = from_json(body)
    except ValueError as err:
        raise invalid(f"the body is not valid JSON: {err}.") from None
    if not isinstance(plain, dict):
        raise invalid("the body must be a JSON object.")
    return plain


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
    """Return `plain[key]`, a whole number of 0 to `MOST_COUNT`; None when the key is not there."""
    value = plain.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MOST_COUNT:
        raise invalid(
            f"{where}{key!r} must be a whole number below 2^63, not negative: given {shown(value)}."
        )
    return value
