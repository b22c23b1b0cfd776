"""Objects of unknown classes in a pickle are read, and nothing of them is imported, called or trusted."""

import argparse
import io
import pickle
import pickletools
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import Bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from radiotag.errors import RadiotagError
from radiotag.inert import Inert, _Unpickler, load_inert, module_state
from radiotag.networks import read_checkpoint
from radiotag.pickles import REAL, check_pickles, is_real

DANGEROUS = (
    "os system", "posix system", "nt system", "builtins eval", "__builtin__ exec", "builtins getattr",
    "builtins open", "subprocess Popen", "torch load", "torch.storage _load_from_bytes", "torch.hub load",
    "torch.jit load", "torch.serialization load", "torch.utils.cpp_extension load", "pickle loads", "_pickle loads",
    "importlib import_module", "functools partial", "operator attrgetter", "copyreg _reconstructor", "runpy run_path",
    "codecs decode", "numpy.core.multiarray _reconstruct", "torch._tensor _reduce_ex_internal", "torch ops",
    "torch classes", "torch.storage TypedStorage", "torch from_file", "torch UntypedStorage.from_file",
    "torch Tensor.backward", "torch._C PyTorchFileReader", "collections namedtuple", "builtins bytearray",
    "collections OrderedDict.fromkeys",
)  # fmt: skip


def call(name: str, *arguments: str) -> bytes:
    """A pickle that calls a function with texts."""
    module, _, function = name.partition(" ")
    given = b"".join(pickle.BINUNICODE + len(a.encode()).to_bytes(4, "little") + a.encode() for a in arguments)
    return b"\x80\x02" + f"c{module}\n{function}\n".encode() + b"(" + given + b"tR."


@pytest.mark.parametrize("name", DANGEROUS)
def test_no_function_that_a_pickle_names_is_called(name, tmp_path):
    """Whatever it is, nothing comes of it but an object that does nothing, or a refusal."""
    target, before = tmp_path / "created", set(sys.modules)
    data = call(name, f"touch {target}", "w")
    try:
        check_pickles(io.BytesIO(data))
        found = _Unpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, AttributeError, TypeError, RuntimeError):
        return
    assert type(found) is Inert and found.parts == [f"touch {target}", "w"]
    assert not target.exists() and set(sys.modules) == before


def test_what_is_real_are_functions_of_tensors_and_containers_alone():
    for name in REAL:
        assert name.split()[0].split(".")[0] in {"torch", "collections", "builtins", "__builtin__", "_codecs"}
    assert not any(is_real(name) for name in DANGEROUS if not name.endswith("Storage"))
    assert all(is_real(f"torch {name}") for name in ("float16", "FloatStorage", "FloatTensor", "strided", "Size"))


def test_a_function_reached_by_another_operation_is_not_called_either(tmp_path):
    """INST and OBJ call a class, too; weights come without them."""
    marker = tmp_path / "created"
    for data in (
        b"(X" + len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode() + b"ios\nsystem\n.",
        b"(cos\nsystem\nX" + len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode() + b"o.",
    ):
        with pytest.raises(Exception):  # noqa: B017 (of any type: a missing operation)
            _Unpickler(io.BytesIO(data)).load()
        assert not marker.exists()


WATCHED, SEEN = set[str](), list[str]()


def watch(event: str, arguments: tuple) -> None:
    """Python tells of whatever reaches beyond its own memory."""
    if WATCHED and event.startswith(("os.", "subprocess.", "socket.", "exec", "compile", "import", "open", "shutil.")):
        SEEN.append(f"{event} {arguments}")


sys.addaudithook(watch)


def rewritten(data: bytes) -> io.BytesIO:
    """A file of torch.save with another pickle."""
    buffer, copy = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    copy.seek(0)
    return copy


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pickles_put_together_at_random_are_read_as_inert_or_refused(data):
    """Operations that call, fill and build, in any order, upon names that do harm."""
    codes = [code for code in pickletools.opcodes if code.proto <= 3 and code.arg is None and code.name != "STOP"]
    written = b"\x80\x02"
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            module, _, function = data.draw(st.sampled_from(DANGEROUS)).partition(" ")
            written += f"c{module}\n{function}\n".encode()
        else:
            written += data.draw(st.sampled_from(codes)).code.encode("latin-1")
    written += b"."
    try:
        check_pickles(io.BytesIO(written))
        file = rewritten(written)
        WATCHED.add("now")
        load_inert(file)
    except Exception:
        pass
    finally:
        WATCHED.discard("now")
    assert not SEEN


def test_modules_that_hold_one_another_have_an_end(tmp_path):
    first, second = nn.Module(), nn.Module()
    first._modules |= {"a": second, "b": second}
    second._modules |= {"a": first, "b": first}
    torch.save(first, tmp_path / "m.pt")
    with pytest.raises(RadiotagError, match=r"m\.pt holds a pickle that is more than weights"):
        read_checkpoint(tmp_path / "m.pt")


def test_a_module_of_a_class_that_is_gone_gives_its_state_dict(tmp_path):
    class Gone(nn.Sequential):
        pass

    module = Gone(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module.tied = module[2]
    Gone.__module__, Gone.__qualname__ = "nowhere", "Gone"
    sys.modules["nowhere"] = types.SimpleNamespace(Gone=Gone)
    arguments = argparse.Namespace(out=Path("/x"), bomb=Bomb(tmp_path / "made"))
    torch.save({"net": module, "args": arguments}, tmp_path / "m.pt")
    del sys.modules["nowhere"]
    state, _ = read_checkpoint(tmp_path / "m.pt")
    assert list(state) == list(module.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not (tmp_path / "made").exists() and "nowhere" not in sys.modules
    assert module_state(Inert()) is None
