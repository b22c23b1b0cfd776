"""Objects of any class in a pickle, read without importing, calling or trusting anything of them.

Training scripts save what they have at hand beside the weights: arguments, paths, NumPy's numbers, whole modules. Here
the few functions that make tensors and plain containers are real. Every other class or function that a pickle names is
`Inert`: it keeps what the file puts into it, and does nothing. `radiotag.pickles` has gone through the same pickle
before, and refused what would take more memory than the file.
"""

import builtins
import codecs
import collections
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from radiotag.pickles import BUILTINS, ENCODE, TYPED, is_real

NAMES = (  # of protocols up to 3; left out are those that call a class otherwise than by REDUCE and NEWOBJ
    "PROTO STOP MARK POP POP_MARK DUP GLOBAL REDUCE NEWOBJ BUILD BINPERSID APPEND APPENDS SETITEM SETITEMS PUT GET "
    "BINPUT BINGET LONG_BINPUT LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT DICT"
)
OPCODES = frozenset(getattr(pickle, name)[0] for name in NAMES.split())
MOST_MODULES, LONGEST = 100_000, 1000  # in a pickled module, and characters in the name of one


class Inert:
    """Stands for an object of any class: it keeps what the file puts into it, and does nothing."""

    __slots__ = ("items", "parts", "state")  # no __dict__, in which a file could put a method
    dump_patches = False  # whether PyTorch may write a file where a class is not as it was

    def __new__(cls, *arguments: object) -> "Inert":
        made = object.__new__(cls)
        made.items, made.parts, made.state = {}, list(arguments), None
        return made

    def __init__(self, *_: object) -> None:
        self.items: dict[Any, Any]  # of a mapping
        self.parts: list[Any]  # of a sequence or a set, and the arguments that it was made of
        self.state: Any  # its attributes

    def __call__(self, *arguments: object) -> "Inert":
        return Inert(*arguments)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, part: object) -> None:
        self.parts.append(part)

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """By name; none if they are no mapping."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state if isinstance(state, dict) else {}


def _of_no_type(function: Callable[..., Any], _: object, arguments: Any, __: object) -> Any:
    """Stands for the function that makes a tensor of a class and gives it attributes: it makes the tensor alone."""
    return function(*arguments)


class _Unpickler(pickle._Unpickler):
    """Python's own reader, with fewer operations, and with real functions for tensors and plain containers alone."""

    dispatch = {code: action for code, action in pickle._Unpickler.dispatch.items() if code in OPCODES}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        """A function or a class that a pickle names."""
        if f"{module} {name}" == TYPED:
            return _of_no_type
        if f"{module} {name}" == ENCODE:
            return codecs.encode
        if not is_real(f"{module} {name}"):
            return Inert
        place: Any = {"collections": collections, **dict.fromkeys(BUILTINS, builtins)}.get(module, torch)
        for part in module.split(".")[1:]:
            place = getattr(place, part)
        return getattr(place, name)


class PickleModule:
    """What `torch.load` takes in place of the module `pickle`."""

    __name__ = "pickle"
    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        """Read one pickle."""
        return _Unpickler(file, **options).load()


def load_inert(file: IO[bytes]) -> Any:
    """What `torch.save` wrote to a file (no TorchScript, no tar) that `check_pickles` has gone through."""
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=PickleModule())


def module_state(module: Inert) -> dict[str, Tensor] | None:
    """The state dict of a whole module that was pickled; None if it is none."""
    state, pending, visited = dict[str, Tensor](), [("", module)], 0
    while pending:
        prefix, one = pending.pop()
        visited += 1
        if visited > MOST_MODULES or len(prefix) > LONGEST:  # a few modules that hold one another would take for ever
            raise pickle.UnpicklingError("weights_only: modules without end")
        left_out = one.attributes.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in _items(one.attributes.get(kind)):
                if isinstance(value, Tensor) and not (isinstance(left_out, set) and name in left_out):
                    state[f"{prefix}{name}"] = value
        inner = [(f"{prefix}{name}.", part) for name, part in _items(one.attributes.get("_modules"))]
        pending += [(name, part) for name, part in reversed(inner) if isinstance(part, Inert)]
    return state or None


def _items(value: object) -> Iterable[tuple[Any, Any]]:
    """What a mapping of the file holds; its own methods may be replaced."""
    return dict.items(value) if isinstance(value, dict) else ()
