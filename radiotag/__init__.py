"""radiotag: mark an image data set, and prove later that a model was trained on it."""

from radiotag.errors import RadiotagError

__all__ = ["RadiotagError", "__version__"]
__version__ = "0.4.0"
