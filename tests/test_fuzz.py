"""Mutants of small valid files, for every reader: each is read or refused, in little memory and in time.

The mutants are read in a process of their own (this file, run as a program), which forks once for every reader, under
a limit of memory. A watchdog ends what hangs. All follows from the numbers of the mutants.
"""

import io
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import environment
from PIL import Image

from radiotag.answers import read_answers
from radiotag.blackbox import load_queries, make, save_queries
from radiotag.errors import RadiotagError
from radiotag.images import decode
from radiotag.keys import load_key, new_key, save_key
from radiotag.manifest import marked_rows, read_header, recorded_classes
from radiotag.networks import marking_weights, read_checkpoint, spec_from
from radiotag.public import public_half, read_public
from radiotag.shards import list_shards

SMOKE, MANY = 30, 3000  # mutants of each file
MEMORY = 2**29  # bytes that a reader may take beyond what is loaded already
SECONDS = 60  # for one mutant, until the watchdog bites
EXTREMES = (0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 255, 65535)
DIGITS = re.compile(rb"\d+")


class Sample(NamedTuple):
    """A valid file, how to read it, and how to mend what would hide a mutation from the reader."""

    name: str
    data: bytes
    read: Callable[[Path], object]
    take_apart: Callable[[bytes], list[bytes]] = lambda data: [data]
    put_together: Callable[[list[bytes]], bytes] = b"".join


# ---------------------------------------------------------------- mutations


def mutant(sample: Sample, number: int) -> bytes:
    """Mutant number so and so: of the whole file, or of one of its parts, with all else mended."""
    draw = random.Random(f"{sample.name} {number}")
    if draw.random() < 0.3:
        return mutated(sample.data, draw)
    parts = sample.take_apart(sample.data)
    which = draw.randrange(len(parts))
    parts[which] = mutated(parts[which], draw)
    return sample.put_together(parts)


def mutated(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        data = draw.choice((flipped, flipped, cut, doubled, spliced, extreme, extreme, written, written))(data, draw)
    return data


def place(data: bytes, draw: random.Random) -> int:
    """A position; most are near the start, where headers are."""
    return min(len(data) - 1, int(len(data) * draw.random() ** draw.choice((1, 4)))) if data else 0


def flipped(data, draw):
    if not data:
        return data
    at = place(data, draw)
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def cut(data, draw):
    return data[: place(data, draw)]


def doubled(data, draw):
    at, length = place(data, draw), draw.choice((1, 4, 16, 512))
    return data[:at] + data[at : at + length] * draw.choice((2, 2, 50)) + data[at + length :]


def spliced(data, draw):
    at, other, length = place(data, draw), place(data, draw), draw.choice((1, 4, 16, 64, 512))
    return data[:at] + data[other : other + length] + data[at + length :]


def extreme(data, draw):
    """A number of 2, 4 or 8 bytes."""
    at, width = place(data, draw), draw.choice((2, 4, 8))
    value = draw.choice(EXTREMES) % 2 ** (8 * width)
    return data[:at] + value.to_bytes(width, draw.choice(("little", "big"))) + data[at + width :]


def written(data, draw):
    """A number in decimal digits."""
    found = list(DIGITS.finditer(data[:20_000]))
    if not found:
        return extreme(data, draw)
    one = draw.choice(found)
    value = draw.choice((*map(str, EXTREMES), "1e999", "9" * 400, "[" * 2000, "null", '"x"', "{}", "-0.5", "NaN"))
    return data[: one.start()] + value.encode() + data[one.end() :]


def from_zip(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [part for name in file.namelist() for part in (name.encode(), file.read(name))]


def into_zip(parts):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, part in zip(parts[::2], parts[1::2], strict=True):
            file.writestr(name.decode("latin-1").replace("\0", "_") or "x", part)
    return packed.getvalue()


def from_blocks(data):
    return [data[at : at + 512] for at in range(0, len(data), 512)]


def into_blocks(parts):
    """A shard whose headers have matching sums."""
    mended = []
    for part in parts:
        if part[257:262] == b"ustar" and len(part) == 512:
            sums = part[:148] + b" " * 8 + part[156:]
            mended.append(part[:148] + b"%06o\0 " % sum(sums) + part[156:])
        else:
            mended.append(part)
    return b"".join(mended)


def from_safetensors(data):
    (length,) = struct.unpack("<Q", data[:8])
    return [data[8 : 8 + length], data[8 + length :]]


def into_safetensors(parts):
    return struct.pack("<Q", len(parts[0])) + b"".join(parts)


# ---------------------------------------------------------------- samples and readers


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2).half(), "n": torch.tensor(3)}
SPEC = {
    "architecture": "resnet10", "classes": 2, "small_stem": True, "image_size": 32, "mean": [0.4] * 3, "std": [0.2] * 3,
    "class_names": ["ant", "bee"],
}  # fmt: skip


def checkpoint(path):
    state, metadata = read_checkpoint(path)
    spec_from(metadata)
    return [float(value.double().sum()) for value in state.values()]


def saved(new):
    packed = io.BytesIO()
    extra = {"optimiser": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}}
    torch.save({"model": STATE, "radiotag": SPEC, **extra}, packed, _use_new_zipfile_serialization=new)
    return packed.getvalue()


def scripted():
    packed = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 2))), packed)
    return packed.getvalue()


def exported():
    layout = {"dtype": 7, "sizes": [{"as_int": 2}, {"as_int": 3}], "strides": [{"as_int": 3}, {"as_int": 1}]}
    entry = {"path_name": "weight_0", "use_pickle": False, "tensor_meta": layout | {"storage_offset": {"as_int": 0}}}
    config = json.dumps({"config": {"a.weight": entry}}).encode()
    folder = b"m/data/weights/"
    return into_zip(
        [folder + b"model_weights_config.json", config, folder + b"weight_0", struct.pack("<6f", *range(6))]
    )


def shard():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("a/0.png", picture("PNG")), ("a/0.cls", b"3"), ("ä" * 120 + ".jpg", picture("JPEG"))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def picture(kind):
    packed = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(packed, kind)
    return packed.getvalue()


def read_shard(path):
    archive, listing = list_shards(path)
    return [archive.read(item.path) for item in listing.items]


def read_whole_manifest(path):
    return read_header(path), marked_rows(path), recorded_classes(path, 3)


def samples(folder: Path) -> list[Sample]:
    """The valid files of every kind that radiotag reads."""
    key = new_key(*marking_weights("builtin"), ["ant", "bee"], entropy=lambda count: bytes(range(count)))
    save_key(folder / "k.safetensors", key)
    queries = make(key, [torch.full((3, 8, 8), n, dtype=torch.uint8) for n in (1, 2)], [0, 1], ["ant", "bee"], 2)
    save_queries(folder / "q.safetensors", queries, key)
    names = [name for row in queries.names for name in row]
    quality = {"psnr": 40.5, "ssim": 1, "linf": 1, "gain": 0.5}
    rows = [
        {"path": f"{c}/0.png", "class": c, "row": i, "status": "marked", "sha256_out": "00", "output": f"{c}/0.png"}
        for i, c in enumerate(("ant", "bee"))
    ]
    header = {"radiotag": 1, "fingerprint": key.fingerprint}
    lines = "".join(json.dumps(row) + "\n" for row in (header, *(row | quality for row in rows))).encode()
    labels = "".join(f"{n}.png,ant\n" for n in names)
    numbers = "".join(f"{n}.png,0.25,0.75\n" for n in names)
    answers = json.dumps({n: [0.25, 0.75] for n in names})
    by_name = json.dumps({f"x/{n}.png": {"ant": 1, "bee": 0} for n in names})
    tensors = safetensors.torch.save(STATE, {"radiotag": json.dumps(SPEC)})
    in_zip, in_safetensors = (from_zip, into_zip), (from_safetensors, into_safetensors)

    def read(path):
        return read_answers(path, queries)

    def read_queries(path):
        return load_queries(path, key)

    return [
        Sample("k.safetensors", (folder / "k.safetensors").read_bytes(), load_key, *in_safetensors),
        Sample("k.pub", public_half(key).encode(), read_public),
        Sample("m.jsonl", lines, read_whole_manifest),
        Sample("q.safetensors", (folder / "q.safetensors").read_bytes(), read_queries, *in_safetensors),
        Sample("labels.csv", f"file,label\n{labels}".encode(), read),
        Sample("numbers.csv", f"file,ant,bee\n{numbers}".encode(), read),
        Sample("lists.json", answers.encode(), read), Sample("names.json", by_name.encode(), read),
        Sample("zip.pt", saved(True), checkpoint, *in_zip), Sample("old.pt", saved(False), checkpoint),
        Sample("w.safetensors", tensors, checkpoint, *in_safetensors), Sample("e.pt2", exported(), checkpoint, *in_zip),
        Sample("script.pt", scripted(), checkpoint, *in_zip),
        Sample("s.tar", shard(), read_shard, from_blocks, into_blocks),
        *(Sample(f"i.{kind.lower()}", picture(kind), lambda p: decode(p.read_bytes(), str(p)))
          for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")),
    ]  # fmt: skip


# ---------------------------------------------------------------- the process that reads


def read_all(sample: Sample, folder: Path, count: int) -> dict[str, int]:
    """Read mutants, under limits; prints what is neither read nor refused. Returns what came of them."""
    path, came = folder / sample.name, {"read": 0, "refused": 0}
    path.touch(mode=0o600)
    path.write_bytes(sample.data)
    (folder / "now").write_text("none")
    signal.alarm(SECONDS)
    sample.read(path)  # the file itself is valid, and what is loaded only now does not count
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    for number in range(count):
        path.write_bytes(mutant(sample, number))
        (folder / "now").write_text(str(number))
        signal.alarm(SECONDS)
        try:
            sample.read(path)
            came["read"] += 1
        except RadiotagError as error:
            came["refused"] += 1
            if sample.name not in str(error):
                print(f"{sample.name} mutant {number} is not named: {error}"[:300], flush=True)
        except BaseException:
            print(f"{sample.name} mutant {number}: {traceback.format_exc()[-700:]}", flush=True)
        signal.alarm(0)
    return came


def run(wanted: str, count: int) -> None:
    """Fuzz the samples of these names, each in a fork, which may die."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sample in samples(folder):
            if wanted not in ("all", sample.name):
                continue
            pid = os.fork()
            if pid == 0:
                try:
                    warnings.simplefilter("ignore")
                    print("done", sample.name, json.dumps(read_all(sample, folder, count)), flush=True)
                except BaseException:
                    print(f"{sample.name}: {traceback.format_exc()[-700:]}", flush=True)
                finally:
                    os._exit(0)
            status = os.waitpid(pid, 0)[1]
            if status:
                print(
                    f"{sample.name} mutant {(folder / 'now').read_text()}: the process ended with {status}", flush=True
                )


def fuzzed(wanted: str, count: int) -> list[str]:
    command = [sys.executable, __file__, wanted, str(count)]
    folder = str(Path(__file__).parent)
    env = environment()
    env["PYTHONPATH"] += os.pathsep + folder
    found = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.splitlines()


NAMES = (
    "k.safetensors", "k.pub", "m.jsonl", "q.safetensors", "labels.csv", "numbers.csv", "lists.json", "names.json",
    "zip.pt", "old.pt", "w.safetensors", "e.pt2", "script.pt", "s.tar", "i.png", "i.jpeg", "i.webp", "i.tiff", "i.bmp",
)  # fmt: skip


def test_a_few_mutants_of_every_file_are_read_or_refused():
    lines = fuzzed("all", SMOKE)
    assert [line for line in lines if not line.startswith("done ")] == []
    assert tuple(line.split()[1] for line in lines) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_mutants_are_read_or_refused(name):
    lines = fuzzed(name, MANY)
    assert [line for line in lines if not line.startswith("done ")] == []
    came = json.loads(lines[0].split(" ", 2)[2])
    assert came["refused"] > MANY / 20
    assert sum(came.values()) == MANY


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
