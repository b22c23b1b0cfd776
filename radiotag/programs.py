"""The weights in PyTorch's zip files, read without running, compiling or trusting anything else in them.

They are `torch.save`'s, or those of a program and its tensors (TorchScript, torch.export). A program is never looked
at: what `torch.save` writes, or would have written of a TorchScript archive, is copied and read with
`weights_only=True`, a program's modules as bare bundles of attributes; a torch.export archive lists its tensors in
JSON, and what comes out is the module's state dict. All weights lie in a file as they are: one that would unpack to
more than itself is refused. The copy is made as two readers may see two files in one.
"""

import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from radiotag.errors import RadiotagError, first_line

# as in the schema of torch.export's archives; complex and 8-bit float weights are none that this package could use
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
WEIGHTS = "_weights_config.json"  # torch.export's since PyTorch 2.8
OLD_WEIGHTS = "serialized_state_dict.pt"  # and before
FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # what they fill was there before
WORK = 2**24  # objects looked at in putting a pickle's objects together: a minute or two, and a gigabyte
LONGEST = 1000  # characters of a submodule's dotted name
LARGE = 1000  # whole numbers from 2^61 − 1 on, such as seeds
ENCODE = "_codecs encode"  # how bytes are pickled, as text in Latin-1


def read_archive(path: Path) -> Any:
    """What `torch.save` put there, or the state dict of a program's module.

    Raises whatever a damaged or hostile one leads to, and runs none of it.
    """
    return _content(path, path)


def grown(path: Path) -> RadiotagError:
    """The error of a file whose content would take more memory than the file has bytes."""
    return RadiotagError(f"{path} unpacks to more than itself, as no PyTorch file does", "save the weights again")


def check_pickles(file: IO[bytes], count: int = 1) -> None:
    """UnpicklingError for what `weights_only` lets pass and no weights need; ValueError and others for what is broken.

    `bytearray` can be of any size, and so can what is encoded again and again. A tuple that holds another twice,
    which holds another twice, and so on, takes a few bytes a level, but hashing it takes time exponential in the depth,
    with no Ctrl-C; so do whole numbers that all have the same hash, being multiples of 2^61 − 1.
    """
    for _ in range(count):
        start = file.tell()
        if file.read(1):
            file.seek(start)
            _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Follow a pickle's stack with the sizes that objects would have if they shared nothing."""
    stack, marks, memo, work, large = list[_Cell](), list[int](), dict[object, _Cell](), 0, 0
    for code, argument, _ in pickletools.genops(file):
        if code.name == "MARK":
            marks.append(len(stack))
        elif code.name in {"PUT", "BINPUT", "LONG_BINPUT"}:
            memo[argument] = stack[-1]
        elif code.name in {"GET", "BINGET", "LONG_BINGET"}:
            stack.append(memo[argument])
        else:
            kinds = [kind.name for kind in code.stack_before]
            first = marks.pop() - kinds.index("mark") if "mark" in kinds else len(stack) - len(kinds)
            taken = stack[first:]
            del stack[first:]
            filled = taken.pop(0) if code.name in FILLED else _Cell(1, argument, taken)
            size = sum(cell.size for cell in taken)
            late = filled.placed and code.name != "BUILD" and size > 0  # what holds it has been measured
            encoded = code.name == "REDUCE" and taken[0].value == ENCODE and taken[1].value[1:] != ("latin1",)
            large += isinstance(argument, int) and abs(argument) >= 2**61 - 1
            filled.size, work = filled.size + size, work + size + 1
            for cell in taken:
                cell.placed = True
            stack += [filled] * len(code.stack_after)
            if late or encoded or large > LARGE or code.proto > 3 or "bytearray" in str(argument):
                raise pickle.UnpicklingError(f"weights_only: {code.name} {argument}")
        if work > WORK:
            raise pickle.UnpicklingError("weights_only: objects in objects")


class _Cell:
    """An object on a pickle's stack.

    size: objects in it, a shared one counted each time; value: its argument, or of a tuple its parts; placed: whether
    another object holds it already.
    """

    __slots__ = ("placed", "size", "value")

    def __init__(self, size: int, argument: object, parts: "Sequence[_Cell]") -> None:
        self.size, self.placed = size, False
        self.value: Any = tuple(part.value for part in parts) if parts else argument


def _content(file: Path | io.BytesIO, path: Path, nested: bool = False) -> Any:
    """Of the zip file at `path`, or of what `torch.save` wrote and a program's archive holds, `nested`."""
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # a damaged directory raises many kinds
        raise RadiotagError(f"{path} is truncated or damaged: {first_line(error)}", "copy it again") from error
    with archive:
        every, size = archive.namelist(), path.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
        if len(set(every)) < len(every) or sum(entry.compress_size for entry in archive.infolist()) > size:
            raise grown(path)
        names = [name for name in every if "/code/" not in name]
        if not nested:
            for name in names:
                if name.rpartition("/")[2] == OLD_WEIGHTS:
                    return _content(io.BytesIO(_bytes(archive, name, path)), path, nested=True)
            configs = [name for name in names if name.endswith(WEIGHTS)]
            if len(configs) > 1:
                raise RadiotagError(f"{path} holds several models", "export each into a file of its own")
            if configs:
                return _exported(archive, names, configs[0], path)
        program = any("/code/" in name or name.endswith(("constants.pkl", "archive_format")) for name in every)
        return _saved(archive, names, path, program and not nested)


def _bytes(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """An entry that lies there as it is; only what is never read, a program's code and notes, is compressed."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise grown(path)
    return archive.read(name)


def _exported(archive: zipfile.ZipFile, names: Sequence[str], config: str, path: Path) -> dict[str, Tensor]:
    folder, records, state, there = config.rpartition("/")[0], dict[str, Any](), {}, set(names)
    for name, entry in json.loads(_bytes(archive, config, path))["config"].items():
        place = f"{folder}/{entry['path_name']}"
        if place not in there:
            raise ValueError(f"it lacks {place}")
        if place not in records:  # tensors may share one
            data = _bytes(archive, place, path)
            records[place] = _content(io.BytesIO(data), path, nested=True) if entry["use_pickle"] else bytearray(data)
        if isinstance(records[place], Tensor):
            state[name] = records[place]
        elif records[place]:
            meta = entry["tensor_meta"]
            flat = torch.frombuffer(records[place], dtype=DTYPES[meta["dtype"]])
            shape, strides = ([size["as_int"] for size in meta[which]] for which in ("sizes", "strides"))
            state[name] = flat.as_strided(shape, strides, meta["storage_offset"]["as_int"])  # checks its bounds
    return state


class _Module:
    """A scripted module, or any other object of a program: its attributes and nothing else."""

    __slots__ = ("attributes",)  # and no __dict__, in which a file could put a method

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _value(value: Any, *_: object) -> Any:
    """TorchScript's hints of what a list holds."""
    return value


HINTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")


def _saved(archive: zipfile.ZipFile, names: Sequence[str], path: Path, program: bool) -> Any:
    pickled = next(name for name in names if name.endswith("/data.pkl"))
    check_pickles(io.BytesIO(_bytes(archive, pickled, path)))
    root, bare = pickled.removesuffix("data.pkl"), io.BytesIO()
    with zipfile.ZipFile(bare, "w") as copy:  # without constants.pkl and code, by which a program is known
        for name in names:
            inside = name.removeprefix(root)
            if inside in ("data.pkl", "version", "byteorder") or inside.startswith("data/"):
                copy.writestr(name, _bytes(archive, name, path))
    bare.seek(0)
    if not program:
        return torch.load(bare, map_location="cpu", weights_only=True)
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    known = [(_value, f"torch.jit._pickle.{hint}") for hint in HINTS]
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(bare):
        if name.startswith("__torch__."):  # a class of the program's own; no import is made of the name
            known.append((_Module, name))
    bare.seek(0)
    with torch.serialization.safe_globals(known):
        return _tensors(torch.load(bare, map_location="cpu", weights_only=True))


def _tensors(module: object) -> dict[str, Tensor]:
    """The tensors among a module's attributes and those of its submodules, by their dotted names."""
    found, open_, seen = dict[str, Tensor](), [("", module)], set[int]()
    while open_:
        prefix, bundle = open_.pop()
        if len(prefix) > LONGEST:
            raise pickle.UnpicklingError("weights_only: names without end")
        if id(bundle) in seen or not isinstance(bundle, _Module):
            continue
        seen.add(id(bundle))
        for name, value in getattr(bundle, "attributes", {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            else:
                open_.append((f"{prefix}{name}.", value))
    return found
