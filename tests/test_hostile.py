"""Files made to harm whoever reads them: they ask for gigabytes, for ever, or for a place outside."""

import collections
import contextlib
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from radiotag.answers import KEPT, read_answers
from radiotag.blackbox import QUERIES_FORMAT, OfAnotherKey, Queries, load_queries
from radiotag.errors import RadiotagError
from radiotag.images import png
from radiotag.keys import load_key, new_key
from radiotag.manifest import marked_rows, recorded_classes
from radiotag.networks import marking_weights, read_checkpoint
from radiotag.pairing import marked_classes
from radiotag.pickles import check_pickles
from radiotag.public import public_half, read_public
from radiotag.shards import list_shards

# ---------------------------------------------------------------- pickles, written by hand


def named(name):
    return b"c" + name.replace(" ", "\n", 1).encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def pair(*parts):
    return b"(" + b"".join(parts) + b"t"


def called(name, *arguments):
    return named(name) + pair(*arguments) + b"R"


def mapping(value, name="w"):
    return b"}" + text(name) + value + b"s"


def deep(value):
    return mapping(mapping(b"](" + mapping(pair(value)) + b"e"))


PART = b"@@"  # of another storage: None before PyTorch 1.6, absent since


def storage(count, kind="torch FloatStorage", key="0"):
    return pair(text("storage"), named(kind), text(key), text("cpu"), number(count) + PART) + b"Q"


def view(stored, sizes, strides=(1,)):
    return stored, number(0), pair(*map(number, sizes)), pair(*map(number, strides))


HOOKS = b"\x89" + called("collections OrderedDict")


def tensor(count, sizes, strides=(1,), kind="torch FloatStorage"):
    return called("torch._utils _rebuild_tensor_v2", *view(storage(count, kind), sizes, strides), HOOKS)


def before_1_6(content, keys=(), data=b""):
    start = (
        torch.serialization.MAGIC_NUMBER,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
    )
    head = b"".join(pickle.dumps(part, 2) for part in start)
    return head + b"\x80\x02" + content.replace(PART, b"N") + b"." + pickle.dumps(list(keys), 2) + data


def since_1_6(content, data=bytes(4)):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        parts = {"data.pkl": b"\x80\x02" + content.replace(PART, b"") + b".", "version": b"3\n", "data/0": data}
        for name, part in parts.items():
            file.writestr(f"a/{name}", part)
    return packed.getvalue()


MANY = 5 * 10**8
REPEATED = tensor(1, (MANY,), (0,))  # one number, said to be many
LAYOUT = called("torch.serialization _get_layout", text("torch.sparse_coo"))
SCALE = pair(named("torch per_tensor_affine"), b"G" + struct.pack(">d", 1.0), number(0))
HUNGRY = {
    "a storage": mapping(storage(MANY)),
    "a tensor": mapping(tensor(MANY, (MANY,))),
    "a tensor, deep inside": deep(tensor(MANY, (MANY,))),
    "a tensor beyond its storage": deep(tensor(1, (MANY,))),
    "an old class": deep(called("torch FloatTensor", number(MANY))),
    "a class": deep(named("torch Tensor") + pair(number(MANY)) + b"\x81"),
    "a list of arguments": deep(named("torch Tensor") + b"](" + number(MANY) + b"eR"),
    "a storage's class": deep(called("torch.storage UntypedStorage", number(MANY))),
    "a typed storage's class": deep(called("torch.storage TypedStorage", number(MANY))),
    "a copy of repetitions": deep(
        called("torch._utils _rebuild_device_tensor_from_cpu_tensor", REPEATED, named("torch float64"), text("cpu"))
    ),
    "a set of elements": deep(called("builtins set", REPEATED)),
    "elements as arguments": deep(named("builtins set") + REPEATED + b"R"),
    "pairs": deep(called("collections OrderedDict", tensor(1, (MANY, 2), (0, 0)))),
    "pairs in a list": deep(called("collections OrderedDict", b"](" + REPEATED + b"e")),
    "attributes": called("collections OrderedDict") + tensor(1, (MANY, 2), (0, 0)) + b"b",
    "an old state": deep(called("torch Tensor") + pair(*view(storage(1), (MANY,))) + b"b"),
    "a quantised tensor": deep(
        called("torch._utils _rebuild_qtensor", *view(storage(1, "torch QInt8Storage"), (MANY,)), SCALE, HOOKS)
    ),
    "a tensor with attributes": deep(
        called(
            "torch._tensor _rebuild_from_type_v2", named("torch._utils _rebuild_tensor_v2"), named("torch Tensor"),
            pair(*view(storage(1), (MANY,)), HOOKS), b"}",
        )
    ),
    "attributes of any call": deep(
        called("torch._tensor _rebuild_from_type_v2", named("torch Tensor"), named("torch Tensor"), pair(number(MANY)))
    ),
    "sparse": deep(
        called(
            "torch._utils _rebuild_sparse_tensor", LAYOUT,
            pair(tensor(1, (1, MANY), (0, 0), "torch LongStorage"), tensor(1, (MANY,), (0,)), pair(number(4))),
        )
    ),
}  # fmt: skip
REFUSED = r"m\.pt (unpacks to more than itself|holds a pickle that is more than weights|is not a whole file)"


@pytest.mark.parametrize("packed", [before_1_6, since_1_6])
@pytest.mark.parametrize("what", HUNGRY)
def test_a_file_asks_for_no_more_memory_than_it_has_bytes(what, packed, tmp_path):
    (tmp_path / "m.pt").write_bytes(packed(HUNGRY[what]))
    assert (tmp_path / "m.pt").stat().st_size < 1000
    with pytest.raises(RadiotagError, match=REFUSED):
        read_checkpoint(tmp_path / "m.pt")


def test_hungry_files_within_little_memory(tmp_path, forks):
    """A gigabyte is not even asked for: with 128 MB the same error comes."""
    for number, what in enumerate(HUNGRY):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(before_1_6(HUNGRY[what]))
        result = forks.run("keygen", "--network", path, "--classes", 3, "-o", tmp_path / "k", memory=2**27)
        assert result.code == 1
        assert "more than" in result.err or "not a whole file" in result.err
        assert "Traceback" not in result.err


def test_files_written_by_hand_are_read_otherwise(tmp_path):
    """The attacks differ from these by a number or a name alone."""
    numbers = struct.pack("<4f", *range(4))
    content = mapping(tensor(4, (2, 2), (2, 1)))
    with_attributes = called(
        "torch._tensor _rebuild_from_type_v2", named("torch._utils _rebuild_tensor_v2"), named("torch Tensor"),
        pair(*view(storage(4), (2, 2), (2, 1)), HOOKS), mapping(number(1), "detach"),
    )  # fmt: skip
    for data in (
        before_1_6(content, ["0"], struct.pack("<q", 4) + numbers), since_1_6(content, numbers),
        since_1_6(mapping(with_attributes), numbers),
        since_1_6(mapping(called("torch FloatTensor") + pair(*view(storage(4), (2, 2), (2, 1))) + b"b"), numbers),
    ):  # fmt: skip
        (tmp_path / "m.pt").write_bytes(data)
        assert read_checkpoint(tmp_path / "m.pt")[0]["w"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.filterwarnings("ignore")
def test_what_people_save_beside_weights_is_no_attack(tmp_path):
    sparse = torch.eye(3).to_sparse()
    subclass = torch.nn.Parameter(torch.ones(2))
    subclass.note = "kept"
    saved = {
        "w": torch.ones(3, 4), "t": torch.ones(3, 4).t(), "row": torch.ones(3, 4)[1], "none": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5), "half": torch.ones(2).half(), "wide": torch.ones(2, dtype=torch.uint16),
        "sparse": sparse, "rows": torch.eye(3).to_sparse_csr(), "meta": torch.ones(2, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "p": subclass,
        "size": torch.ones(2, 3).size(), "set": {1, 2}, "count": collections.Counter("aab"), "c": 1j, "b": b"\xff",
        "ordered": collections.OrderedDict(a=torch.ones(2)), "type": torch.float16, "device": torch.device("cpu"),
        "complex": torch.ones(2, dtype=torch.complex64), "lists": [[torch.ones(2)], (torch.ones(1), {"x": None})],
        "expanded": torch.ones(1).expand(5),
    }  # fmt: skip
    for new in (True, False):
        kept = {k: v for k, v in saved.items() if new or k != "wide"}
        torch.save(kept, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
        state, _ = read_checkpoint(tmp_path / "m.pt")
        assert {"w", "t", "row", "none", "scalar", "half", "p", "expanded"} <= set(state)
        assert torch.equal(state["t"], torch.ones(4, 3))


def test_storages_and_their_parts():
    part = pair(text("0"), number(2), number(2))
    stored = storage(4).replace(PART, part)
    check_pickles(
        io.BytesIO(b"\x80\x02" + called("torch._utils _rebuild_tensor_v2", *view(stored, (2,)), HOOKS) + b".")
    )
    for wrong in (number(3), number(-1)):
        bad = storage(4).replace(PART, pair(text("0"), wrong, number(2)))
        with pytest.raises(pickle.UnpicklingError):
            check_pickles(
                io.BytesIO(b"\x80\x02" + called("torch._utils _rebuild_tensor_v2", *view(bad, (2,)), HOOKS) + b".")
            )
    twice = b"\x80\x02" + pair(tensor(4, (4,)), tensor(9, (9,))).replace(PART, b"N") + b"."
    with pytest.raises(pickle.UnpicklingError, match="storage that is none"):
        check_pickles(io.BytesIO(twice))


# ---------------------------------------------------------------- answers


def queries_of(images, decoys=1):
    """Queries of two classes, without the images themselves."""
    names = tuple(tuple(f"{row}-{i}" for i in range(images)) for row in range(2 * (decoys + 1)))
    return Queries(images=(), rows=tuple(i % 2 for i in range(images)), labels=("ant", "bee") * images, names=names)


def every(queries):
    return [name for row in queries.names for name in row]


def test_labels_that_all_differ_take_memory_in_proportion(tmp_path):
    """20,000 different labels would fill 3 GB as a table."""
    queries = queries_of(5000)
    (tmp_path / "a.csv").write_text("file,label\n" + "".join(f"{n}.png,label{n}\n" for n in every(queries)))
    answers, _ = read_answers(tmp_path / "a.csv", queries)
    assert answers.shape == (4, 5000, KEPT)
    assert answers.numel() * 8 < 2e8
    assert float(answers.sum()) == KEPT  # the other labels are zeros


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_of_many_outputs_those_that_count_are_kept(kind, tmp_path):
    """Each class's usual answers are among those kept, and the kept columns are what a full table has there."""
    queries, count = queries_of(400), 3000
    labels = {
        n: (7 if int(n.split("-")[1]) % 2 else 2999) if i % 3 else i % count for i, n in enumerate(every(queries))
    }
    if kind == "labels":
        given = {n: f"c{label:04}" for n, label in labels.items()}
    else:
        given = {n: [float(i == label) for i in range(count)] for n, label in list(labels.items())[:900]}
    (tmp_path / "a.json").write_text(json.dumps(given))
    answers, _ = read_answers(tmp_path / "a.json", queries)
    assert answers.shape[-1] == (
        KEPT if kind == "numbers" or len(set(labels.values())) > KEPT else len(set(given.values()))
    )
    seen = answers.flatten(0, 1)
    rows = torch.tensor([i % 2 for i in range(400)] * 4)
    for row, share in ((0, 2 / 3), (1, 2 / 3)):
        means = seen[rows == row].nanmean(0)
        assert float(means.max()) == pytest.approx(share, abs=0.02)


def test_ordinary_answers_are_read_as_before(tmp_path):
    queries = queries_of(4)
    names = every(queries)[:-1]
    (tmp_path / "a.csv").write_text(
        "file,label\n" + "".join(f"sub/{n}.png,{'xyz'[i % 3]}\n" for i, n in enumerate(names))
    )
    answers, warnings = read_answers(tmp_path / "a.csv", queries)
    assert torch.equal(answers.flatten(0, 1)[:-1], torch.eye(3).double()[[i % 3 for i in range(len(names))]])
    assert bool(answers[-1, -1].isnan().all())
    assert warnings == ["1 of 16 exported images have no answer"]


HUGE = {
    "other names for each": lambda names: {n: {f"c{i}": 0.5} for i, n in enumerate(names)},
    "one long row": lambda names: {names[0]: [0.1] * 300_000, names[1]: [0.1]},
    "nested": lambda names: None,
    "a long number": lambda names: None,
    "twice in an answer": lambda names: None,
    "twice": lambda names: None,
    "twice by folder": lambda names: {f"{names[0]}.png": "x", f"sub/{names[0]}.png": "y"},
}  # fmt: skip
TEXTS = {
    "nested": "[" * 10**6, "a long number": '{"0-0": [1' + "0" * 10**6 + "]}",
    "twice in an answer": '{"0-0": {"a": 0.1, "a": 0.9}}', "twice": '{"0-0": "x", "0-0": "y"}',
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE)
def test_answers_that_are_refused(what, tmp_path):
    queries = queries_of(20_000)
    (tmp_path / "a.json").write_text(TEXTS.get(what) or json.dumps(HUGE[what](every(queries))))
    with pytest.raises(RadiotagError, match=r"a\.json"):
        read_answers(tmp_path / "a.json", queries)


def test_one_answer_of_many_numbers_among_many_questions(tmp_path):
    """The table has as many columns as are kept, whatever the file's only row has."""
    queries = queries_of(20_000)
    (tmp_path / "a.json").write_text(json.dumps({"0-0": [0.001] * 200_000}))
    assert read_answers(tmp_path / "a.json", queries)[0].shape == (4, 20_000, KEPT)


def test_a_header_of_many_columns_of_which_the_last_repeats(tmp_path):
    names = [f"c{i}" for i in range(200_000)]
    (tmp_path / "a.csv").write_text(",".join(["file", *names, names[-1]]))
    with pytest.raises(RadiotagError, match="two columns 'c199999'"):
        read_answers(tmp_path / "a.csv", queries_of(2))


# ---------------------------------------------------------------- manifests


ROW = {"path": "ant/0.png", "class": "ant", "row": 0, "status": "marked", "sha256_out": "00", "output": "ant/0.png"}
WRONG_ROWS = {
    "no status": {"status": None}, "another status": {"status": "kept"}, "no class": {"class": None},
    "no hash": {"sha256_out": None}, "no row": {"row": None}, "row -1": {"row": -1}, "row 0.5": {"row": 0.5},
    "row true": {"row": True}, "row as text": {"row": "0"}, "row beyond": {"row": 7}, "a class twice": {"row": 1},
    "a row twice": {"class": "cow"}, "a number for a class": {"class": 3}, "a list for a status": {"status": [1]},
    "elsewhere": {"output": "../../k"}, "from the root": {"path": "/etc/passwd"}, "quality": {"psnr": "good"},
}  # fmt: skip


def lines_of(key, *rows):
    return "".join(json.dumps(row) + "\n" for row in ({"radiotag": 1, "fingerprint": key.fingerprint}, *rows))


@pytest.fixture(scope="module")
def key():
    return new_key(*marking_weights("builtin"), ["ant", "bee", "cow"])


@pytest.mark.parametrize("rank", ["", ".rank1"])
@pytest.mark.parametrize("what", WRONG_ROWS)
def test_a_wrong_row_is_named_by_its_line(what, rank, key, tmp_path):
    row = {k: v for k, v in (ROW | {"path": "ant/1.png"} | WRONG_ROWS[what]).items() if v is not None}
    path = tmp_path / "m.jsonl"
    path.write_text(lines_of(key, ROW))
    before = [ROW] if not rank else []
    (tmp_path / f"m.jsonl{rank}").write_text(lines_of(key, *before, row))
    with pytest.raises(RadiotagError, match=rf"m\.jsonl{rank}, line {3 if not rank else 2}: "):
        marked_rows(path)
        marked_classes(key, path)


def test_journals_of_an_interrupted_run_are_read(key, tmp_path):
    (tmp_path / "m.jsonl").write_text(lines_of(key, ROW))
    bee = ROW | {"path": "bee/0.png", "class": "bee", "row": 1}
    torn = lines_of(key, bee, bee | {"status": "copied", "class": "cow", "row": 2}) + '{"path": "bee/1'
    (tmp_path / "m.jsonl.rank1").write_text(torn)
    assert marked_classes(key, tmp_path / "m.jsonl") == {"ant": 0, "bee": 1}
    assert recorded_classes(tmp_path / "m.jsonl") == {"ant": 0, "bee": 1, "cow": 2}


def test_a_line_that_names_a_thing_twice(key, tmp_path):
    (tmp_path / "m.jsonl").write_text(lines_of(key) + '{"path": "a", "row": 0, "row": 1}\n')
    with pytest.raises(RadiotagError, match=r"m\.jsonl is not a radiotag manifest: line 2: 'row' is there twice"):
        marked_rows(tmp_path / "m.jsonl")


# ---------------------------------------------------------------- shards


def shard(name, content=b"", kind=tarfile.REGTYPE, pax=None):
    """A shard with one image, one class, and one more member."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as tar:
        for member, data in (("0.png", PNG), ("0.cls", b"ant"), (name, content)):
            info = tarfile.TarInfo(member)
            info.size = len(data) if member != name or kind == tarfile.REGTYPE else 0
            if member == name:
                info.type, info.linkname, info.pax_headers = kind, "/etc/passwd", pax or {}
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def with_size(data, field):
    """The shard whose last member's header has another size."""
    start = data.rindex(b"1.png")
    block = (
        data[start : start + 124] + field + data[start + 136 : start + 148] + b" " * 8 + data[start + 156 : start + 512]
    )
    return data[:start] + block[:148] + b"%06o\0 " % sum(block) + block[156:] + data[start + 512 :]


PNG = png(np.zeros((8, 8, 3), np.uint8))
NO_IMAGES = {
    **{name: shard(name, PNG) for name in (".", "..", "/", "//", "", "./", "a/..", "a/", ".png", "..png", "...", "1.")},
    "a directory": shard("1.png", kind=tarfile.DIRTYPE), "a link": shard("1.png", kind=tarfile.SYMTYPE),
    "a hard link": shard("1.png", kind=tarfile.LNKTYPE), "a device": shard("1.png", kind=tarfile.CHRTYPE),
    "sparse name": shard("1.png", PNG, pax={"GNU.sparse.map": "0,1", "GNU.sparse.size": "1", "GNU.sparse.name": ".."}),
    "a pipe": shard("1.png", kind=tarfile.FIFOTYPE), "a block device": shard("1.png", kind=tarfile.BLKTYPE),
}  # fmt: skip
LEADS_ASTRAY = {
    **{name: shard(name, PNG) for name in ("/1.png", "../1.png", "a/../../1.png")},
    "nul": shard("x", PNG, pax={"path": "a\0b.png"}), "deep": shard("a/" * 10**5 + "1.png", PNG),
    "long": shard("a" * 10**6 + ".png", PNG), "sparse map": shard("1.png", PNG, pax={"GNU.sparse.map": "0,1,x"}),
    "sparse": shard("1.png", PNG, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "a size": shard("1.png", PNG, pax={"size": "-5"}),
    "huge": with_size(shard("1.png", PNG), b"\x80" + b"\xff" * 11),
    "beyond": with_size(shard("1.png", PNG), b"77777777777\0"),
    "below": with_size(shard("1.png", PNG), b"-0000000001\0"),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_IMAGES)
def test_members_that_are_no_images_are_passed_over(what, tmp_path):
    (tmp_path / "s.tar").write_bytes(NO_IMAGES[what])
    archive, listing = list_shards(tmp_path / "s.tar")
    assert list(archive.members) == ["s.tar/0.png"]
    assert listing.names == ["ant"]


@pytest.mark.parametrize("what", LEADS_ASTRAY)
def test_members_that_lead_astray_are_refused(what, tmp_path):
    (tmp_path / "s.tar").write_bytes(LEADS_ASTRAY[what])
    with pytest.raises(RadiotagError, match=r"s\.tar: (the member|not a tar file)") as error:
        list_shards(tmp_path / "s.tar")
    assert len(str(error.value)) < 1000


# ---------------------------------------------------------------- keys, public halves, queries


def key_file(path, key, change=None, text=None, tensors=None):
    """A key's file whose description differs."""
    weights = {f"network.{name}": value for name, value in key.weights.items()}
    weights["seed"] = torch.tensor(list(key.seed), dtype=torch.uint8)
    metadata = json.loads(json.dumps(key.metadata))
    if change:
        change(metadata)
    safetensors.torch.save_file(weights | (tensors or {}), path, {"radiotag": text or json.dumps(metadata)})
    path.chmod(0o600)
    return path


STRANGE = {
    "deep": "[" * 10**5, "deep objects": '{"a":' * 10**5 + "1" + "}" * 10**5,
    "digits": '{"format": ' + "9" * 10**5 + "}",
    "twice": '{"format": 2, "format": 1}', "a list": "[]", "a text": '"x"', "null": "null", "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
def test_keys_whose_description_is_none(what, key, tmp_path):
    with pytest.raises(RadiotagError, match=r"k\.safetensors is not a radiotag key"):
        load_key(key_file(tmp_path / "k.safetensors", key, text=STRANGE[what] or " "))


VALUES = (None, -1, 0, 1.5, 10**6, 10**30, True, "x", [], {}, [[1]], {"a": 1}, "9" * 1000, float("nan"))


@pytest.mark.parametrize(
    "name", ["format", "statistic", "network", "dimension", "classes", "class_names", "beacon", "created"]
)
def test_keys_of_wrong_types_are_refused(name, key, tmp_path):
    for value in VALUES:
        path = key_file(tmp_path / "k.safetensors", key, lambda metadata, value=value: metadata.update({name: value}))
        texts, empty = ("beacon", "created"), ("beacon", "class_names")
        if (name in texts and isinstance(value, str)) or (name in empty and value is None):
            load_key(path)
            continue
        with pytest.raises(RadiotagError, match=r"k\.safetensors"):
            load_key(path)


@pytest.mark.parametrize("field", ["architecture", "classes", "image_size", "mean", "std", "small_stem", "class_names"])
def test_networks_of_wrong_types_in_a_key(field, key, tmp_path):
    for value in VALUES:
        path = key_file(tmp_path / "k.safetensors", key, lambda m, value=value: m["network"].update({field: value}))
        with contextlib.suppress(RadiotagError):
            load_key(path)


def test_a_key_of_more_carriers_than_memory_holds_is_refused_at_once(key, tmp_path):
    """12 bytes of text would ask for gigabytes."""
    path = key_file(tmp_path / "k.safetensors", key, lambda m: m.update(classes=10**6, class_names=None))
    with pytest.raises(RadiotagError, match="too many"):
        load_key(path)
    with pytest.raises(RadiotagError, match="too many"):
        new_key(*marking_weights("builtin"), 10**6)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines, lines[1]], lambda lines: [*lines, "x"], lambda lines: ["x", *lines[1:]],
        lambda lines: [lines[0], "fingerprint: sha256:00"], lambda lines: [*lines, "carriers: " + "[" * 10**5],
        lambda lines: [*lines, 'carriers: {"a": -1}'], lambda lines: [*lines, 'carriers: {"a": 0, "a": 1}'],
        lambda lines: [*lines, "manifest: sha256:zz"], lambda lines: [*lines, *map("{0}: x".format, range(2000))],
    ],
)  # fmt: skip
def test_public_halves_that_are_none(change, key, tmp_path):
    lines = public_half(key).splitlines()
    (tmp_path / "k.pub").write_text("\n".join(change(lines)))
    with pytest.raises(RadiotagError, match=r"k\.pub is no public half"):
        read_public(tmp_path / "k.pub")


def test_a_class_s_name_may_hold_a_separator_of_lines(tmp_path):
    odd = new_key(*marking_weights("builtin"), ["a\u2028b", "c\x85: d"])
    (tmp_path / "k.pub").write_text(public_half(odd), encoding="utf-8")
    assert read_public(tmp_path / "k.pub").fingerprint == odd.fingerprint


def test_queries_of_wrong_types_are_damaged(key, tmp_path):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    path, good = tmp_path / "q.safetensors", {
        "format": QUERIES_FORMAT, "fingerprint": key.fingerprint, "rows": [0, 1], "labels": ["ant", "bee"], "decoys": 2
    }  # fmt: skip

    def load(metadata, images=(image, image)):
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        safetensors.torch.save_file({f"{i}": one.clone() for i, one in enumerate(images)}, path, {"radiotag": text})
        return load_queries(path, key)

    assert load(good).decoys == 2
    wrong = [
        good | {name: value}
        for name in ("rows", "labels", "decoys")
        for value in VALUES
        if (name, value) != ("decoys", 1)
    ]
    wrong += [good | {"rows": [0, value]} for value in (-1, 3, 0.0, True, None, "0")]
    wrong += [good | {"labels": ["ant", 1]}, good | {"labels": ["ant"]}, "[" * 10**5, "3", '{"format": 2, "format": 3}']
    for metadata in wrong:
        with pytest.raises(RadiotagError, match="is damaged"):
            load(metadata)
    for images in (
        (image,),
        (image, image.float()),
        (image, image[0]),
        (image, torch.zeros(3, 2000, 8, dtype=torch.uint8)),
    ):
        with pytest.raises(RadiotagError, match="is damaged"):
            load(good, images)
    for name in ("format", "fingerprint"):
        with pytest.raises(OfAnotherKey):
            load(good | {name: [[]]})


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("imgs/cat/0.png", "imgs/dog/1.png"), {"cat", "dog"}), (("train/cat/0.png", "val/cat/1.png"), {"cat"}),
        (("cat/0.png", "dog/1.png"), {"cat", "dog"}), (("cat/0.png",), {"cat"}), (("0.png",), {""}),
    ],
)  # fmt: skip
def test_the_class_of_a_member_is_the_folder_below_a_lone_root(names, classes, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
    _, listing = list_shards(tmp_path / "s.tar")
    assert {item.label for item in listing.items} == classes


@pytest.mark.parametrize(
    ("members", "classes", "left"),
    [
        ({"0.png": "", "0.CLS": "3", "1.png": "", "1.cls": "\ufeff007\n"}, {"0.png": "3", "1.png": "7"}, 0),
        ({"a/0.png": "", "a/0.cls": "1", "a/1.png": ""}, {"a/0.png": "1"}, 1),
        ({"0.png": "", "0.cls": "-1", "1.png": "", "1.cls": "0"}, {"1.png": "0"}, 1),
        (
            {"0.png": "", "0.json": '{"label": 2}', "1.png": "", "1.json": '{"label": "cat"}'},
            {"0.png": "2", "1.png": "cat"}, 0,
        ),
        (
            {"0.png": "", "0.json": '{"caption": "x"}', "1.png": "", "1.json": "[" * 10**5},
            {"0.png": "", "1.png": ""}, 0,
        ),
    ],
)  # fmt: skip
def test_classes_as_samples_tell_them(members, classes, left, tmp_path):
    """Numbers are read leniently; a sample without a class is left out, and shifts no other's carrier."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    archive, listing = list_shards(tmp_path / "s.tar")
    assert {item.path.relative_to("s.tar").as_posix(): item.label for item in listing.items} == classes
    assert archive.unmarked["images without a class"] == left
