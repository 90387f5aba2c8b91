"""JSON that strangers sent: read with limits, and taken apart with a sentence for every mistake.

A body of a few megabytes may hold a million empty lists, which take a hundred megabytes and most of
a second to read. So values are counted before any is made, against what the model itself can take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mdpd_deploy.serve.core.refusal import Refusal, invalid, shown, too_large
from mdpd_deploy.serve.core.tensors import TensorSpec

T = TypeVar("T")
MOST_COUNT = 2**63 - 1
_KINDS = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}
# What stands around the values: names, shapes, parameters, an id.
SLACK_BYTES, SLACK_VALUES, SLACK_STRINGS = 65_536, 4096, 8192
NUMBER_BYTES = 32  # "-1.7976931348623157e+308, " has 26
ESCAPED_BYTES = 6  # of a byte of text: \u0000
_BEFORE_A_VALUE = (b",", b"[", b"{")  # there is one before every value but the first


@dataclass(frozen=True)
class JsonLimit:
    """The most that the JSON of one request may hold.

    Attributes:
        most_bytes: Its size.
        most_values: Values, objects and lists among them.
        most_strings: Strings, keys among them.
    """

    most_bytes: int
    most_values: int
    most_strings: int

    def check(self, body: bytes) -> None:
        """Raise a 413 for a body beyond the limit; nothing in it becomes an object."""
        if len(body) > self.most_bytes:
            raise self._too_large(self.most_bytes, "bytes")
        bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
        if bare.count(b'"') > 2 * self.most_strings:  # each quote begins or ends a string now
            raise self._too_large(self.most_strings, "strings")
        outside = b" ".join(bare.split(b'"')[::2])
        if sum(map(outside.count, _BEFORE_A_VALUE)) > self.most_values:
            raise self._too_large(self.most_values, "values")

    def _too_large(self, most: int, what: str) -> Refusal:
        return too_large(f"the JSON has more than {most} {what}: no request of this model has.")


def tensors_limit(inputs: Sequence[TensorSpec]) -> JsonLimit:
    """Return the limit of a request of the protocol: every input as large as it may be."""
    numbers = lists = 0
    for spec in inputs:
        sizes = [axis.high for axis in spec.axes]
        numbers += math.prod(sizes)
        lists += sum(math.prod(sizes[:depth]) for depth in range(len(sizes)))
    size = SLACK_BYTES + NUMBER_BYTES * numbers
    return JsonLimit(size, SLACK_VALUES + numbers + lists, SLACK_STRINGS)


def texts_limit(max_batch: int, text_bytes: int, texts_bytes: int) -> JsonLimit:
    """Return the limit of a plain request: pairs of texts, each as long as it may be.

    Args:
        max_batch: Most inputs.
        text_bytes: Most bytes of a text.
        texts_bytes: Most bytes of all.
    """
    texts = 2 * max_batch
    size = SLACK_BYTES + ESCAPED_BYTES * min(texts * text_bytes, texts_bytes)
    return JsonLimit(size, SLACK_VALUES + 2 * texts, SLACK_STRINGS + texts)


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


def take(plain: dict[str, Any], key: str, kind: type[T], where: str = "") -> T | None:
    """Return `plain[key]`, a list, object, string or flag; None when the key is not there."""
    value = plain.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise invalid(f"{where}{key!r} must be {_KINDS[kind]}.")


def take_list(plain: dict[str, Any], key: str, most: int) -> list[Any]:
    """Return `plain[key]`, a list of at most `most` entries; empty when the key is not there."""
    value = take(plain, key, list) or []
    if len(value) > most:
        raise invalid(f"{key!r} has {len(value)} entries: at most {most} are accepted.")
    return value


def take_count(plain: dict[str, Any], key: str, where: str = "") -> int | None:
    """Return `plain[key]`, a whole number of 0 to `MOST_COUNT`; None when the key is not there."""
    value = plain.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MOST_COUNT:
        raise invalid(
            f"{where}{key!r} must be a whole number below 2^63, not negative: given {shown(value)}."
        )
    return value
