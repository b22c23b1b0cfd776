"""Weights out of TorchScript and torch.export archives, of which nothing is run."""

import codecs
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
import torchvision
from helpers import Bomb
from torch import nn

from radiotag.errors import RadiotagError
from radiotag.networks import load_network, read_checkpoint
from radiotag.pickles import check_pickles
from radiotag.programs import _Module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
KINDS = ("scripted", "traced", "exported", "exported before 2.8")
EXAMPLE = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    """Two names for one weight, a view of another, a list of layers, a buffer of whole numbers, and half precision."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).half()
        self.a.bias = nn.Parameter(self.a.weight.detach()[1])
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))])
        self.layers[0].weight = self.a.weight
        self.register_buffer("count", torch.tensor([3, 4]))
        self.sizes = [1, 2]  # an attribute that is none of the weights

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.b(self.a(x).half()).float() + self.count[0] + self.sizes[1]


def archived(module, path, kind, example=EXAMPLE):
    if kind == "exported":
        torch.export.save(torch.export.export(module, (example,)), path)
    elif kind == "exported before 2.8":
        state = io.BytesIO()
        torch.save(module.state_dict(), state)
        rewritten(path, {"serialized_state_dict.pt": state.getvalue(), "serialized_exported_program.json": b"{}"})
    else:
        torch.jit.save(torch.jit.script(module) if kind == "scripted" else torch.jit.trace(module, example), path)
    return path


def rewritten(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def entries(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def network(name="resnet18"):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=5).eval()


def same(found, state):
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value.float() if value.is_floating_point() else value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_the_weights_of_a_program_are_its_modules(name, kind, tmp_path):
    module = network(name)
    path = archived(module, tmp_path / "m.pt", kind)
    same(read_checkpoint(path)[0], module.state_dict())
    read = load_network(path, image_size=64)
    assert (read.spec.architecture, read.spec.classes, read.spec.image_size) == (name, 5, 64)
    same(read.module.state_dict(), module.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_shared_weights_views_lists_and_other_types(kind, tmp_path):
    module = Tied().eval()
    same(read_checkpoint(archived(module, tmp_path / "m.pt", kind, torch.ones(1, 4)))[0], module.state_dict())


@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_the_program_itself_is_never_looked_at(kind, tmp_path):
    module = network()
    parts = entries(archived(module, tmp_path / "m.pt", kind))
    program = [n for n in parts if "/code/" in n or n.endswith(("constants.pkl", "/models/model.json"))]
    assert program
    path = rewritten(tmp_path / "m.pt", {n: b"not a program" if n in program else data for n, data in parts.items()})
    same(read_checkpoint(path)[0], module.state_dict())


@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_what_is_not_counted_is_not_read_either(kind, tmp_path):
    """Code is compressed, and unpacks to more than itself: nothing else may hide there."""
    parts = entries(archived(network(), tmp_path / "m.pt", kind))
    hidden = next(n for n in parts if n.endswith(("/data/0", "/weight_0")))
    folder, _, last = hidden.rpartition("/")
    moved = f"{folder}/code/{last}"
    parts = {moved if n == hidden else n: data for n, data in parts.items()}
    for name in [n for n in parts if n.endswith("_weights_config.json")]:
        parts[name] = parts[name].replace(b'"weight_0"', b'"code/weight_0"')
    with pytest.raises(RadiotagError, match=r"m\.pt is not a whole file"):
        load_network(rewritten(tmp_path / "m.pt", parts))
    read = f"{folder}/other" if kind == "scripted" else next(n for n in parts if n.endswith("_weights_config.json"))
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        for name, data in {**parts, read: bytes(10**7)}.items():
            file.writestr(name, data, zipfile.ZIP_DEFLATED if name == read else zipfile.ZIP_STORED)
    with pytest.raises(RadiotagError, match="unpacks to more than itself"):
        load_network(tmp_path / "m.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_inside_is_never_run(kind, tmp_path):
    target, saved = tmp_path / "created", io.BytesIO()
    torch.save({"a": Bomb(target)}, saved)
    parts = entries(archived(network(), tmp_path / "m.pt", kind))
    if kind == "exported":
        name = next(n for n in parts if n.endswith("_weights_config.json"))
        config = json.loads(parts[name])
        first = next(iter(config["config"].values()))
        first["use_pickle"] = True
        parts[name] = json.dumps(config).encode()
        parts[f"{name.rpartition('/')[0]}/{first['path_name']}"] = saved.getvalue()
    elif kind == "exported before 2.8":
        parts["serialized_state_dict.pt"] = saved.getvalue()
    else:
        name = next(n for n in parts if n.endswith("/data.pkl"))
        parts[name] = pickle.dumps(Bomb(target), protocol=2)
    with pytest.raises(RadiotagError, match=r"m\.pt (holds no weights|holds a pickle|is not a whole file)"):
        load_network(rewritten(tmp_path / "m.pt", parts))
    assert not target.exists()


def test_an_object_of_a_program_takes_no_method_from_the_file():
    bundle = _Module()
    bundle.__setstate__({"__setstate__": print})
    with pytest.raises(AttributeError):
        bundle.__setstate__ = print
    bundle.__setstate__((1, {"a": 2}))
    assert bundle.attributes == {}


def exported_with(path, change):
    parts = entries(archived(Tied().eval(), path, "exported", torch.ones(1, 4)))
    name = next(n for n in parts if n.endswith("_weights_config.json"))
    config = json.loads(parts[name])
    change(config["config"]["layers.1.0.weight"])
    return rewritten(path, parts | {name: json.dumps(config).encode()})


@pytest.mark.parametrize(
    "claim",
    [
        {"sizes": [{"as_int": 4}, {"as_int": 5}], "strides": [{"as_int": 5}, {"as_int": 1}]},
        {"storage_offset": {"as_int": 1}}, {"storage_offset": {"as_int": -1}}, {"strides": [{"as_int": -4}] * 2},
        {"dtype": 8}, {"dtype": 99}, {"sizes": [{"as_expr": "s0"}]}, {"sizes": 3},
    ],
)  # fmt: skip
def test_claims_that_go_beyond_what_is_stored_are_refused(claim, tmp_path):
    with pytest.raises(RadiotagError, match=r"m\.pt2 is (not a whole file|a zip archive without)"):
        load_network(exported_with(tmp_path / "m.pt2", lambda entry: entry["tensor_meta"].update(claim)))


def test_tensors_that_only_claim_to_be_large_are_refused(tmp_path):
    claim = {"sizes": [{"as_int": 10**12}, {"as_int": 1}], "strides": [{"as_int": 0}] * 2}
    with pytest.raises(RadiotagError, match="larger than what is stored"):
        load_network(exported_with(tmp_path / "m.pt2", lambda entry: entry["tensor_meta"].update(claim)))


def test_a_missing_record_is_a_damaged_file(tmp_path):
    with pytest.raises(RadiotagError, match=r"m\.pt2 is (not a whole file|a zip archive without)"):
        load_network(exported_with(tmp_path / "m.pt2", lambda entry: entry.update(path_name="../../etc/passwd")))


def test_several_models_in_one_archive_are_refused(tmp_path):
    parts = {f"m/data/weights/{name}_weights_config.json": b'{"config": {}}' for name in "ab"}
    with pytest.raises(RadiotagError, match=r"m\.pt2 holds several models"):
        load_network(rewritten(tmp_path / "m.pt2", parts))


def test_a_frozen_program_holds_no_weights_by_name(tmp_path):
    torch.jit.save(torch.jit.freeze(torch.jit.script(network())), tmp_path / "m.pt")
    with pytest.raises(RadiotagError, match=r"m\.pt holds no weights") as error:
        load_network(tmp_path / "m.pt")
    assert "state_dict" in error.value.hint


def zipped(entries, **how):
    """A zip file's bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", **how) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return packed.getvalue()


def weights(count=10**6):
    """What torch.save writes of one tensor of zeros: records and bytes."""
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(count)}, saved)
    with zipfile.ZipFile(saved) as file:
        return {name: file.read(name) for name in file.namelist()}


def claiming(data, size, claimed):
    """The same zip file, whose records of `size` bytes say that they unpack to fewer."""
    assert data.count(struct.pack("<I", size))
    return data.replace(struct.pack("<I", size), struct.pack("<I", claimed))


def two_directories(entries, directory):
    """A zip file of which Python's reader and PyTorch's, by its absolute offset, see different directories."""
    data = zipped(entries, compression=zipfile.ZIP_DEFLATED)
    end = data.rfind(b"PK\5\6")
    size, place = struct.unpack("<II", data[end + 12 : end + 20])
    return data[:end] + directory(data[place : place + size]) + data[end:]


def often(entries, times):
    """An entry's name given to empty ones before it: the last one counts, each time."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in entries.items():
            small = data[:10] if name.endswith("data/0") else data
            for _ in range(times if name.endswith("data/0") else 0):
                file.writestr(name, b"")
            file.writestr(name, small)
    return packed.getvalue()


class Call:
    """Unpickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def pickled_call(*call, new=True):
    packed = io.BytesIO()
    torch.save({"w": Call(*call)}, packed, _use_new_zipfile_serialization=new)
    return packed.getvalue()


SIZE = 4 * 10**6
HIDING = {
    "a lie": lambda: claiming(zipped(weights(), compression=zipfile.ZIP_DEFLATED), SIZE, 16),
    "a lie, bzip2": lambda: claiming(zipped(weights(), compression=zipfile.ZIP_BZIP2), SIZE, 16),
    "within": lambda: zipped({"serialized_state_dict.pt": zipped(weights(), compression=zipfile.ZIP_DEFLATED)}),
    "within an entry": lambda: zipped(
        {
            "m/data/weights/a_weights_config.json": json.dumps(
                {"config": {"w": {"path_name": "w", "use_pickle": True, "tensor_meta": None}}}
            ),
            "m/data/weights/w": zipped(weights(), compression=zipfile.ZIP_DEFLATED),
        }
    ),
    "one name often": lambda: often(weights(), 20),
    "a tensor of any size": lambda: pickled_call(torch.FloatTensor, 10**7),
    "a tensor of any size, before 1.6": lambda: pickled_call(torch.FloatTensor, 10**7, new=False),
    "two directories": lambda: two_directories(weights(), lambda d: claiming(d, SIZE, 16)),
}


@pytest.mark.parametrize("how", HIDING)
def test_nothing_packed_is_unpacked_wherever_it_hides(how, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(HIDING[how]())
    assert path.stat().st_size < SIZE / 10
    with pytest.raises(RadiotagError, match=r"m\.pt unpacks to more than itself"):
        read_checkpoint(path)


def test_archives_are_not_nested_deeper_than_they_come(tmp_path):
    data = zipped(weights(10))
    for _ in range(3):
        data = zipped({"serialized_state_dict.pt": data})
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(RadiotagError, match=r"m\.pt2 is (not a whole file|a zip archive without)"):
        read_checkpoint(tmp_path / "m.pt2")


def test_what_is_never_read_may_be_packed(tmp_path):
    """As the notes for a debugger are, in TorchScript for phones."""
    path = archived(Tied().eval(), tmp_path / "m.pt", "scripted")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/callstack_debug_map.pkl", bytes(10**6))
    same(read_checkpoint(path)[0], Tied().state_dict() | torch.jit.load(path).state_dict())


def test_an_entry_pickled_apart_is_read_once(tmp_path):
    """A torch.export archive may pickle a tensor, and name it often."""
    entry = {"path_name": "w", "use_pickle": True, "tensor_meta": None}
    saved = io.BytesIO()
    torch.save(torch.arange(3.0), saved)
    config = json.dumps({"config": {f"w{i}": entry for i in range(3)}})
    folder = "m/data/weights"
    path = rewritten(tmp_path / "m.pt2", {f"{folder}/a_weights_config.json": config, f"{folder}/w": saved.getvalue()})
    state, _ = read_checkpoint(path)
    assert set(state) == {"w0", "w1", "w2"}
    assert all(torch.equal(value, torch.arange(3.0)) for value in state.values())
    assert len({value.data_ptr() for value in state.values()}) == 1


@pytest.mark.parametrize("new", [True, False])
def test_an_array_of_any_size_is_no_weight(new, tmp_path):
    torch.save(
        {"w": torch.zeros(3), "x": Call(bytearray, 10**8)}, tmp_path / "m.pt", _use_new_zipfile_serialization=new
    )
    assert len(torch.load(tmp_path / "m.pt", weights_only=True)["x"]) == 10**8  # PyTorch lets it in
    with pytest.raises(RadiotagError, match=r"m\.pt holds a pickle that is more than weights; it was not run"):
        read_checkpoint(tmp_path / "m.pt")


def doubled(times):
    """A tuple of two that are one, and so on: each level takes a few bytes, and hashing the last one 2^times steps."""
    nested = ("x",)
    for _ in range(times):
        nested = (nested, nested)
    return nested


def wide(times):
    nested = ("x",)
    for _ in range(times):
        nested = (nested,) * 1000
    return nested


MANY = [(doubled(12), 1)] * 10
BOMBS = {
    "deep": lambda: Call(OrderedDict, [(doubled(60), 1)]),
    "wide": lambda: Call(OrderedDict, [(wide(3), 1)]),
    "many": lambda: Call(OrderedDict, [(doubled(20), n) for n in range(200)]),
    "one hash": lambda: dict.fromkeys(n * (2**61 - 1) for n in range(1, 3000)),
    "encoded": lambda: Call(codecs.encode, Call(codecs.encode, "ab", "hex"), "hex"),
    "a list, named before it is filled, in many": lambda: [Call(OrderedDict, MANY) for _ in range(2000)],
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("bomb", BOMBS)
def test_tuples_that_would_take_for_ever_to_hash_are_refused(bomb, new, tmp_path):
    torch.save({"w": torch.zeros(3), "x": BOMBS[bomb]()}, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    assert (tmp_path / "m.pt").stat().st_size < 200_000
    with pytest.raises(RadiotagError, match=r"m\.pt holds a pickle that is more than weights; it was not run"):
        read_checkpoint(tmp_path / "m.pt")


def test_a_list_filled_after_its_holder_was_measured_is_refused():
    late = b"\x80\x02]q\x00\x85q\x010h\x00(K\x01K\x02e."
    assert pickle.loads(late) == [1, 2]
    with pytest.raises(pickle.UnpicklingError, match="APPENDS"):
        check_pickles(io.BytesIO(late))
    whole = [1, 2]
    check_pickles(io.BytesIO(pickle.dumps([whole, (whole,), whole], 2)))


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_a_protocol_that_weights_do_not_come_in(protocol, tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt", pickle_protocol=protocol)
    with pytest.raises(RadiotagError, match="holds a pickle that is more than weights"):
        read_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("new", [True, False])
def test_what_training_leaves_beside_the_weights_is_read(new, tmp_path):
    betas, history = (0.9, 0.999), [float(n) for n in range(300_000)]
    groups = [{"betas": betas, "params": [n]} for n in range(2000)]
    saved = {"model": {"w": torch.ones(3)}, "optimiser": {"param_groups": groups}, "losses": history}
    saved |= {"seed": 2**64 - 59, "random state": b"\0\xff" * 2500}
    torch.save(saved, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    state, _ = read_checkpoint(tmp_path / "m.pt")
    assert torch.equal(state["w"], torch.ones(3))
