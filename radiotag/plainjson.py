"""JSON from strangers: what is there twice, and what is nested beyond any use, is refused with one kind of error."""

import json
from typing import Any

DIGITS = 300  # of a whole number, at most: beyond them no float follows


def parse(text: str | bytes) -> Any:
    """Plain values from JSON text. ValueError for what is none, or what is unclear."""
    try:
        return json.loads(text, parse_int=_parse_int, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _parse_int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of more than {DIGITS} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are there once. One that is repeated with the same value does no harm."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ValueError(f"{name[:100]!r} is there twice, and differently")
    return found
