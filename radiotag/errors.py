"""Errors that a user can fix, and text that is safe to print."""


class RadiotagError(Exception):
    """An error that a user can fix: a message that names the file, and a hint how to fix it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


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
