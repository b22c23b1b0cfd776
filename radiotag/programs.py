"""Read the weights in PyTorch's zip files, without running, compiling or trusting anything else in them.

The files come from `torch.save`, or contain a program with its tensors (TorchScript, torch.export). Programs are never
read. From the output of `torch.save` and from a TorchScript archive, only the entries that `torch.save` writes are
copied and read with `weights_only=True`; the modules of a program become plain bundles of attributes. A torch.export
archive lists its tensors in JSON. The result is always the module's state dict. PyTorch stores weights uncompressed, so
files that would unpack to more bytes than they have are refused. The entries are copied because a zip file can look
different to two readers.
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

# From the schema of torch.export's archives; complex and 8-bit float weights are of no use here.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
WEIGHTS = "_weights_config.json"  # torch.export's since PyTorch 2.8
OLD_WEIGHTS = "serialized_state_dict.pt"  # before PyTorch 2.8
FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # these fill an existing object
WORK = 2**24  # limit of steps to build a pickle's objects: a minute or two, and a gigabyte
LONGEST = 1000  # characters in a submodule's dotted name, at most
LARGE = 1000  # integers of 2^61 − 1 or more, such as seeds, at most
ENCODE = "_codecs encode"  # pickles bytes as Latin-1 text


def read_archive(path: Path) -> Any:
    """The object that `torch.save` wrote, or the state dict of a program's module. No code in the file is run.

    A damaged or hostile file can raise any exception.
    """
    return _content(path, path)


def grown(path: Path) -> RadiotagError:
    """The error for a file whose content would take more memory than the file has bytes."""
    return RadiotagError(f"{path} unpacks to more than itself, as no PyTorch file does", "save the weights again")


def check_pickles(file: IO[bytes], count: int = 1) -> None:
    """UnpicklingError for attacks that `weights_only` does not stop; ValueError and others for damaged pickles.

    A `bytearray` can have any size, and so can text that is encoded again and again. Nested tuples, each holding the
    next one twice, take a few bytes per level, but hashing them takes exponential time and cannot be stopped by Ctrl-C.
    The same is true of many integers with equal hashes (multiples of 2^61 − 1).
    """
    for _ in range(count):
        start = file.tell()
        if file.read(1):
            file.seek(start)
            _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Simulate a pickle's stack, with the sizes that objects would have if they shared nothing."""
    stack, marks, memo, work, large_numbers = list[_Cell](), list[int](), dict[object, _Cell](), 0, 0
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
            parts = stack[first:]
            del stack[first:]
            made = parts.pop(0) if code.name in FILLED else _Cell(1, argument, parts)
            size = sum(cell.size for cell in parts)
            too_late = made.placed and code.name != "BUILD" and size > 0  # its holder has been measured already
            encodes = code.name == "REDUCE" and parts[0].value == ENCODE and parts[1].value[1:] != ("latin1",)
            large_numbers += isinstance(argument, int) and abs(argument) >= 2**61 - 1
            made.size, work = made.size + size, work + size + 1
            for cell in parts:
                cell.placed = True
            stack += [made] * len(code.stack_after)
            if too_late or encodes or large_numbers > LARGE or code.proto > 3 or "bytearray" in str(argument):
                raise pickle.UnpicklingError(f"weights_only: {code.name} {argument}")
        if work > WORK:
            raise pickle.UnpicklingError("weights_only: objects in objects")


class _Cell:
    """An object on a pickle's stack.

    size: number of objects in it, shared ones counted each time; value: its argument, or the parts of a tuple; placed:
    whether another object already holds it.
    """

    __slots__ = ("placed", "size", "value")

    def __init__(self, size: int, argument: object, parts: "Sequence[_Cell]") -> None:
        self.size, self.placed = size, False
        self.value: Any = tuple(part.value for part in parts) if parts else argument


def _content(file: Path | io.BytesIO, path: Path, nested: bool = False) -> Any:
    """The content of the zip file at `path`, or of a `nested` file of `torch.save` within a program's archive."""
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # a damaged directory raises many types
        raise RadiotagError(f"{path} is truncated or damaged: {first_line(error)}", "copy it again") from error
    with archive:
        all_names, size = archive.namelist(), path.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
        if len(set(all_names)) < len(all_names) or sum(entry.compress_size for entry in archive.infolist()) > size:
            raise grown(path)
        names = [name for name in all_names if "/code/" not in name]
        if not nested:
            for name in names:
                if name.rpartition("/")[2] == OLD_WEIGHTS:
                    return _content(io.BytesIO(_bytes(archive, name, path)), path, nested=True)
            configs = [name for name in names if name.endswith(WEIGHTS)]
            if len(configs) > 1:
                raise RadiotagError(f"{path} holds several models", "export each into a file of its own")
            if configs:
                return _exported(archive, names, configs[0], path)
        program = any("/code/" in name or name.endswith(("constants.pkl", "archive_format")) for name in all_names)
        return _saved_by_torch(archive, names, path, program and not nested)


def _bytes(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """Read an uncompressed entry. Only entries that are never read (a program's code and notes) may be compressed."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise grown(path)
    return archive.read(name)


def _exported(archive: zipfile.ZipFile, names: Sequence[str], config: str, path: Path) -> dict[str, Tensor]:
    folder, contents, state, entries = config.rpartition("/")[0], dict[str, Any](), {}, set(names)
    for name, record in json.loads(_bytes(archive, config, path))["config"].items():
        entry = f"{folder}/{record['path_name']}"
        if entry not in entries:
            raise ValueError(f"it lacks {entry}")
        if entry not in contents:  # tensors may share an entry
            data = _bytes(archive, entry, path)
            contents[entry] = _content(io.BytesIO(data), path, nested=True) if record["use_pickle"] else bytearray(data)
        if isinstance(contents[entry], Tensor):
            state[name] = contents[entry]
        elif contents[entry]:
            layout = record["tensor_meta"]
            flat = torch.frombuffer(contents[entry], dtype=DTYPES[layout["dtype"]])
            shape, strides = ([size["as_int"] for size in layout[which]] for which in ("sizes", "strides"))
            state[name] = flat.as_strided(shape, strides, layout["storage_offset"]["as_int"])  # checks its bounds
    return state


class _Module:
    """A scripted module, or any other object of a program: only its attributes."""

    __slots__ = ("attributes",)  # no __dict__, in which a file could put a method

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _value(value: Any, *_: object) -> Any:
    """Stands for TorchScript's functions that give the type of a list; returns the list itself."""
    return value


HINTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")


def _saved_by_torch(archive: zipfile.ZipFile, names: Sequence[str], path: Path, program: bool) -> Any:
    pickle_name = next(name for name in names if name.endswith("/data.pkl"))
    check_pickles(io.BytesIO(_bytes(archive, pickle_name, path)))
    root, buffer = pickle_name.removesuffix("data.pkl"), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as copy:  # without constants.pkl and code, which would mark it as a program
        for name in names:
            local_name = name.removeprefix(root)
            if local_name in ("data.pkl", "version", "byteorder") or local_name.startswith("data/"):
                copy.writestr(name, _bytes(archive, name, path))
    buffer.seek(0)
    if not program:
        return torch.load(buffer, map_location="cpu", weights_only=True)
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    allowed = [(_value, f"torch.jit._pickle.{hint}") for hint in HINTS]
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
        if name.startswith("__torch__."):  # a class of the program; the name is never imported
            allowed.append((_Module, name))
    buffer.seek(0)
    with torch.serialization.safe_globals(allowed):
        return _tensors(torch.load(buffer, map_location="cpu", weights_only=True))


def _tensors(module: object) -> dict[str, Tensor]:
    """The tensors among the attributes of a module and its submodules, by dotted names."""
    tensors, pending, seen = dict[str, Tensor](), [("", module)], set[int]()
    while pending:
        prefix, bundle = pending.pop()
        if len(prefix) > LONGEST:
            raise pickle.UnpicklingError("weights_only: names without end")
        if id(bundle) in seen or not isinstance(bundle, _Module):
            continue
        seen.add(id(bundle))
        for name, value in getattr(bundle, "attributes", {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            else:
                pending.append((f"{prefix}{name}.", value))
    return tensors
