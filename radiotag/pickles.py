"""What a pickle of weights may do, found out before it is read: attacks that `weights_only=True` does not stop.

PyTorch's reader calls a list of functions with arguments from the file. Some of them make a tensor of any size, others
count through one whose millions of elements are a single number. So a pickle is simulated first. Every tensor must fit
in its storage, and every storage in the file. A call must be one that weights come in, or of a class or function that
is none of PyTorch's or Python's containers, for which `radiotag.inert` puts something that does nothing.
"""

import math
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # these fill an existing object
TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
DICTS = {"EMPTY_DICT", "DICT"}
WORK = 2**24  # limit of steps to build a pickle's objects: a minute or two, and a gigabyte
LARGE = 1000  # integers of 2^61 − 1 or more, such as seeds, at most
ENCODE = "_codecs encode"  # pickles bytes as Latin-1 text
BUILTINS = ("builtins", "__builtin__")
COUNTING = {  # these go through their argument
    "collections OrderedDict", "collections Counter", "torch Size", *(f"{module} set" for module in BUILTINS)
}  # fmt: skip
HARMLESS = {  # neither their size nor their time depends on a number in the file
    "torch device", "torch.serialization _get_layout", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state", "torch.nn.parameter Parameter",
    *(f"{module} complex" for module in BUILTINS),
}  # fmt: skip
VIEWS = {f"torch._utils _rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor")}
DERIVED = {  # these go through the tensors that they get
    f"torch._utils _rebuild_{name}" for name in ("sparse_tensor", "nested_tensor", "device_tensor_from_cpu_tensor")
}
TYPED = "torch._tensor _rebuild_from_type_v2"  # calls a function that is its first argument
REAL = {*COUNTING, *HARMLESS, *VIEWS, *DERIVED, TYPED, ENCODE}
PROGRAM = ("__torch__", "torch.jit._pickle ")  # stood in for by radiotag.programs


class TooLarge(pickle.UnpicklingError):
    """A pickle asks for more memory than its file has bytes."""


def is_real(name: str) -> bool:
    """Whether the function or class "MODULE NAME" is one that weights come in, and none that `radiotag.inert` replaces.

    >>> is_real("torch._utils _rebuild_tensor_v2"), is_real("torch FloatStorage"), is_real("os system")
    (True, True, False)
    """
    if name in REAL or name.startswith(PROGRAM):
        return True
    module, _, part = name.partition(" ")
    if part.endswith("Storage"):
        return module in {"torch", "torch.storage", "torch.cuda"}
    found = getattr(torch, part, None) if module == "torch" and "." not in part else None
    is_tensor_class = part.endswith("Tensor") and isinstance(found, type)
    return is_tensor_class or isinstance(found, torch.dtype | torch.layout | torch.qscheme)


def check_pickles(file: IO[bytes], count: int = 1, limit: float = math.inf) -> bool:
    """Whether PyTorch's own reader suffices, because a pickle names no class or function besides those of weights.

    UnpicklingError for attacks that `weights_only` does not stop; ValueError and others for damaged pickles.

    ValueError, too, if the storages take more than `limit` bytes, as in a truncated file; TooLarge if a tensor takes
    more than its storage. A `bytearray` can have any size, and so can text that is encoded again and again. Nested
    tuples, each holding the next one twice, take a few bytes per level, but hashing them takes exponential time and
    cannot be stopped by Ctrl-C. The same is true of many integers with equal hashes (multiples of 2^61 − 1).
    """
    plain = True
    for _ in range(count):
        start = file.tell()
        if file.read(1):
            file.seek(start)
            plain &= _Simulation(limit).run(file)
    return plain


class _Call(NamedTuple):
    """Stands for what a function would return, or a class make."""

    function: Any
    arguments: Any


class _Stored(NamedTuple):
    """Stands for a storage: its identifier in the file."""

    identifier: Any


class _Cell:
    """An object on a pickle's stack.

    size: number of objects in it, shared ones counted each time; value: its argument, or the parts of a tuple; code:
    the operation that made it; placed: whether another object already holds it; holds: whether a part of it is a tensor
    or a storage; deep: whether one is in its parts' parts.
    """

    __slots__ = ("code", "deep", "holds", "placed", "size", "value")

    def __init__(self, code: str, argument: object, parts: "Sequence[_Cell]") -> None:
        self.code, self.size, self.placed, self.holds, self.deep = code, 1, False, False, False
        values: tuple[Any, ...] = tuple(part.value for part in parts)
        self.value: Any = values or argument
        if code in {"REDUCE", "NEWOBJ"}:
            self.value = _Call(*values)
        elif code == "BINPERSID":
            self.value = _Stored(*values)

    def take(self, parts: "Sequence[_Cell]") -> int:
        """Hold these cells, too; returns how many objects they have."""
        size = sum(cell.size for cell in parts)
        for cell in parts:
            cell.placed = True
            made = isinstance(cell.value, _Call | _Stored)
            self.holds, self.deep = self.holds or made, self.deep or made or cell.holds
        self.size += size
        return size


@dataclass(slots=True)
class _Simulation:
    """A pickle's stack, with the sizes that objects would have if they shared nothing."""

    limit: float
    stack: list[_Cell] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[object, _Cell] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)  # bytes by key
    stored: int = 0  # bytes
    work: int = 0
    large_numbers: int = 0
    plain: bool = True

    def run(self, file: IO[bytes]) -> bool:
        """Go through one pickle; returns whether all that it names is what weights come in."""
        for code, argument, _ in pickletools.genops(file):
            self.plain &= code.name != "GLOBAL" or is_real(str(argument))
            if code.name == "MARK":
                self.marks.append(len(self.stack))
            elif code.name in {"PUT", "BINPUT", "LONG_BINPUT"}:
                self.memo[argument] = self.stack[-1]
            elif code.name in {"GET", "BINGET", "LONG_BINGET"}:
                self.stack.append(self.memo[argument])
            else:
                self._step(code, argument)
            if self.work > WORK:
                raise pickle.UnpicklingError("weights_only: objects in objects")
        return self.plain

    def _step(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        kinds = [kind.name for kind in code.stack_before]
        first = self.marks.pop() - kinds.index("mark") if "mark" in kinds else len(self.stack) - len(kinds)
        parts = self.stack[first:]
        del self.stack[first:]
        made = parts.pop(0) if code.name in FILLED else _Cell(code.name, argument, parts)
        self._check(code.name, made, parts)
        size = made.take(parts)
        too_late = made.placed and code.name != "BUILD" and size > 0  # its holder has been measured already
        self.large_numbers += isinstance(argument, int) and abs(argument) >= 2**61 - 1
        self.work += size + 1
        self.stack += [made] * len(code.stack_after)
        if too_late or self.large_numbers > LARGE or code.proto > 3 or "bytearray" in str(argument):
            raise pickle.UnpicklingError(f"weights_only: {code.name} {argument}")

    def _check(self, code: str, made: _Cell, parts: Sequence[_Cell]) -> None:
        if code in {"REDUCE", "NEWOBJ"}:
            function, arguments = parts
            if arguments.code not in TUPLES:
                raise pickle.UnpicklingError("weights_only: arguments that are no tuple")
            if _is_inert(function.value):
                return
            if function.value in COUNTING and (arguments.holds or arguments.deep):
                raise pickle.UnpicklingError(f"weights_only: {function.value} of a tensor's elements")
            _check_call(function.value, arguments.value or ())
        elif code == "BINPERSID":
            kind, name, *_ = made.value.identifier
            if kind == "module" and _is_inert(name):  # a class and its source, as PyTorch before 1.6 wrote modules
                made.value = name
            else:
                self._store(made.value.identifier)
        elif code == "BUILD":
            if isinstance(made.value, _Call) and _is_inert(made.value.function):
                return
            name = str(made.value.function) if isinstance(made.value, _Call) else ""
            if name == "collections OrderedDict" and parts[0].code not in DICTS:
                raise pickle.UnpicklingError("weights_only: attributes that are no mapping")
            if name != "collections OrderedDict" and not name.startswith(PROGRAM):
                _check_view(parts[0].value)

    def _store(self, identifier: Any) -> None:
        """Count the bytes of a storage, which PyTorch before 1.6 allocates as the file asks, even if none follow."""
        _, kind, key, _, count = identifier[:5]
        size = _width(kind) * count
        if not isinstance(key, str) or not isinstance(size, int) or size < 0 or self.storages.get(key, size) != size:
            raise pickle.UnpicklingError("weights_only: a storage that is none")
        self.stored += size if key not in self.storages else 0
        self.storages[key] = size
        if self.stored > self.limit:
            raise ValueError("storages beyond the end of the file")


def _is_inert(function: Any) -> bool:
    """Whether a function does nothing when it is called, nor what it returns."""
    if isinstance(function, _Call):
        return _is_inert(function.function)
    return isinstance(function, str) and " " in function and not is_real(function)


def _check_call(function: Any, arguments: Any) -> None:
    """UnpicklingError for a call that weights do not need; TooLarge for a tensor beyond its storage."""
    if function in HARMLESS or function in COUNTING or str(function).startswith(PROGRAM):
        return
    if function == ENCODE:
        if arguments[1:] != ("latin1",):
            raise pickle.UnpicklingError("weights_only: text encoded otherwise than as bytes")
    elif function in VIEWS:
        _check_view(arguments[:4], arguments[6] if function.endswith("v3") else None)
    elif function == TYPED and arguments[0] in VIEWS and type(arguments[2]) is tuple:
        _check_call(arguments[0], arguments[2])
    elif function in DERIVED:
        _check_whole(arguments)
    elif not isinstance(function, str) or not function.endswith("Tensor"):
        raise pickle.UnpicklingError(f"weights_only: a call of {function!r}"[:200])
    elif arguments:
        raise TooLarge("a tensor made of a number")


def _check_view(view: Any, kind: str | None = None) -> None:
    """TooLarge unless a tensor fits in its storage: view is (storage, offset, sizes, strides), kind its type if named.

    PyTorch would enlarge the storage.
    """
    storage, offset, sizes, strides = view
    sizes, strides = sizes or (), strides or ()
    if not isinstance(storage, _Stored) or not all(type(n) is int and n >= 0 for n in (offset, *sizes, *strides)):
        raise pickle.UnpicklingError("weights_only: a tensor that is none")
    _, stored_kind, _, _, count, *part = storage.identifier
    if part and part[0] is not None:  # a part of another storage: its key, offset and length
        _, start, length = part[0]
        if not 0 <= start <= start + length <= count:
            raise TooLarge("a part beyond its storage")
        count = length
    if kind is not None:
        count = count * _width(stored_kind) // _width(kind)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= count:
        raise TooLarge("a tensor beyond its storage")


def _check_whole(value: Any) -> None:
    """TooLarge for a tensor among arguments that repeats what is stored of it: its elements would be gone through."""
    if isinstance(value, _Call):
        if value.function not in VIEWS | HARMLESS | COUNTING:
            raise pickle.UnpicklingError("weights_only: a tensor made of another kind of tensor")
        if value.function in VIEWS and math.prod(value.arguments[2] or ()) > value.arguments[0].identifier[4]:
            raise TooLarge("a tensor that repeats its storage")
        value = value.arguments
    if isinstance(value, tuple) and not isinstance(value, _Stored):
        for part in value:
            _check_whole(part)


def _width(name: str) -> int:
    """Bytes of a number in a class of storages, or of a type: "torch FloatStorage", "torch float32"."""
    found = getattr(torch, str(name).rpartition(" ")[2], None)
    kind = found if isinstance(found, torch.dtype) else getattr(found, "dtype", None)
    return kind.itemsize if isinstance(kind, torch.dtype) else 1
