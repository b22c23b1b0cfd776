"""What goes wrong, said so that a user can mend it, and text that is safe to print."""


class RadiotagError(Exception):
    """What a user can mend: one message that names the file, and a hint with the way out."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def printable(text: str) -> str:
    """File and class names come from strangers: none of their control characters is printed, no lone surrogate."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error says first; PyTorch puts a heading above it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).strip()[:200]


def out_of_memory(error: Exception) -> bool:
    """Whether the machine's memory, or an accelerator's, did not suffice; PyTorch says so in several ways."""
    text = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(said in text for said in ("out of memory", "allocate memory", "alloc_failed"))
