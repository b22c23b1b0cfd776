"""radiotag: mark an image data set, and prove later that a model was trained on it.

How to read the package, from the science to the command line:

- `radioactive`: carriers and patterns, the marking loss and its steps, exact p-values; read it with the paper
- `suspect`: the vectors computed from a suspect, behind a wall: it cannot use carriers
- `keys`: key files, and the random choices that only a key's owner can repeat
- `pairing`: pairs a suspect's outputs with classes and carriers
- `public`: what is published of a key and of a marked set, and checked by others
- `verification`: tests suspects and gives verdicts, with `probes`, `normalisation`, `calibration`, `blackbox` and
  `answers`
- `stores`: where images are read from and written to, a folder or tar shards; `images` handles single files
- `plan`, `ranking`, `marking_run`: choose images, mark a data set, and continue after an interruption
- `api`, `cli`: the same for Python and for the command line

`keygen`, `mark`, `verify` and `load_key` can be called as `radiotag.keygen` and so on; PyTorch is imported at their
first use.
"""

from typing import TYPE_CHECKING, Any

from radiotag.errors import RadiotagError

if TYPE_CHECKING:
    from radiotag.api import keygen, load_key, mark, verify
    from radiotag.plan import MarkOptions
    from radiotag.verification import VerifyOptions

__all__ = ["MarkOptions", "RadiotagError", "VerifyOptions", "__version__", "keygen", "load_key", "mark", "verify"]
__version__ = "0.11.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from radiotag import api

        return getattr(api, name)
    raise AttributeError(f"module 'radiotag' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
