"""Read the weights in PyTorch's zip files, without running, compiling or trusting anything else in them.

The files come from `torch.save`, or contain a program with its tensors (TorchScript, torch.export). Programs are never
read. From the output of `torch.save` and from a TorchScript archive, only the entries that `torch.save` writes are
copied and read with `weights_only=True`, or where they name other classes, as inert objects (`radiotag.inert`). The
modules of a program become plain bundles of attributes. A torch.export archive lists its tensors in JSON. The result
is always the module's state dict. PyTorch stores weights uncompressed, so files that would unpack to more bytes than
they have are refused. The entries are copied because a zip file can look different to two readers.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radiotag.errors import RadiotagError, first_line
from radiotag.foreign import BY_ANSWERS, UNPACK
from radiotag.inert import load_inert
from radiotag.pickles import check_pickles

# From the schema of torch.export's archives; complex and 8-bit float weights are of no use here.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
WEIGHTS = "_weights_config.json"  # torch.export's since PyTorch 2.8
OLD_WEIGHTS = "serialized_state_dict.pt"  # before PyTorch 2.8
LONGEST = 1000  # characters in a submodule's dotted name, at most


def read_archive(path: Path) -> Any:
    """The object that `torch.save` wrote, or the state dict of a program's module. No code in the file is run.

    A damaged or hostile file can raise any exception.
    """
    return _content(path, path)


def grown(path: Path) -> RadiotagError:
    """The error for a file whose content would take more memory than the file has bytes."""
    return RadiotagError(f"{path} unpacks to more than itself, as no PyTorch file does", "save the weights again")


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
    pickle_name = next((name for name in names if name.endswith("/data.pkl")), "")
    if not pickle_name:
        raise RadiotagError(f"{path} is a zip archive without a PyTorch model", UNPACK)
    plain = check_pickles(io.BytesIO(_bytes(archive, pickle_name, path)), limit=path.stat().st_size)
    root, buffer = pickle_name.removesuffix("data.pkl"), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as copy:  # without constants.pkl and code, which would mark it as a program
        for name in names:
            local_name = name.removeprefix(root)
            if local_name in ("data.pkl", "version", "byteorder") or local_name.startswith("data/"):
                copy.writestr(name, _bytes(archive, name, path))
    buffer.seek(0)
    if not program:
        return torch.load(buffer, map_location="cpu", weights_only=True) if plain else load_inert(buffer)
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    allowed = [(_value, f"torch.jit._pickle.{hint}") for hint in HINTS]
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
        if name.startswith("__torch__."):  # a class of the program; the name is never imported
            allowed.append((_Module, name))
    buffer.seek(0)
    with torch.serialization.safe_globals(allowed):
        tensors = _tensors(torch.load(buffer, map_location="cpu", weights_only=True))
    if not tensors:
        told = f"{path} holds no weights by name: in a frozen program they are constants of its code"
        raise RadiotagError(told, f"save model.state_dict(), or the program before torch.jit.freeze; or {BY_ANSWERS}")
    return tensors


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
