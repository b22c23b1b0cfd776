"""radiotag: mark an image data set, and prove later that a model was trained on it."""

__version__ = "0.2.0"


class RadiotagError(Exception):
    """What a user can mend: one message that names the file, and a hint with the way out."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
