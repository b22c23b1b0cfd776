"""Marking of tar shards and by several processes, its manifest, and what goes wrong on the way.

Most cases call `cli.main` in this process. What is to be killed, to meet a limit of the system or to mark beside others
is forked from a process that has imported torch already (`Forks`); a few start PyTorch's launcher.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from helpers import (
    Result,
    brute_ssim,
    call,
    environment,
    leftovers,
    measured_psnr,
    pixels,
    png_chunk,
    tree,
    wait_for_files,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models import get_model

from radiotag import images, manifest
from radiotag.errors import RadiotagError
from radiotag.keys import load_key
from radiotag.marking_run import prefetch, run
from radiotag.networks import Spec, save_checkpoint
from radiotag.plan import MarkOptions, make_plan

SUFFIXES = (".jpg", ".png")
SMALL = "shufflenet_v2_x0_5"
GNU, PAX, USTAR = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT

# ---------------------------------------------------------------- running


def command(source, key, output, *more):
    """The fastest possible marking."""
    return ("mark", source, "--key", key, "-o", output, "--steps", 1, *more)


def mark(*arguments):
    return call(*command(*arguments))


def good(*arguments):
    result = mark(*arguments)
    assert result.code == 0, result.err
    return result


def errors(*results):
    return [line for result in results for line in result.err.splitlines() if line.startswith("error: ")]


def one_error(*results):
    """The message of an expected failure: one error with a hint."""
    (message,) = errors(*results)
    text = "".join(result.err for result in results)
    assert all(result.code in (1, -signal.SIGKILL) for result in results), results
    assert "should not happen" not in message, text
    assert "Traceback" not in text
    return message


def launch(*arguments):
    """PyTorch's launcher with two processes, which has a group of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "radiotag", *map(str, arguments)],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def launched(*arguments):
    process = launch(*arguments)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Result(process.returncode, out, err)


# ---------------------------------------------------------------- what the tests work on


def photo(seed, format="PNG", side=32):
    """An image file with structure and no two alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()  # of a JPEG of the usual quality, writing it again alone would cost more than the PSNR allows
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    image.save(file, format, **({"quality": 90, "subsampling": 0} if format == "JPEG" else {}))
    return file.getvalue()


def noise(seed, side):
    """A PNG file of more than 3·side² bytes."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path, members, format=PAX):
    """Write a shard with headers in which every field says something; no data: a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for i, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.mtime, info.mode, info.uid, info.gid = 1_500_000_000 + i, 0o640 + i % 8, 1200 + i, 3400 + i
            info.uname, info.gname, info.type = f"user{i}", f"group{i}", tarfile.REGTYPE
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    os.utime(path, ns=(10**18, 10**18 + 7))
    return path


@dataclass
class Member:
    name: str
    header: dict  # all that it says, but for the size
    blocks: bytes  # all blocks of it, but for the size and the checksum
    data: bytes | None

    @property
    def path(self):
        """Its name in a manifest, after that of the shard."""
        return PurePosixPath(self.name).as_posix()


def members_of(shard):
    """Every member, in order, as Python's own library reads it."""
    raw, found = shard.read_bytes(), []
    with tarfile.open(shard) as tar:
        for info in tar.getmembers():
            said = info.get_info() | {"pax": info.pax_headers}
            header = {name: value for name, value in said.items() if name not in ("size", "chksum")}
            start = info.offset_data - 512
            last = raw[start : start + 124] + raw[start + 136 : start + 148] + raw[start + 156 : start + 512]
            file = tar.extractfile(info) if info.isreg() else None
            found.append(Member(info.name, header, raw[info.offset : start] + last, file and file.read()))
    return found


def images_in(shard):
    return {m.path: m.data for m in members_of(shard) if m.path.endswith(SUFFIXES)}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def stamps(folder):
    """For every file and folder, the properties that change if it is written again."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (folder, *folder.rglob("*"))}


def rows_of(path):
    """The rows of a manifest, by path, in their order."""
    header, *rows = map(json.loads, path.read_text().splitlines())
    assert header["radiotag"] == 1
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def finished(folder):
    """Number of images that a manifest and its journals record as done."""
    lines = [line for path in folder.glob("*.manifest.jsonl*") for line in path.read_bytes().split(b"\n")[1:-1]]
    return len({row["path"] for row in map(json.loads, lines) if row["status"] != "chosen"})


NUMBERS = [
    *(("./000000.jpg", photo(0, "JPEG")), ("./000000.cls", b"0"), ("./000000.json", b'{"caption": "a"}')),
    *(("./000001.cls", b"2\n"), ("./000001.jpg", photo(1, "JPEG"))),
    *(("./000002.jpg", photo(2, "JPEG")), ("./000002.cls", b"0")),
    *(("./000003.jpg", photo(3, "JPEG")), ("./000003.cls", b"0"), ("./000003.txt", b"")),
]
NAMED = [
    *(("ant", None), ("ant/a0.png", photo(4)), ("ant/a1.png", photo(5)), ("bee", None), ("bee/b0.png", photo(6))),
    *(("bee/b1.png", photo(7, side=40)), ("bee/notes.npy", b"notes"), ("bee/b1.jpg.bak", b"no image"), ("empty", b"")),
]
NAMED_IMAGES = [name for name, _ in NAMED if name.endswith(SUFFIXES)]
CLASSES = {
    **{f"numbers.tar/00000{i}.jpg": label for i, label in enumerate("0200")},
    **{f"words.tar/{c}/{c[0]}{i}.png": c for c in ("ant", "bee") for i in range(2)},
}


@dataclass(frozen=True)
class World:
    key: Path  # counts 8 classes
    shards: Path  # two shards and another file
    single: Path  # one shard
    folder: Path  # 8 images in 2 classes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    # A small marking network, for the files are what is tested here.
    spec = Spec(architecture=SMALL, classes=2, small_stem=False, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.manual_seed(0)
    save_checkpoint(root / "small.pt", get_model(SMALL, num_classes=2), spec)
    made = call("keygen", "-o", root / "k.safetensors", "--classes", 8, "--network", root / "small.pt")
    assert made.code == 0, made.err
    pack(root / "shards" / "numbers.tar", NUMBERS)
    pack(root / "shards" / "words.tar", NAMED, GNU)
    (root / "shards" / "README").write_text("read me")
    single = pack(root / "single.tar", NUMBERS)
    folder = write_folder(root / "folder", {f"{'ab'[i % 2]}/{i}.png": photo(10 + i) for i in range(8)})
    return World(root / "k.safetensors", root / "shards", single, folder)


@pytest.fixture(scope="module")
def marked(world, tmp_path_factory):
    """The folder in which half of both shards was marked, and the output of the run."""
    root = tmp_path_factory.mktemp("marked")
    return root, good(world.shards, world.key, root / "out", "--fraction", 0.5, "--json").json


# ---------------------------------------------------------------- shards


def test_all_but_the_marked_members_of_a_shard_stay_as_they_were(world, marked):
    root, answer = marked
    rows = rows_of(root / "out.manifest.jsonl")
    assert (answer["images"], answer["marked"], answer["copied"], answer["failed"]) == (8, 5, 3, [])
    assert sorted(p.name for p in root.iterdir()) == ["out", "out.manifest.jsonl", "out.pub"]
    assert sorted(p.name for p in (root / "out").iterdir()) == ["README", "numbers.tar", "words.tar"]
    seen = 0
    for name in ("numbers.tar", "words.tar"):
        source, output = world.shards / name, root / "out" / name
        before, after = members_of(source), members_of(output)
        assert [(m.name, m.header, m.blocks) for m in before] == [(m.name, m.header, m.blocks) for m in after]
        for old, new in zip(before, after, strict=True):
            row = rows.get(f"{name}/{old.path}")
            assert (row is not None) == old.path.endswith(SUFFIXES)
            if row is None or row["status"] == "copied":
                assert old.data == new.data
            else:
                assert old.data != new.data
                assert pixels(old.data).shape == pixels(new.data).shape
                assert 34 <= measured_psnr(old.data, new.data) < 60
                seen += 1
        assert output.stat().st_mtime_ns == source.stat().st_mtime_ns
    assert seen == 5


def test_the_padding_after_every_member_and_the_end_are_blocks_of_zeros(marked):
    for name in ("numbers.tar", "words.tar"):
        raw = (marked[0] / "out" / name).read_bytes()
        assert len(raw) % 512 == 0
        with tarfile.open(marked[0] / "out" / name) as tar:
            ends = [info.offset_data + info.size for info in tar.getmembers()]
        assert all(set(raw[end : -(-end // 512) * 512]) <= {0} for end in ends)
        assert raw[-(-ends[-1] // 512) * 512 :].strip(b"\0") == b""
        assert len(raw) - ends[-1] >= 1024


def test_the_manifest_tells_of_each_member_what_came_in_and_what_went_out(world, marked):
    root, _ = marked
    rows = rows_of(root / "out.manifest.jsonl")
    assert list(rows) == list(CLASSES)
    for path, row in rows.items():
        shard, member = path.split("/", 1)
        before, after = images_in(world.shards / shard)[member], images_in(root / "out" / shard)[member]
        assert (row["sha256_in"], row["sha256_out"]) == (sha256(before), sha256(after))
        assert (row["class"], row["row"]) == (CLASSES[path], ["0", "2", "ant", "bee"].index(CLASSES[path]))
        if row["status"] == "marked":
            assert row["psnr"] == pytest.approx(measured_psnr(before, after), abs=1e-3)


def test_the_fraction_holds_in_each_class_of_the_shards(marked):
    rows = rows_of(marked[0] / "out.manifest.jsonl").values()
    counts = {label: sum(r["class"] == label and r["status"] == "marked" for r in rows) for label in CLASSES.values()}
    assert counts == {"0": 2, "2": 1, "ant": 1, "bee": 1}


def run_again(world, marked, tmp_path, damage=lambda _: None):
    """Copy what was marked, damage the copy, run again; what was there before the damage, and the run's result."""
    shutil.copytree(marked[0], tmp_path / "m")
    for name in ("numbers.tar", "words.tar"):
        os.utime(tmp_path / "m" / "out" / name, ns=(10**18, 10**18 + 7))
    before = tree(tmp_path / "m")
    damage(tmp_path / "m" / "out")
    stamped = stamps(tmp_path / "m")
    result = mark(world.shards, world.key, tmp_path / "m" / "out", "--fraction", 0.5, "--json")
    return before, stamped, result


def test_a_second_run_of_shards_skips_everything_and_writes_nothing(world, marked, tmp_path):
    before, stamped, result = run_again(world, marked, tmp_path)
    assert result.json["skipped"] == 8
    assert tree(tmp_path / "m") == before
    after = stamps(tmp_path / "m")
    kept = [path for path in stamped if path.is_relative_to(tmp_path / "m" / "out")]
    assert len(kept) == 4
    assert {path: after[path] for path in kept} == {path: stamped[path] for path in kept}
    changing = ("seconds", "skipped", "output", "manifest", "public")
    assert {k: v for k, v in result.json.items() if k not in changing} == {
        k: v for k, v in marked[1].items() if k not in changing
    }


def flip(shard, place):
    raw = bytearray(shard.read_bytes())
    raw[place] ^= 0x55
    shard.write_bytes(raw)


def place_of(shard, wanted):
    """The start of the data of the first wanted member."""
    with tarfile.open(shard) as tar:
        return next(info.offset_data for info in tar.getmembers() if wanted(PurePosixPath(info.name).as_posix()))


def spoil(name, status, offset):
    """Flip a byte, so far from where its data begin, of a member with this status, or with this suffix."""

    def damage(output):
        rows = rows_of(output.with_name("out.manifest.jsonl"))

        def wanted(member):
            return member.endswith(status) or rows.get(f"{name}/{member}", {}).get("status") == status

        flip(output / name, offset + place_of(output / name, wanted))

    return damage


DAMAGES = {
    "a shard is gone": lambda out: (out / "words.tar").unlink(),
    "all shards are gone": lambda out: [path.unlink() for path in out.glob("*.tar")],
    "the folder is gone": shutil.rmtree,
    "another file is gone": lambda out: (out / "README").unlink(),
    "a marked image": spoil("numbers.tar", "marked", 99),
    "a copied image": spoil("numbers.tar", "copied", 99),
    "a caption": spoil("numbers.tar", ".json", 2),
    "the header of a marked image": spoil("words.tar", "marked", -400),
    "the header of a copied image": spoil("words.tar", "copied", -400),
    "the first header": lambda out: flip(out / "numbers.tar", 3),
    "a shard is cut": lambda out: os.truncate(out / "numbers.tar", 1234),
    "a shard is empty": lambda out: os.truncate(out / "words.tar", 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_of_the_output_is_made_again_with_the_same_bytes(world, marked, tmp_path, damage):
    before, _, result = run_again(world, marked, tmp_path, DAMAGES[damage])
    assert result.code == 0, result.err
    assert tree(tmp_path / "m") == before
    for name in ("numbers.tar", "words.tar"):
        assert (tmp_path / "m" / "out" / name).stat().st_mtime_ns == 10**18 + 7


def test_a_shard_of_which_nothing_is_marked_is_made_again_too(world, tmp_path):
    good(world.shards, world.key, tmp_path / "out", "--fraction", 0)
    for name in ("numbers.tar", "words.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (world.shards / name).read_bytes()
        (tmp_path / "out" / name).unlink()
        good(world.shards, world.key, tmp_path / "out", "--fraction", 0)
        assert (tmp_path / "out" / name).read_bytes() == (world.shards / name).read_bytes()


def test_shards_go_to_another_file_system_too(world, marked, tmp_path, monkeypatch):
    """The output may be a mount point, to which nothing can be moved from beside it."""
    real = Path.replace

    def replace(path, target):
        if path.parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    good(world.shards, world.key, tmp_path / "m" / "out", "--fraction", 0.5)
    assert tree(tmp_path / "m" / "out") == tree(marked[0] / "out")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["out", "out.manifest.jsonl", "out.pub"]


def test_no_shard_is_put_together_of_images_that_are_gone(world, tmp_path, monkeypatch):
    """An error is better than members without bytes."""
    (tmp_path / "none").touch()
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if ".out.staged" in path.parts else real(path))
    assert "is gone" in one_error(mark(world.shards, world.key, tmp_path / "out", "--fraction", 0.5))
    monkeypatch.undo()
    good(world.shards, world.key, tmp_path / "out", "--fraction", 0.5)


def test_a_single_shard_becomes_a_single_shard_beside_it(world, tmp_path):
    single = Path(shutil.copy2(world.single, tmp_path / "single.tar"))
    settings = ("--key", world.key, "--steps", 1, "--json")
    assert call("mark", single, *settings).json["output"] == str(tmp_path / "single-marked.tar")
    made = ["single-marked.tar", "single-marked.tar.manifest.jsonl", "single-marked.tar.pub", "single.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == made
    before, after = members_of(single), members_of(tmp_path / "single-marked.tar")
    assert [(m.name, m.blocks) for m in before] == [(m.name, m.blocks) for m in after]
    changed = {a.path for a, b in zip(before, after, strict=True) if a.data != b.data}
    assert changed == {f"00000{i}.jpg" for i in range(4)}
    content, stamped = tree(tmp_path), stamps(tmp_path / "single-marked.tar")
    assert call("mark", single, *settings).json["skipped"] == 4
    assert stamps(tmp_path / "single-marked.tar") == stamped
    flip(tmp_path / "single-marked.tar", 99 + place_of(tmp_path / "single-marked.tar", lambda n: "2.jpg" in n))
    assert call("mark", single, *settings).json["skipped"] == 3
    assert tree(tmp_path) == content


def test_a_single_shard_is_skipped_or_refused_under_any_output_name(world, tmp_path):
    result = mark(world.single, world.key, tmp_path / "out")
    if result.code:
        one_error(result)
        assert tree(tmp_path) == {}
    else:
        sheet = tmp_path / "sheet.png"
        assert good(world.single, world.key, tmp_path / "out", "--preview", sheet, "--json").json["skipped"] == 4
        assert sheet.exists()


def test_a_single_shard_into_an_empty_folder_is_refused_before_anything_is_done(world, tmp_path):
    (tmp_path / "out").mkdir()
    message = one_error(mark(world.single, world.key, tmp_path / "out"))
    assert str(tmp_path / "out") in message
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


LONG = "d" * 80 + "/" + "n" * 85 + ".png"


@pytest.mark.parametrize("format", [GNU, PAX, USTAR])
def test_long_names_and_odd_headers_survive(world, tmp_path, format):
    strange = (
        "ünï çlass/日 本\n.png" if format == USTAR else "ünï çlass/" + "日" * 60 + "\n" + os.fsdecode(b"\xff") + ".png"
    )
    members = [(LONG, photo(0)), (strange, photo(1, side=70)), ("d/" + "x" * 90 + ".png", photo(2))]
    if format == GNU:
        members.append(("e/" * 60 + "x.txt", b"unmarked"))
    source = pack(tmp_path / "a.tar", members, format)
    answer = good(source, world.key, tmp_path / "out.tar", "--json").json
    assert (answer["marked"], answer["failed"]) == (3, [])
    before, after = members_of(source), members_of(tmp_path / "out.tar")
    assert [(m.name, m.header, m.blocks) for m in before] == [(m.name, m.header, m.blocks) for m in after]
    assert [a.data == b.data for a, b in zip(before, after, strict=True)] == [False] * 3 + [True] * (format == GNU)
    assert all(measured_psnr(a.data, b.data) >= 34 for a, b in zip(before[:3], after[:3], strict=True))
    assert list(rows_of(tmp_path / "out.tar.manifest.jsonl")) == [f"a.tar/{name}" for name, _ in members[:3]]


def test_fields_that_only_extensions_hold_survive(world, tmp_path):
    """Fractions of a second in times, owners with more than eight digits, attributes of the packing system."""
    data = photo(0)
    for format in (GNU, PAX):
        source = tmp_path / f"{format}.tar"
        with tarfile.open(source, "w", format=format, pax_headers={"comment": "of all"}) as tar:
            info = tarfile.TarInfo("a/b.png")
            info.size, info.uid = len(data), 3_000_000_000
            info.mtime = 1_500_000_000.25 if format == PAX else 1_500_000_000
            info.pax_headers = {"SCHILY.xattr.user.note": "kept", "atime": "1400000000.5"}
            tar.addfile(info, io.BytesIO(data))
        good(source, world.key, tmp_path / "out" / source.name)
        (before,), (after,) = members_of(source), members_of(tmp_path / "out" / source.name)
        assert (before.header, before.blocks) == (after.header, after.blocks)
        assert before.header["uid"] == 3_000_000_000
        assert ("SCHILY.xattr.user.note" in after.header["pax"]) == (format == PAX)
        assert before.data != after.data


def test_links_and_devices_in_a_shard_stay(world, tmp_path):
    source = tmp_path / "a.tar"
    with tarfile.open(source, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(photo(0))
        tar.addfile(info, io.BytesIO(photo(0)))
        for kind, name in ((tarfile.SYMTYPE, "s.png"), (tarfile.LNKTYPE, "l.png"), (tarfile.FIFOTYPE, "f.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
    assert good(source, world.key, tmp_path / "out.tar", "--json").json["images"] == 1
    before, after = members_of(source), members_of(tmp_path / "out.tar")
    assert [(m.name, m.header, m.blocks) for m in before] == [(m.name, m.header, m.blocks) for m in after]


def test_a_shard_that_begins_with_the_folder_itself_is_marked(world, tmp_path):
    """A shard as `tar -cf shard.tar .` makes it."""
    write_folder(tmp_path / "imgs", {f"{i}.png": photo(i) for i in range(2)})
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "imgs", ".")
    assert good(tmp_path / "a.tar", world.key, tmp_path / "out.tar", "--json").json["marked"] == 2
    assert [m.name for m in members_of(tmp_path / "out.tar")] == [m.name for m in members_of(tmp_path / "a.tar")]


def test_hidden_members_stay_as_hidden_files_do(world, tmp_path):
    """For example, the file that a Mac's tar adds for each file."""
    hidden = [("./._0.png", b"\0\5\26\7 of a Mac"), (".b.png", photo(1)), (".cls", b"4"), (".git/x.png", photo(2))]
    source = pack(tmp_path / "a.tar", [hidden[0], ("./0.png", photo(0)), *hidden[1:]])
    assert good(source, world.key, tmp_path / "out.tar", "--json").json["images"] == 1
    changed = [a.name for a, b in zip(members_of(source), members_of(tmp_path / "out.tar"), strict=True) if a != b]
    assert changed == ["./0.png"]


def test_classes_that_are_numbers_are_carrier_rows_even_if_some_are_missing(world, tmp_path):
    members = []
    for i, label in enumerate(("5", "0", "3\n", "5")):
        members += [(f"{i}.png", photo(i)), (f"{i}.cls", label.encode())]
    pack(tmp_path / "imgs" / "a.tar", members[:4])
    pack(tmp_path / "imgs" / "b.tar", members[4:])
    assert call("keygen", "-o", tmp_path / "named.safetensors", "--data", tmp_path / "imgs").code == 0
    for key in (world.key, tmp_path / "named.safetensors"):
        good(tmp_path / "imgs", key, tmp_path / f"{key.stem}")
        rows = rows_of(tmp_path / f"{key.stem}.manifest.jsonl").values()
        assert [(row["class"], row["row"]) for row in rows] == [("5", 5), ("0", 0), ("3", 3), ("5", 5)]


def test_a_key_with_fewer_carriers_than_the_largest_class_is_refused(world, tmp_path):
    source = pack(tmp_path / "a.tar", [("0.png", photo(0)), ("0.cls", b"8")])
    assert "8 carriers" in one_error(mark(source, world.key, tmp_path / "out.tar"))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit of memory is told by /proc")
@pytest.mark.parametrize("number", [10**12, 10**30])
def test_a_class_beyond_all_carriers_is_refused_and_not_counted_up_to(world, forks, tmp_path, number):
    source = pack(tmp_path / "a.tar", [("0.png", photo(0)), ("0.cls", str(number).encode())])
    result = forks.run(*command(source, world.key, tmp_path / "out.tar"), memory=2**26)
    assert "out of memory" not in one_error(result)
    assert list(tmp_path.iterdir()) == [source]


HOSTILE = {
    "../evil.jpg": [("../evil.jpg", photo(0, "JPEG"))],
    "a/../../evil.png": [("b/0.png", photo(1)), ("a/../../evil.png", photo(0))],
    "/abs.jpg": [("/abs.jpg", photo(0, "JPEG"))],
    "twice.png": [("twice.png", photo(0)), ("twice.png", photo(1))],
    "./twice.png": [("twice.png", photo(0)), ("./twice.png", photo(1))],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_elsewhere_or_are_there_twice_are_refused(world, tmp_path, name):
    source = pack(tmp_path / "imgs" / "a.tar", HOSTILE[name])
    before = tree(tmp_path)
    message = one_error(mark(tmp_path / "imgs", world.key, tmp_path / "out"))
    assert repr(name) in message
    assert str(source) in message
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "imgs"]


BROKEN = {
    "cut in an image": lambda raw, start: raw[: start + 99],
    "cut in a header": lambda raw, start: raw[: start - 99],
    "cut in the last image": lambda raw, _: raw.rstrip(b"\0")[:-200],
    "a damaged first header": lambda raw, _: b"\1" + raw[1:],
    "a damaged header within": lambda raw, start: raw[: start - 500] + b"\1" + raw[start - 499 :],
    "no tar": lambda *_: b"hello",
    "gzip": lambda raw, _: zlib.compress(raw, wbits=31),
    "empty": lambda *_: b"",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_shard_that_cannot_be_read_to_its_end_is_refused(world, tmp_path, damage):
    """Otherwise the following images would stay unmarked without a message."""
    pack(tmp_path / "imgs" / "a.tar", [("0.png", photo(0))])
    shard = pack(tmp_path / "imgs" / "b.tar", [(f"{i}.png", photo(i)) for i in range(3)])
    shard.write_bytes(BROKEN[damage](shard.read_bytes(), place_of(shard, lambda n: n == "1.png")))
    before = tree(tmp_path)
    assert str(shard) in one_error(mark(tmp_path / "imgs", world.key, tmp_path / "out"))
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "imgs"]


def test_shards_without_images_and_another_format_are_refused(world, tmp_path):
    pack(tmp_path / "imgs" / "a.tar", [("a.txt", b"text"), ("a.cls", b"1"), ("b.png", None)])
    before = tree(tmp_path)
    assert "no images" in one_error(mark(tmp_path / "imgs", world.key, tmp_path / "out"))
    assert "format" in one_error(mark(world.shards, world.key, tmp_path / "out", "--format", "png"))
    assert "lie in each other" in one_error(mark(world.shards, world.key, world.shards / "out"))
    assert "lie in each other" in one_error(mark(world.single, world.key, world.single))
    assert tree(tmp_path) == before


def test_shards_beside_images_are_not_taken_for_all_there_is(world, tmp_path):
    """The loose images must be marked, or the folder refused; they must not stay unmarked without a message."""
    write_folder(tmp_path / "imgs", {"a.png": photo(0), "b.png": photo(1)})
    pack(tmp_path / "imgs" / "more.tar", [("c.png", photo(2))])
    result = mark(tmp_path / "imgs", world.key, tmp_path / "out")
    if result.code:
        one_error(result)
    else:
        assert (tmp_path / "out" / "a.png").read_bytes() != photo(0)


def test_a_broken_image_in_a_shard_is_recorded_and_stays_as_it_was(world, tmp_path):
    members = [("a/0.png", photo(0)), ("a/1.png", photo(1)[:99]), ("a/2.png", b""), ("a/3.png", photo(3))]
    source = pack(tmp_path / "a.tar", members)
    for skipped in (0, 2):
        result = mark(source, world.key, tmp_path / "out.tar", "--json")
        assert result.code == 1
        assert (result.json["marked"], result.json["skipped"]) == (2, skipped)
        assert [f["path"] for f in result.json["failed"]] == ["a.tar/a/1.png", "a.tar/a/2.png"]
        assert ["a.tar/a/1.png" in errors(result)[0], "a.tar/a/2.png" in errors(result)[1]] == [True, True]
        rows = rows_of(tmp_path / "out.tar.manifest.jsonl")
        assert [row["status"] for row in rows.values()] == ["marked", "failed", "failed", "marked"]
        after = [m.data for m in members_of(tmp_path / "out.tar")]
        assert after[1:3] == [data for _, data in members[1:3]]
        assert after[0] != photo(0)
        assert after[3] != photo(3)


def test_the_dry_run_of_shards_writes_nothing(world, tmp_path):
    result = good(world.shards, world.key, tmp_path / "out", "--dry-run", "--fraction", 0.5)
    assert "would mark 5 of 8 images" in result.out
    assert "0: 2 of 3 images" in result.out
    assert list(tmp_path.iterdir()) == []


def test_the_preview_of_shards_shows_the_members(world, tmp_path):
    sheet = tmp_path / "sheet.png"
    for _ in range(2):  # as it marks, and when all is done
        good(world.shards, world.key, tmp_path / "out", "--preview", sheet)
        rows = rows_of(tmp_path / "out.manifest.jsonl")
        shard, member = min(rows, key=lambda path: rows[path]["psnr"]).split("/", 1)
        shown = pixels(sheet.read_bytes())
        for folder in (world.shards, tmp_path / "out"):
            wanted = pixels(images_in(folder / shard)[member]).repeat(4, 0).repeat(4, 1)
            height, width = wanted.shape[:2]
            starts = np.argwhere((shown[: 1 - height, : 1 - width] == wanted[0, 0]).all(2))
            assert any(np.array_equal(shown[y : y + height, x : x + width], wanted) for y, x in starts)
        sheet.unlink()


def test_an_image_that_changes_in_a_shard_is_done_again_alone(world, marked, tmp_path):
    shutil.copytree(marked[0], tmp_path / "m")
    shutil.copytree(world.shards, tmp_path / "shards")
    members = [(name, photo(99) if name == "ant/a0.png" else data) for name, data in NAMED]
    pack(tmp_path / "shards" / "words.tar", members, GNU)
    settings = ("--fraction", 0.5, "--json")
    assert good(tmp_path / "shards", world.key, tmp_path / "m" / "out", *settings).json["skipped"] == 7
    good(tmp_path / "shards", world.key, tmp_path / "fresh" / "out", *settings)
    assert tree(tmp_path / "m") == tree(tmp_path / "fresh")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder in which both shards were marked completely."""
    root = tmp_path_factory.mktemp("whole")
    good(world.shards, world.key, root / "out")
    return root


CHANGES = {
    "a caption": [(name, b'{"caption": "other"}' if "json" in name else data) for name, data in NUMBERS],
    "the order": NUMBERS[::-1],
    "an image removed": [member for member in NUMBERS if "000002" not in member[0]],
    "a file added": [*NUMBERS, ("000003.more", b"more")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_changes_in_the_source_s_shards_changes_in_the_output_s(world, whole, tmp_path, change):
    shutil.copytree(whole, tmp_path / "m")
    shutil.copytree(world.shards, tmp_path / "shards")
    pack(tmp_path / "shards" / "numbers.tar", CHANGES[change])
    good(tmp_path / "shards", world.key, tmp_path / "m" / "out")
    assert images_in(tmp_path / "m" / "out" / "words.tar") == images_in(whole / "out" / "words.tar")
    before, after = (members_of(folder / "numbers.tar") for folder in (tmp_path / "shards", tmp_path / "m" / "out"))
    assert [(m.name, m.blocks) for m in after] == [(m.name, m.blocks) for m in before]
    marked = images_in(whole / "out" / "numbers.tar")
    assert [m.data for m in after] == [marked.get(m.path, m.data) for m in before]
    rows = [row["path"] for row in rows_of(tmp_path / "m" / "out.manifest.jsonl").values()]
    assert rows[: -len(NAMED_IMAGES)] == [f"numbers.tar/{m.path}" for m in before if m.path in marked]


def test_a_shard_that_the_source_no_longer_has_is_named(world, tmp_path):
    for i, name in enumerate(("a.tar", "b.tar")):
        pack(tmp_path / "shards" / name, [("cat/0.png", photo(i)), ("dog/0.png", photo(i + 2))])
    good(tmp_path / "shards", world.key, tmp_path / "out")
    (tmp_path / "shards" / "b.tar").unlink()
    result = mark(tmp_path / "shards", world.key, tmp_path / "out")
    assert str(tmp_path / "out" / "b.tar") in one_error(result)
    good(tmp_path / "shards", world.key, tmp_path / "out", "--force")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.tar"]


def test_force_marks_shards_anew(world, marked, tmp_path):
    shutil.copytree(marked[0], tmp_path / "m")
    settings = (world.shards, world.key, tmp_path / "m" / "out", "--fraction", 0.25, "--seed", 3)
    assert "fraction" in one_error(mark(*settings))
    assert good(*settings, "--force", "--json").json["skipped"] == 0
    good(world.shards, world.key, tmp_path / "fresh" / "out", "--fraction", 0.25, "--seed", 3)
    assert tree(tmp_path / "m") == tree(tmp_path / "fresh")


def test_kill_9_at_any_file_and_go_on_with_shards(world, forks, marked, tmp_path):
    """The first run stops at its first file, the second at its second, and so on until a run finishes."""
    expected = tree(marked[0])
    wanted = command(world.shards, world.key, tmp_path / "m" / "out", "--fraction", 0.5, "--batch-size", 1, "--json")
    for kill_at in range(1, 30):
        done = finished(tmp_path / "m") if (tmp_path / "m" / "out.manifest.jsonl").exists() else 0
        result = forks.run(*wanted, kill_at=kill_at)
        for path in (tmp_path / "m" / "out").glob("*.tar"):
            assert sha256(path.read_bytes()) == expected[f"out/{path.name}"], "a shard appeared that is not whole"
        if result.code != -signal.SIGKILL:
            break
    assert result.code == 0, result.err
    assert kill_at > 4
    assert result.json["skipped"] == done > 0
    assert tree(tmp_path / "m") == expected


@pytest.mark.parametrize("kind", ["folder", "single"])
def test_kill_9_as_a_shard_is_put_together_leaves_nothing_behind(world, forks, tmp_path, kind):
    source = {"folder": world.shards, "single": world.single}[kind]
    suffix = source.suffix
    good(source, world.key, tmp_path / "calm" / f"out{suffix}")
    wanted = command(source, world.key, tmp_path / "m" / f"out{suffix}")
    killed = forks.run(*wanted, kill_size=10_240)  # more than any image has, and the smallest of tar files
    assert killed.code == -signal.SIGKILL
    assert leftovers(tmp_path / "m") != []
    again = forks.run(*wanted, "--json")
    assert again.code == 0, again.err
    assert again.json["skipped"] == again.json["images"]
    assert tree(tmp_path / "m") == tree(tmp_path / "calm")
    assert leftovers(tmp_path / "m") == []


# ---------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def alone(world, forks, tmp_path_factory):
    """The output of a single process for the folder."""
    root = tmp_path_factory.mktemp("alone")
    result = forks.run(*command(world.folder, world.key, root / "out"))
    assert result.code == 0, result.err
    return root


def test_the_launcher_s_processes_make_what_one_makes_and_speak_once(world, forks, tmp_path):
    settings = ("--fraction", 0.75, "--json")
    alone = forks.run(*command(world.folder, world.key, tmp_path / "alone" / "out", *settings)).json
    assert (alone["marked"], alone["copied"]) == (6, 2)
    result = launched(*command(world.folder, world.key, tmp_path / "m" / "out", *settings))
    assert result.code == 0, result.err
    changing = ("seconds", "output", "manifest", "public")
    assert {k: v for k, v in result.json.items() if k not in changing} == {
        k: v for k, v in alone.items() if k not in changing
    }
    assert errors(result) == []
    assert result.err.count("planning") == 1
    assert tree(tmp_path / "m") == tree(tmp_path / "alone")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["out", "out.manifest.jsonl", "out.pub"]


def refused_at_the_start(folder, run):
    write_folder(folder / "out", {"mine.txt": b"mine"})
    before = tree(folder)
    results = run()
    assert all(result.code > 0 for result in results), results
    (message,) = errors(*results)
    assert "no manifest" in message
    (answer,) = [result.json for result in results if result.out]
    assert "no manifest" in answer["error"]
    assert tree(folder) == before


def test_an_error_at_the_start_ends_all_processes_and_is_said_once(world, forks, tmp_path):
    wanted = command(world.folder, world.key, tmp_path / "out", "--json")
    refused_at_the_start(tmp_path, lambda: forks.together(*wanted, size=3))


@pytest.mark.slow
def test_an_error_at_the_start_ends_the_launcher_s_processes_and_is_said_once(world, tmp_path):
    wanted = command(world.folder, world.key, tmp_path / "out", "--json")
    refused_at_the_start(tmp_path, lambda: [launched(*wanted)])


def test_processes_that_outnumber_the_images_make_the_same_and_the_first_one_speaks(world, forks, tmp_path):
    source = write_folder(tmp_path / "imgs", {"0.png": photo(0), "1.png": photo(1)})
    results = forks.together(*command(source, world.key, tmp_path / "many" / "out"), size=3)
    assert [r.code for r in results] == [0] * 3, results
    assert "marked       2 of 2 images, 0 copied, 0 failed" in results[0].out
    assert "one of 3 processes" in results[0].err
    assert [(r.out, r.err) for r in results[1:]] == [("", "")] * 2
    good(source, world.key, tmp_path / "one" / "out")
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_processes_mark_shards_as_one_does_and_skip_what_is_done(world, forks, marked, tmp_path):
    wanted = command(world.shards, world.key, tmp_path / "out", "--fraction", 0.5, "--json")
    first, second = forks.together(*wanted)
    assert (first.code, second.code, second.out) == (0, 0, ""), (first, second)
    assert tree(tmp_path) == tree(marked[0])
    stamped = stamps(tmp_path / "out")
    first, second = forks.together(*wanted)
    assert (first.code, second.code, first.json["skipped"]) == (0, 0, 8), (first, second)
    assert stamps(tmp_path / "out") == stamped


@pytest.mark.parametrize(
    ("before", "kill_at", "after"), [(2, 4, 1), (1, 5, 2), pytest.param(3, 3, 2, marks=pytest.mark.slow)]
)
def test_others_go_on_where_processes_were_killed(world, forks, alone, tmp_path, before, kill_at, after):
    wanted = command(world.folder, world.key, tmp_path / "out", "--json")
    killed = forks.together(*wanted, "--batch-size", 1, size=before, kill_at=kill_at)
    assert [r.code for r in killed] == [-signal.SIGKILL] * before
    done = finished(tmp_path)
    assert 0 < done < 8
    first, *others = forks.together(*wanted, size=after)
    assert first.code == 0, first.err
    assert all(other.code == 0 for other in others), others
    assert first.json["skipped"] == done
    assert tree(tmp_path) == tree(alone)


def test_journals_of_a_killed_run_are_taken_in_and_those_of_others_thrown_away(world, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "m")
    path = tmp_path / "m" / "out.manifest.jsonl"
    whole = path.read_bytes()
    header, *rows = whole.splitlines(keepends=True)
    wanted = (world.folder, world.key, tmp_path / "m" / "out", "--json")

    def journal(*lines):
        path.with_name(path.name + ".rank3").write_bytes(b"".join((header, *lines)))

    path.write_bytes(header + b"".join(rows[:3]))
    journal(*rows[3:5], rows[5][:-9])
    assert good(*wanted).json["skipped"] == 5
    assert path.read_bytes() == whole
    path.with_name(path.name + ".rank3").write_bytes(b"garbage\n")
    assert good(*wanted, "--force").json["skipped"] == 0
    path.with_name(path.name + ".rank3").write_bytes(b"garbage\n")
    path.unlink()
    shutil.rmtree(tmp_path / "m" / "out")
    assert good(*wanted).json["skipped"] == 0
    assert tree(tmp_path / "m") == tree(alone)
    path.with_name(path.name + ".rank3").write_bytes(b"garbage\n")
    assert path.name + ".rank3" in one_error(mark(*wanted))


def test_a_broken_image_is_told_once_by_several_processes(world, forks, tmp_path):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    write_folder(source, {"a/2.png": b"broken", "a/4.png": b""})  # by path the second and the third of all
    first, second = forks.together(*command(source, world.key, tmp_path / "out", "--json"))
    assert first.code == 1
    assert [f["path"] for f in first.json["failed"]] == ["a/2.png", "a/4.png"]
    assert second.out == ""
    said = errors(first, second)
    assert len(said) == 2, said
    assert ["a/2.png" in said[0], "a/4.png" in said[1]] == [True, True]


def test_the_preview_is_made_by_several_processes_too(world, forks, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "one")
    good(world.folder, world.key, tmp_path / "one" / "out", "--preview", tmp_path / "one.png")
    wanted = command(world.folder, world.key, tmp_path / "m" / "out", "--preview", tmp_path / "several.png")
    first, second = forks.together(*wanted)
    assert (first.code, second.code, errors(first, second)) == (0, 0, []), (first, second)
    with Image.open(tmp_path / "several.png") as sheet:
        assert sheet.height == 32 + 3 * (128 + 32)  # three rows, each over its caption
    assert (tmp_path / "several.png").read_bytes() == (tmp_path / "one.png").read_bytes()


@pytest.mark.parametrize("name", ["a/0.png", "a/2.png"])
def test_strict_stops_all_processes_and_says_why_once(world, forks, tmp_path, name):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    write_folder(source, {name: b"broken"})
    results = forks.together(*command(source, world.key, tmp_path / "out", "--strict"))
    assert all(r.code != 0 for r in results)
    said = errors(*results)
    assert len(said) == 1, said
    assert name in said[0]


def test_an_error_in_the_plan_is_said_once_by_several_processes(world, forks, tmp_path):
    results = forks.together(*command(world.folder, tmp_path / "none.safetensors", tmp_path / "out", "--json"))
    assert all(r.code != 0 for r in results)
    assert str(tmp_path / "none.safetensors") in results[0].json["error"]
    assert len(errors(*results)) == 1, errors(*results)
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_by_several_processes_is_said_once(world, forks, tmp_path):
    first, second = forks.together(*command(world.folder, world.key, tmp_path / "out", "--dry-run", "--json"))
    assert (first.code, second.code) == (0, 0)
    assert first.json["dry_run"] is True
    assert (second.out, second.err) == ("", "")
    assert list(tmp_path.iterdir()) == []


def descendants(pid):
    """A process and all that it has started, which the launcher puts into sessions of their own."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for one in found:  # it grows meanwhile
        found += [child for child, parent in parents if parent == one]
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ps") is None, reason="the launcher's processes are found by ps")
@pytest.mark.parametrize("several_first", [True, False])
def test_kill_9_of_the_launcher_and_its_processes_and_going_on(world, tmp_path, several_first):
    source = write_folder(tmp_path / "imgs", {f"{i:03}.png": photo(i) for i in range(60)})
    good(source, world.key, tmp_path / "calm" / "out")
    wanted = command(source, world.key, tmp_path / "m" / "out", "--batch-size", 1, "--json")
    alone = [sys.executable, "-m", "radiotag", *map(str, wanted)]
    draw, done = random.Random(1), 0
    for count in (1, 8, 20):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = launch(*wanted) if several_first else subprocess.Popen(alone, env=environment(), **pipes)
        wait_for_files(tmp_path / "m", count)
        time.sleep(draw.uniform(0, 0.05))
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()  # until nobody holds the pipes
        assert process.returncode == -signal.SIGKILL
        assert finished(tmp_path / "m") >= done
        done = finished(tmp_path / "m")
    assert 18 <= done < 60
    last = call(*wanted) if several_first else launched(*wanted)
    assert last.code == 0, last.err
    assert last.json["skipped"] == done
    assert tree(tmp_path / "m") == tree(tmp_path / "calm")


# ---------------------------------------------------------------- the manifest

names = st.binary(max_size=20).map(os.fsdecode)
quick = settings(deadline=None, max_examples=60)


@quick
@given(st.lists(st.one_of(st.binary(max_size=30), st.just(b"\n"), st.integers(4000, 9000).map(lambda n: b"x" * n))))
@example([])
@example([b"x" * 4096])
@example([b"\n" + b"x" * 4095])
@example([b"\n" + b"x" * 4096])
@example([b"a\n" + b"x" * 20_000])
def test_mending_cuts_the_torn_last_line_and_nothing_else(parts):
    content = b"".join(parts)
    file = io.BytesIO(content)
    manifest.truncate_torn_line(file)
    whole = content[: content.rfind(b"\n") + 1]
    assert file.getvalue() == whole
    assert file.tell() == len(whole)


@quick
@given(st.data())
def test_putting_in_order_keeps_the_last_row_of_each_path_in_the_order_wanted(data):
    written = data.draw(st.lists(st.tuples(names, st.sampled_from(["marked", "copied", "failed"])), min_size=1))
    rows = [
        {"path": path, "status": status, "n": i, "psnr": i, "ssim": i / 9, "linf": 1, "gain": -i}
        for i, (path, status) in enumerate(written)
    ]
    last = {row["path"]: row for row in rows}
    wanted = data.draw(st.permutations(sorted(last)).map(lambda order: order[: 1 + len(order) // 2]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in ({"radiotag": 1, "old": 1}, *rows)))
        summary = manifest.put_in_order(path, {"radiotag": 1, "new": 2}, wanted, 3)
        raw = path.read_bytes()
        assert os.listdir(folder) == ["m"]  # noqa: PTH208
    header, *kept = map(json.loads, raw.splitlines())
    assert header == {"radiotag": 1, "new": 2}
    assert kept == [last[name] for name in wanted]
    marked = [row for row in kept if row["status"] == "marked"]
    assert (summary.images, summary.done, summary.skipped) == (len(wanted), len(wanted), 3)
    assert (summary.copied, summary.marked) == (sum(r["status"] == "copied" for r in kept), len(marked))
    assert summary.failed == [row for row in kept if row["status"] == "failed"]
    assert list(summary.psnr) == [row["psnr"] for row in marked]
    assert list(summary.gain) == [row["gain"] for row in marked]
    assert [json.loads(raw[place:].split(b"\n")[0]) for place in summary.places] == marked


def journal_lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in ({"radiotag": 1}, *rows))


def test_taking_in_appends_whole_lines_and_removes_the_journals(tmp_path):
    path = tmp_path / "out.manifest.jsonl"
    path.write_bytes(journal_lines({"path": "a"}))
    for rank in (1, 2, 10):
        torn = b'{"path": "torn' if rank == 2 else b""
        rows = [{"path": f"{rank}\n{i}", "n": i} for i in range(2)]
        (tmp_path / f"out.manifest.jsonl.rank{rank}").write_bytes(journal_lines(*rows) + torn)
    (tmp_path / "out.manifest.jsonl.rankle").write_bytes(b"mine")
    (tmp_path / "other.manifest.jsonl.rank1").write_bytes(b"another's")
    with path.open("ab") as journal:
        manifest.merge_journals(path, journal)
    header, *rows = map(json.loads, path.read_bytes().splitlines())
    assert header == {"radiotag": 1}
    assert rows[0] == {"path": "a"}
    assert sorted(rows[1:], key=lambda row: row["path"]) == [
        {"path": f"{rank}\n{i}", "n": i} for rank in (1, 10, 2) for i in range(2)
    ]
    left = ["other.manifest.jsonl.rank1", "out.manifest.jsonl", "out.manifest.jsonl.rankle"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


HEADER = b'{"radiotag": 1}\n'
GARBAGE = [
    *(b"\n", b"null\n", b"3\n", b'"radiotag"\n', b"[]\n", b"{}\n", b"\xff\xfe\n", b"hello\n", b'{"radiotag": 2}\n'),
    *(b'{"radiotag": "1"}\n', b'{"path": "a"}\n', b"[" * 100_000 + b"\n", b"9" * 10_000 + b"\n"),
    *(HEADER + line for line in (b"\n", b"null\n", b"3\n", b"{}\n", b'{"path": 3}\n', b'{"path": null}\n', b"\0\n")),
    HEADER + b'{"path": "a"}\n\n{"path": "b"}\n',
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_no_manifest(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    for read in (manifest.read_header, manifest.read_manifest, manifest.places, lambda p: list(manifest.read_lines(p))):
        with pytest.raises(RadiotagError, match="not a radiotag manifest"):
            read(tmp_path / "m")


@quick
@given(st.lists(st.one_of(st.binary(max_size=20), st.just(HEADER), st.just(b'{"path": "a"}\n'), st.just(b"{}\n"))))
def test_whatever_bytes_are_read_only_our_own_error_is_raised(parts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.write_bytes(b"".join(parts))
        try:
            found = list(manifest.read_lines(path))
        except RadiotagError as error:
            assert str(path) in str(error)
        else:
            assert len(found) == path.read_bytes().count(b"\n")


def test_what_is_not_there_or_no_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RadiotagError, match="cannot read") as caught:
            manifest.read_header(path)
        assert str(path) in str(caught.value)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "torn").write_bytes(b'{"radiotag": 1}')
    for name in ("empty", "torn"):
        with pytest.raises(RadiotagError, match="not a radiotag manifest"):
            manifest.read_header(tmp_path / name)


@quick
@given(st.lists(names, min_size=1, unique=True))
@example(["new\nline", "\r\n\0", "日本 \u2028\x85", os.fsdecode(b"\xff\xc3"), "\udcff", '"\\', ""])
def test_names_of_every_kind_are_read_as_they_were_written(wanted):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        lines = [manifest.line({"path": name, "class": name}) for name in wanted]
        assert all(line.count(b"\n") == 1 and line.endswith(b"\n") and line.isascii() for line in lines)
        path.write_bytes(HEADER + b"".join(lines))
        header, rows = manifest.read_manifest(path)
        assert header == {"radiotag": 1}
        assert list(rows) == wanted
        assert [row["class"] for row in rows.values()] == wanted
        with path.open("rb") as file:
            for name, place in manifest.places(path).items():
                assert manifest.row_at(file, place)["path"] == name
                assert path.read_bytes()[place - 1 : place] == b"\n"


@pytest.mark.parametrize("row", [{}, {"status": "marked"}, {"status": "marked", "row": 0, "output": "a/0.png"}])
def test_a_row_that_lacks_something_is_an_error_or_done_again(world, tmp_path, row):
    wanted = (world.folder, world.key, tmp_path / "out")
    good(*wanted)
    before, path = tree(tmp_path), tmp_path / "out.manifest.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + json.dumps({"path": "a/0.png"} | row) + "\n" + "".join(lines[2:]))
    result = mark(*wanted)
    if result.code:
        assert str(path) in one_error(result)
    else:
        assert tree(tmp_path) == before


# ---------------------------------------------------------------- what goes wrong


def disk_full(forks, folder, wanted, sources, limit, name, **options):
    """Run with a limit of bytes a file, then without: the error names the file, and nothing is left of it."""
    before = tree(sources)
    failed = forks.run(*wanted, largest=limit, **options)
    assert failed.out == ""
    message = one_error(failed)
    assert str(folder / name) in message
    assert os.strerror(27) in message  # EFBIG
    assert not [path for path in leftovers(folder) if path.endswith(".part")]
    assert not (folder / name).is_file() or name.endswith(".jsonl")
    assert tree(sources) == before
    done = finished(folder)
    result = forks.run(*wanted, "--json")
    assert result.code == 0, result.err
    assert result.json["skipped"] == done
    return done


@pytest.mark.parametrize("name", ["b/big.png", "notes"])
def test_a_file_that_does_not_fit_is_named_and_the_next_run_goes_on(world, forks, tmp_path, name):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    write_folder(source, {name: noise(0, 60)})
    good(source, world.key, tmp_path / "calm" / "out", "--fraction", 0.99)
    wanted = command(source, world.key, tmp_path / "m" / "out", "--fraction", 0.99, "--batch-size", 1)
    done = disk_full(forks, tmp_path / "m", wanted, source, 8000, f"out/{name}")
    assert done == (8 if name == "b/big.png" else 0)  # other files come before the marks, and big.png is the last
    assert tree(tmp_path / "m") == tree(tmp_path / "calm")


def test_a_copy_that_does_not_fit_is_named_and_the_next_run_goes_on(world, forks, tmp_path):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    write_folder(source, {"b/big.png": noise(0, 60)})
    good(source, world.key, tmp_path / "calm" / "out", "--fraction", 0)
    wanted = command(source, world.key, tmp_path / "m" / "out", "--fraction", 0)
    disk_full(forks, tmp_path / "m", wanted, source, 8000, "out/b/big.png")
    assert tree(tmp_path / "m") == tree(tmp_path / "calm")


def test_a_manifest_that_does_not_fit_is_named_and_the_next_run_goes_on(world, forks, tmp_path):
    source = write_folder(tmp_path / "imgs", {f"{i}.png": photo(i, side=12) for i in range(9)})
    good(source, world.key, tmp_path / "calm" / "out")
    assert (tmp_path / "calm" / "out.manifest.jsonl").stat().st_size > 2500
    assert max(p.stat().st_size for p in (tmp_path / "calm" / "out").iterdir()) < 1000
    wanted = command(source, world.key, tmp_path / "m" / "out", "--batch-size", 1)
    done = disk_full(forks, tmp_path / "m", wanted, source, 2000, "out.manifest.jsonl")
    assert 0 < done < 9
    assert tree(tmp_path / "m") == tree(tmp_path / "calm")


def test_a_shard_that_does_not_fit_is_named_and_the_next_run_goes_on(world, forks, marked, tmp_path):
    limit = (marked[0] / "out" / "words.tar").stat().st_size - 1
    assert (marked[0] / "out.manifest.jsonl").stat().st_size < limit
    (tmp_path / "shards").mkdir()
    pack(tmp_path / "shards" / "words.tar", NAMED, GNU)
    good(tmp_path / "shards", world.key, tmp_path / "calm" / "out")
    wanted = command(tmp_path / "shards", world.key, tmp_path / "m" / "out")
    done = disk_full(forks, tmp_path / "m", wanted, tmp_path / "shards", limit, "out/words.tar")
    assert done == 4
    assert tree(tmp_path / "m") == tree(tmp_path / "calm")


def test_a_disk_that_is_full_for_one_of_several_processes_is_told_once(world, forks, tmp_path):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    write_folder(source, {"b/big.png": noise(0, 60), "c/last.png": photo(50)})  # the first process has the last but one
    results = forks.together(*command(source, world.key, tmp_path / "out"), largest=8000)
    assert all(r.code != 0 for r in results)
    assert str(tmp_path / "out" / "b" / "big.png") in errors(*results)[0]
    assert len(errors(*results)) == 1, errors(*results)
    assert forks.run(*command(source, world.key, tmp_path / "out")).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_must_not_be_written_to_is_named(world, tmp_path):
    wanted = (world.folder, world.key, tmp_path / "m" / "out")
    good(*wanted)
    before = tree(tmp_path / "m")
    (tmp_path / "m" / "out" / "a" / "0.png").unlink()
    (tmp_path / "m" / "out" / "a").chmod(0o500)
    try:
        assert str(tmp_path / "m" / "out" / "a" / "0.png") in one_error(mark(*wanted))
    finally:
        (tmp_path / "m" / "out" / "a").chmod(0o700)
    assert good(*wanted, "--json").json["skipped"] == 7
    assert tree(tmp_path / "m") == before


def test_a_source_that_changes_between_runs_is_done_again_alone(world, tmp_path):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    good(source, world.key, tmp_path / "m" / "out", "--fraction", 0.5, "--choose", "random")
    rows = rows_of(tmp_path / "m" / "out.manifest.jsonl")
    for status in ("marked", "copied"):
        name = next(path for path, row in rows.items() if row["status"] == status)
        before, inodes = tree(tmp_path / "m" / "out"), stamps(tmp_path / "m" / "out")
        (source / name).write_bytes(photo(99 + len(status) + len(name)) + status.encode())
        settings = (source, world.key, tmp_path / "m" / "out", "--fraction", 0.5, "--choose", "random", "--json")
        assert good(*settings).json["skipped"] == 7
        after = tree(tmp_path / "m" / "out")
        assert {path for path in after if after[path] != before[path]} == {name}
        again = {path for path, stamp in stamps(tmp_path / "m" / "out").items() if stamp != inodes[path]}
        assert {path for path in again if path.is_file()} == {tmp_path / "m" / "out" / name}
    good(source, world.key, tmp_path / "fresh" / "out", "--fraction", 0.5, "--choose", "random")
    assert tree(tmp_path / "m") == tree(tmp_path / "fresh")


# ---------------------------------------------------------------- going on with a set that changed


def test_nothing_is_written_through_a_link_in_the_output(world, tmp_path):
    """Not even with --force: the link may lead to the source."""
    source = Path(shutil.copytree(world.folder, tmp_path / "src"))
    good(source, world.key, tmp_path / "out")
    name = sorted(path.name for path in source.iterdir() if path.is_dir())[0]
    shutil.rmtree(tmp_path / "out" / name)
    (tmp_path / "out" / name).symlink_to(source / name)
    before = tree(source)
    for more in ((), ("--force",), ("--dry-run",)):
        assert str(tmp_path / "out" / name) in one_error(mark(source, world.key, tmp_path / "out", *more))
    assert tree(source) == before


def test_a_class_never_changes_its_carrier_without_force(world, tmp_path):
    source = Path(shutil.copytree(world.folder, tmp_path / "src"))
    good(source, world.key, tmp_path / "out")
    before = tree(tmp_path / "out")
    write_folder(source, {"a first class/0.png": photo(50)})  # a key without names numbers classes in their order
    for more in ((), ("--dry-run",)):
        assert "carrier 1, and now has carrier 2" in one_error(mark(source, world.key, tmp_path / "out", *more))
    assert tree(tmp_path / "out") == before
    manifest_file = tmp_path / "out.manifest.jsonl"
    lines = manifest_file.read_text().splitlines(keepends=True)
    manifest_file.write_text(lines[0])  # as if the first of several processes had not come to anything
    manifest_file.with_name(f"{manifest_file.name}.rank1").write_text("".join(lines))
    assert "carrier 1" in one_error(mark(source, world.key, tmp_path / "out"))
    assert tree(tmp_path / "out") == before
    good(source, world.key, tmp_path / "out", "--force")


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_from_marking(world, tmp_path, monkeypatch, error):
    """Some network file systems are mounted like this."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    good(world.folder, world.key, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_what_was_marked_stays_marked_when_images_come_and_go(world, tmp_path):
    """A tenth of more or fewer images is another choice, but published marks cannot be taken back."""
    source = write_folder(tmp_path / "src", {f"cat/{i:02}.jpg": photo(i, "JPEG") for i in range(10)})
    good(source, world.key, tmp_path / "out", "--fraction", 0.3)
    manifest_file = tmp_path / "out.manifest.jsonl"
    earlier = {p: r["sha256_out"] for p, r in rows_of(manifest_file).items() if r["status"] == "marked"}
    assert len(earlier) == 3
    write_folder(source, {f"cat/{i:02}.jpg": photo(i, "JPEG") for i in range(10, 20)})
    (source / next(path for path in rows_of(manifest_file) if path not in earlier)).unlink()
    stale = tmp_path / "out" / next(path for path in rows_of(manifest_file) if path not in tree(source))
    stale.unlink()  # of what was only copied
    good(source, world.key, tmp_path / "out", "--fraction", 0.3)
    rows = rows_of(manifest_file)
    assert {path: rows[path]["sha256_out"] for path in earlier} == earlier
    assert sum(row["status"] == "marked" for row in rows.values()) >= 6
    assert set(tree(tmp_path / "out")) == {row["output"] for row in rows.values()}
    for path in sorted(rows.keys() - earlier.keys())[:-1]:
        (source / path).unlink()
        (tmp_path / "out" / rows[path]["output"]).unlink()
    broken = source / (path := sorted(earlier)[0])
    whole = broken.read_bytes()
    broken.write_bytes(b"")  # read as it is, it is no image; then it is whole again
    assert mark(source, world.key, tmp_path / "out", "--fraction", 0.3).code == 1
    broken.write_bytes(whole)
    good(source, world.key, tmp_path / "out", "--fraction", 0.3)
    assert rows_of(manifest_file)[path]["sha256_out"] == earlier[path]


def test_runs_side_by_side_in_one_folder_leave_each_other_s_manifest_alone(world, tmp_path):
    """With the same key and settings, they begin with the same line."""
    good(world.folder, world.key, tmp_path / "a")
    first = (tmp_path / "a.manifest.jsonl").read_bytes()
    others = tmp_path / ".fedcba9876543210.part"
    others.write_bytes(first)
    good(world.folder, world.key, tmp_path / "b")
    assert others.read_bytes() == first


def test_files_that_are_not_the_source_s_are_told(world, tmp_path):
    source = Path(shutil.copytree(world.folder, tmp_path / "src"))
    (source / "passwords.txt").write_text("secret")
    good(source, world.key, tmp_path / "out")
    (source / "passwords.txt").unlink()
    for more in ((), ("--force",)):
        assert "not the source's: 1, such as passwords.txt" in good(source, world.key, tmp_path / "out", *more).out
    (tmp_path / "out" / "passwords.txt").unlink()
    assert "not the source's" not in good(source, world.key, tmp_path / "out").out


def test_a_file_that_no_run_made_is_not_overwritten_when_the_source_gets_one_of_its_name(world, tmp_path):
    source = Path(shutil.copytree(world.folder, tmp_path / "src"))
    good(source, world.key, tmp_path / "out")
    folder = next(path for path in sorted(source.iterdir()) if path.is_dir()).name
    own, new = tmp_path / "out" / folder / "mine.png", source / folder / "mine.png"
    for mine in (b"no image", noise(5, 32), noise(5, 24)):
        own.write_bytes(mine)
        new.write_bytes(noise(6, 32))
        for more in ((), ("--dry-run",)):
            error = one_error(mark(source, world.key, tmp_path / "out", *more))
            assert "mine.png was not made by an earlier run" in error
        assert own.read_bytes() == mine
    good(source, world.key, tmp_path / "out", "--force")
    assert 30 < measured_psnr(own, new) < 60
    late = source / folder / "late.png"
    late.write_bytes(noise(7, 32))
    shutil.copy(late, tmp_path / "out" / folder)  # as a run leaves it that is killed before it says so
    good(source, world.key, tmp_path / "out")
    assert 30 < measured_psnr(tmp_path / "out" / folder / "late.png", late) < 60


def test_an_output_of_shards_is_not_gone_on_with_as_a_folder_nor_the_reverse(world, tmp_path):
    good(world.folder, world.key, tmp_path / "folder")
    good(world.shards, world.key, tmp_path / "shards")
    before = tree(tmp_path)
    for source, output in ((world.shards, "folder"), (world.folder, "shards")):
        assert "other images" in one_error(mark(source, world.key, tmp_path / output))
    assert tree(tmp_path) == before
    good(world.shards, world.key, tmp_path / "folder", "--force")


def test_members_of_any_name_are_marked(world, tmp_path):
    """Longer than a file's name can be, or a name that is another's folder."""
    names = ["cat/" + "n" * 300 + ".png", "cat/a.png", "cat/a.png/b.png"]
    shard = pack(tmp_path / f"{'s' * 251}.tar", [(name, photo(i)) for i, name in enumerate(names)])
    result = good(shard, world.key, tmp_path / "out.tar", "--json").json
    assert (result["marked"], result["failed"]) == (3, [])
    assert set(images_in(tmp_path / "out.tar")) == set(names)


def test_a_sample_s_mask_is_no_picture_to_mark(world, tmp_path):
    mask = noise(3, 32)
    members = [("0.jpg", photo(0, "JPEG")), ("0.seg.png", mask), ("1.left.png", photo(1)), ("1.right.png", photo(2))]
    shard = pack(tmp_path / "s.tar", [*members, ("2.gif", b"GIF89a"), ("0.cls", b"0"), ("1.cls", b"1")])
    result = good(shard, world.key, tmp_path / "out.tar", "--json").json
    assert (result["marked"], result["formats_unmarked"]) == (3, {".seg.png": 1, ".gif": 1})
    assert images_in(tmp_path / "out.tar")["0.seg.png"] == mask


def test_shards_beside_a_hidden_folder_are_shards(world, tmp_path):
    (tmp_path / "s" / ".ipynb_checkpoints").mkdir(parents=True)
    pack(tmp_path / "s" / "a.tar", [("cat/0.png", photo(0))])
    assert good(tmp_path / "s", world.key, tmp_path / "out", "--json").json["marked"] == 1


def test_what_has_no_room_for_a_mark_is_told(world, tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.eye(32) > 0).save(file, "PNG")
    source = write_folder(tmp_path / "src", {"cat/0.png": file.getvalue(), "cat/1.png": photo(1)})
    result = good(source, world.key, tmp_path / "out")
    assert "1 of the marked images came out unchanged" in result.out
    assert good(source, world.key, tmp_path / "out", "--json").json["unchanged"] == 1


def test_folders_that_loaders_would_count_as_classes_are_told(world, tmp_path):
    source = write_folder(
        tmp_path / "src", {"cat/0.png": photo(0), "ant/0.ppm": b"P6", "docs/readme.txt": b"", "cat/a/1.png": photo(1)}
    )
    result = good(source, world.key, tmp_path / "out")
    assert "ant/" in result.err
    assert "docs" not in result.err


def bomb(side):
    """A PNG file that claims to be this many pixels wide and high."""

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(bytes(99))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + body


def test_each_of_several_broken_files_is_named_and_the_rest_marked(world, tmp_path):
    source = shutil.copytree(world.folder, tmp_path / "imgs")
    broken = {
        "a/bomb.png": bomb(20_000),
        "a/large.png": bomb(10_000),
        "a/cut.png": photo(1)[:-40],
        "b/cut.jpg": photo(1, "JPEG")[:500],
        "b/zero.png": b"",
    }
    write_folder(source, broken)
    before = tree(source)
    result = mark(source, world.key, tmp_path / "m" / "out", "--choose", "random", "--json")
    assert result.code == 1
    assert (result.json["images"], result.json["marked"]) == (13, 8)
    assert sorted(f["path"] for f in result.json["failed"]) == sorted(broken)
    said = errors(result)
    assert len(said) == 5
    for name in broken:
        (message,) = [line for line in said if str(source / name) in line]
        assert {"zero": "empty", "bomb": "bomb", "large": "bomb"}.get(Path(name).stem, "image") in message
    assert tree(source) == before
    good(world.folder, world.key, tmp_path / "calm" / "out", "--choose", "random")
    assert tree(tmp_path / "m" / "out") == tree(tmp_path / "calm" / "out")


# ---------------------------------------------------------------- SSIM


@pytest.mark.parametrize(("height", "width"), [(11, 11), (11, 30), (23, 12), (20, 20)])
@pytest.mark.parametrize("change", [1, 20, 255])
def test_ssim_is_that_of_the_paper(height, width, change):
    draw = np.random.default_rng(height * width)
    a = draw.uniform(0, 255, (height, width, 3)).astype(np.float32)
    b = np.clip(a + draw.uniform(-change, change, a.shape), 0, 255).astype(np.float32)
    assert images.ssim(a, b) == pytest.approx(brute_ssim(a, b), abs=1e-9)
    assert images.ssim(b, a) == pytest.approx(images.ssim(a, b), abs=1e-12)


def test_ssim_of_flat_images_is_that_of_their_luminance():
    a, b = np.full((16, 16, 3), 100.0), np.full((16, 16, 3), 140.0)
    wanted = (2 * 100 * 140 + 2.55**2) / (100**2 + 140**2 + 2.55**2)
    assert images.ssim(a, b) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 5), (10, 10), (10, 40), (11, 11), (32, 20)])
def test_ssim_is_1_for_equal_images_and_less_for_others_of_any_size(shape):
    a = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.float32)
    assert images.ssim(a, a) == pytest.approx(1, abs=1e-12)
    other = images.ssim(a, 255 - a)
    assert math.isfinite(other)
    assert -1 <= other < 0.999


# ---------------------------------------------------------------- progress


def test_progress_moves_with_every_step_and_every_file(world, tmp_path):
    plan = make_plan(world.folder, tmp_path / "out", load_key(world.key), MarkOptions(steps=4, batch_size=4))
    done, shown = [], []

    def watch(summary):
        done.append(summary.done)
        shown.append(summary.done + summary.under_way)

    run(plan, watch)
    assert set(np.diff(done)) == {0, 1}
    assert shown == sorted(shown)
    assert {0, 1, 2, 3} <= set(shown[: done.index(1)])  # a quarter of four images a step, before one is done
    assert (done[-1], shown[-1]) == (8, 8)


# ---------------------------------------------------------------- working ahead


class Now:
    """A pool that runs each task at once and counts them."""

    def __init__(self):
        self.done = []

    def submit(self, work, item):
        future = Future()
        self.done.append(item)
        try:
            future.set_result(work(item))
        except ValueError as error:
            future.set_exception(error)
        return future


@given(st.integers(0, 20), st.integers(1, 8))
@settings(deadline=None)
def test_working_ahead_keeps_the_order_and_the_limit(count, limit):
    pool, seen = Now(), []
    for result in prefetch(pool, lambda item: item * item, iter(range(count)), limit):
        seen.append(result)
        assert len(pool.done) - len(seen) < limit
        assert len(pool.done) == min(count, len(seen) - 1 + limit)  # nor less than it may
    assert seen == [item * item for item in range(count)]
    assert pool.done == list(range(count))


def test_working_ahead_keeps_the_order_whichever_thread_is_first():
    gates = [threading.Event() for _ in range(6)]

    def work(item):
        if item < 5:
            assert gates[item + 1].wait(60)  # not before the one that follows
        gates[item].set()
        return item

    with ThreadPoolExecutor(6) as pool:
        assert list(prefetch(pool, work, range(6), 6)) == list(range(6))


def test_an_error_of_the_work_comes_in_its_turn_and_ends_it():
    def work(item):
        if item == 3:
            raise ValueError("three")
        return item

    pool, seen = Now(), []
    with pytest.raises(ValueError, match="three"):
        seen.extend(prefetch(pool, work, range(100), 4))
    assert seen == [0, 1, 2]
    assert len(pool.done) <= 7


def test_an_error_of_the_items_comes_through():
    def items():
        yield 1
        raise ValueError("no more")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="no more"):
        list(prefetch(pool, abs, items(), 1))


@pytest.mark.parametrize("how", ["close", "error"])
def test_ending_early_cancels_what_has_not_begun(how):
    gate, begun = threading.Event(), []

    def work(item):
        begun.append(item)
        if item == 0 and how == "error":
            raise ValueError("zero")
        assert item == 0 or gate.wait(60)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = prefetch(pool, work, range(100), 10)
        if how == "error":
            with pytest.raises(ValueError, match="zero"):
                next(results)
        else:
            assert next(results) == 0
            results.close()
        gate.set()
    assert set(begun) <= {0, 1}
