"""The weights of TorchScript and torch.export archives, read without running, compiling or trusting anything else.

Both are zip files of a program and its tensors. The program is never looked at: a TorchScript archive is rewritten
without its code into what `torch.save` would have written and read with `weights_only=True`, its modules as bare
bundles of attributes; a torch.export archive lists its tensors in JSON. What comes out is the module's state dict.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radiotag import RadiotagError

# as in the schema of torch.export's archives; complex and 8-bit float weights are none that this package could use
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
WEIGHTS = "_weights_config.json"  # torch.export's since PyTorch 2.8
OLD_WEIGHTS = "serialized_state_dict.pt"  # and before


def is_program(names: Iterable[str]) -> bool:
    """Whether a zip file's entries are those of a TorchScript or torch.export archive."""
    return any(is_code(n) or n.endswith(("constants.pkl", "archive_format", WEIGHTS, OLD_WEIGHTS)) for n in names)


def is_code(name: str) -> bool:
    """Whether an entry is never read: TorchScript's code, all that is compressed in such archives."""
    return "/code/" in name


def read_program(path: Path) -> dict[str, Tensor]:
    """The state dict of an archive's module. Raises whatever a damaged or hostile one leads to, and runs none of it."""
    with zipfile.ZipFile(path) as archive:
        return _state(archive)


def _state(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    names = [name for name in archive.namelist() if not is_code(name)]
    for name in names:
        if name.rpartition("/")[2] == OLD_WEIGHTS:
            state = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
            return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    configs = [name for name in names if name.endswith(WEIGHTS)]
    if len(configs) > 1:
        raise RadiotagError(f"{archive.filename} holds several models", "export each into a file of its own")
    return _exported(archive, names, configs[0]) if configs else _scripted(archive, names)


def _exported(archive: zipfile.ZipFile, names: Sequence[str], config: str) -> dict[str, Tensor]:
    folder, records, state, there = config.rpartition("/")[0], dict[str, bytearray](), {}, set(names)
    for name, entry in json.loads(archive.read(config))["config"].items():
        path = f"{folder}/{entry['path_name']}"
        if path not in there:
            raise ValueError(f"it lacks {path}")
        if path not in records:  # tensors may share one
            records[path] = bytearray(archive.read(path))
        if entry["use_pickle"]:
            state[name] = torch.load(io.BytesIO(records[path]), map_location="cpu", weights_only=True)
        elif records[path]:
            meta = entry["tensor_meta"]
            flat = torch.frombuffer(records[path], dtype=DTYPES[meta["dtype"]])
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


def _scripted(archive: zipfile.ZipFile, names: Sequence[str]) -> dict[str, Tensor]:
    pickled = next(name for name in names if name.endswith("/data.pkl"))
    root, bare = pickled.removesuffix("data.pkl"), io.BytesIO()
    with zipfile.ZipFile(bare, "w") as copy:  # without constants.pkl and code, by which a program is known
        for name in names:
            inside = name.removeprefix(root)
            if inside in ("data.pkl", "version", "byteorder") or inside.startswith("data/"):
                copy.writestr(name, archive.read(name))
    known: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    known = [(_value, f"torch.jit._pickle.{hint}") for hint in HINTS]
    bare.seek(0)
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
        if id(bundle) in seen or not isinstance(bundle, _Module):
            continue
        seen.add(id(bundle))
        for name, value in getattr(bundle, "attributes", {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            else:
                open_.append((f"{prefix}{name}.", value))
    return found
