"""Errors that a user can fix, and text that is safe to print."""

from collections.abc import Sequence


class RadiotagError(Exception):
    """An error that a user can fix: a message that names the file, and a hint how to fix it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BrokenImage(RadiotagError):
    """An image file that cannot be read."""


class Unmarkable(BrokenImage):
    """An image that is sound, but that cannot be marked and written again as it was."""

    def __init__(self, message: str, hint: str = "", kind: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind  # what such images have in common


def broken_warnings(paths: Sequence[str], where: str) -> list[str]:
    """A warning that names images which could not be read; nothing if there are none."""
    if not paths:
        return []
    count = "one image" if len(paths) == 1 else f"{len(paths)} images"
    return [f"{count} of {where} cannot be read, and left out: {', '.join(paths)}"]


def none_readable(where: str, first: str) -> RadiotagError:
    """The error where none of a folder's images can be read."""
    return RadiotagError(f"none of the images of {where} can be read, {first} for one", "give another folder")


def printable(text: str) -> str:
    """Escape control characters and lone surrogates: file and class names come from strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without PyTorch's heading; at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).strip()[:200]


def out_of_memory(error: Exception) -> bool:
    """Whether main or accelerator memory was insufficient; PyTorch reports this in several ways."""
    text = str(error).lower()
    is_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_type or any(phrase in text for phrase in ("out of memory", "allocate memory", "alloc_failed"))
