"""Tar shards in WebDataset's layout: members with the same name up to the first dot form a sample; `.cls` is its class.

Marking a shard copies its bytes and replaces the marked members. All other bytes, headers and padding stay the same.
"""

import errno
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from radiotag.errors import RadiotagError
from radiotag.files import PART, fill_atomically
from radiotag.images import OTHER_SUFFIXES, SUFFIXES
from radiotag.listing import Item, Listing, class_level

BLOCK = 512
CHUNK = 2**20
CLASSES = 1_000_000  # most classes that a key can have
LONGEST = 4096  # bytes of a member's name
LARGEST_JSON = 2**20  # bytes of a member that may tell a class
NUMBER = re.compile(r"[+-]?[0-9]{1,9}")
CLASS_KEYS = ("cls", "class", "label", "target", "class_id", "label_id", "category", "class_name")
# What Python's reader raises for sizes and sparse maps of any kind, besides its own errors.
DAMAGED = (OSError, tarfile.TarError, ValueError, LookupError, ArithmeticError, TypeError, MemoryError)


@dataclass(frozen=True, slots=True)
class Member:
    """The place of an image in a shard, in bytes."""

    header: int  # the header block with its size, the last block before its data
    data: int
    size: int

    @property
    def end(self) -> int:
        """The end of its data, with padding."""
        return self.data + -(-self.size // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """Shards with an index of their images by path: SHARD/MEMBER."""

    root: Path  # the folder of the shards
    shards: tuple[str, ...]
    members: dict[str, Member]
    unmarked: Counter[str]  # suffixes of members that look like images but are only copied

    def by_shard(self) -> dict[str, list[tuple[str, Member]]]:
        """The images of each shard, with their paths."""
        images: dict[str, list[tuple[str, Member]]] = {shard: [] for shard in self.shards}
        for path, member in self.members.items():
            images[path.split("/", maxsplit=1)[0]].append((path, member))
        return images

    def read(self, path: PurePosixPath) -> bytes:
        """The bytes of one image."""
        member = self.members[path.as_posix()]
        with (self.root / path.parts[0]).open("rb") as file:
            file.seek(member.data)
            return file.read(member.size)


def is_archive(source: Path) -> bool:
    """Whether a path is a .tar file, or a folder with .tar files and no sub-folder that could be a class."""
    if source.is_dir():
        folders = (p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
        return any(is_shard(p) for p in source.iterdir()) and next(folders, None) is None
    return is_shard(source)


def is_shard(path: Path) -> bool:
    """Whether a path is a file with the suffix .tar."""
    return path.suffix.lower() == ".tar" and path.is_file()


def list_shards(source: Path) -> tuple[Archive, Listing]:
    """The index of shards, and their listing (see `list_folder`) with images in the order of the shards.

    The class of a sample is the content of its `.cls` member, else what its `.json` member calls so, else the folder in
    its members' names, else "". Samples without a class beside others that have one are only copied; −1 is none. If all
    classes are numbers, they are carrier rows, as they are the outputs of a model. RadiotagError for shards that cannot
    be read, have no images, or lie beside loose images, and for members that could not be written back.
    """
    files = [source] if source.is_file() else sorted(source.iterdir())
    shards = [path for path in files if is_shard(path)]
    other_names = (path.name for path in files if path not in shards and path.is_file())
    other_files = [PurePosixPath(name) for name in other_names if not PART.fullmatch(name)]
    loose = next((p for p in other_files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")), None)
    if loose:
        raise RadiotagError(f"{source}: images both in shards and beside them ({loose})", "separate them")
    index = _Index()
    for shard in shards:
        try:
            index.add(shard)
        except DAMAGED as error:
            raise RadiotagError(f"{shard}: not a tar file that can be read ({error})", "replace the file") from error
    if not index.members:
        raise RadiotagError(f"no images in {source}", f"members are taken by suffix: {' '.join(sorted(SUFFIXES))}")
    index.settle_labels()
    items = [Item(path=PurePosixPath(path), label=index.labels[path]) for path in index.members]
    archive = index.archive(shards[0].parent, tuple(shard.name for shard in shards))
    return archive, Listing(items, _class_names(set(index.labels.values())), other_files)


def finished_archive(output: Path) -> Archive | None:
    """The index of all readable shards that an earlier run has assembled; None if there are none."""
    index = _Index()
    files = ([output] if output.is_file() else sorted(output.iterdir())) if output.exists() else []
    for shard in files:
        if is_shard(shard):
            readable = _Index()
            try:
                readable.add(shard)
            except (*DAMAGED, RadiotagError):
                continue  # damaged: it will be assembled again
            index.members |= readable.members
    return index.archive(output.parent if output.is_file() else output) if index.members else None


def _class(text: str) -> str:
    """A class as a member writes it; numbers without signs and zeros before them, and "" for −1, which is no class."""
    text = text.strip().removeprefix("\ufeff").strip()
    number = int(text) if NUMBER.fullmatch(text) else None
    return text if number is None else str(number) if number >= 0 else ""


def _class_in(data: bytes) -> str:
    """The class in a sample's JSON member: a number or a text under a usual name; "" for none."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    found = (values.get(name) for name in CLASS_KEYS) if isinstance(values, dict) else ()
    return next((_class(str(value)) for value in found if isinstance(value, int | str)), "")


def _class_names(labels: set[str]) -> list[str]:
    if all(label.isascii() and label.isdigit() and str(int(label)) == label for label in labels):
        count = max(map(int, labels)) + 1
        if count > CLASSES:
            raise RadiotagError(
                f"the class {count - 1} is beyond the {CLASSES} carriers that a key can have", "rename it"
            )
        return [str(row) for row in range(count)]
    return sorted(labels)


@dataclass(slots=True)
class _Index:
    """The growing index while shards are read one after the other."""

    members: dict[str, Member] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    by_folder: dict[str, PurePosixPath] = field(default_factory=dict)  # path → sample, in shards that tell no class
    unmarked: Counter[str] = field(default_factory=Counter)

    def archive(self, root: Path, shards: tuple[str, ...] = ()) -> Archive:
        """The finished index."""
        return Archive(root=root, shards=shards, members=self.members, unmarked=self.unmarked)

    def add(self, shard: Path) -> None:
        """Add a shard's images and their classes, and count members that look like images but cannot be marked."""
        classes: dict[str, str] = {}
        samples: dict[str, str] = {}
        described: dict[str, str] = {}
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
                name = PurePosixPath(info.name)
                hidden = any(part.startswith(".") and part != ".." for part in name.parts)
                if not info.isreg() or hidden or name.name in {"", ".."}:
                    continue
                path = f"{shard.name}/{name}"
                sample = str(name.with_name(name.name.split(".")[0]))
                if name.suffix.lower() == ".cls":
                    file = tar.extractfile(info)
                    classes[sample] = _class(file.read(1024).decode("utf-8", "replace")) if file else ""
                elif name.suffix.lower() == ".json" and info.size <= LARGEST_JSON:
                    file = tar.extractfile(info)
                    described[sample] = _class_in(file.read()) if file else ""
                elif name.suffix.lower() in SUFFIXES:
                    _check_member(shard, info, path in self.members)
                    header = info.offset_data - BLOCK
                    self.members[path] = Member(header=header, data=info.offset_data, size=info.size)
                    samples[path] = sample
                elif name.suffix.lower() in OTHER_SUFFIXES:
                    self.unmarked[name.suffix.lower()] += 1
            _check_end(shard, tar.offset)
        self._remove_masks(samples)
        told = {path: classes.get(sample, described.get(sample, "")) for path, sample in samples.items()}
        self.labels |= told
        if not any(told.values()):
            self.by_folder |= {path: PurePosixPath(sample) for path, sample in samples.items()}

    def settle_labels(self) -> None:
        """Give each image its class: what its sample says, or if none of its shard does, a folder in its name.

        Where some samples have a class, those without are left out: they would be taken for one (`class_level`).
        """
        level = class_level(self.by_folder.values())
        for path, sample in self.by_folder.items():
            self.labels[path] = sample.parts[level] if len(sample.parts) > 1 else ""
        for path in [path for path, label in self.labels.items() if not label] if any(self.labels.values()) else ():
            self.unmarked["images without a class"] += 1
            del self.members[path], self.labels[path]

    def _remove_masks(self, samples: dict[str, str]) -> None:
        """Remove images with a further suffix (0.seg.png) beside a sample's picture (0.jpg), such as masks."""
        is_picture = {path: PurePosixPath(path).stem == PurePosixPath(name).name for path, name in samples.items()}
        with_picture = {sample for path, sample in samples.items() if is_picture[path]}
        masks = [path for path, sample in samples.items() if sample in with_picture and not is_picture[path]]
        for path in masks:
            kind, suffix = PurePosixPath(path).suffixes[-2:]
            self.unmarked[suffix if kind[1:].isdecimal() else kind + suffix] += 1  # counts a film's frames together
            del self.members[path], samples[path]


def _check_end(shard: Path, end: int) -> None:
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {end}")  # tarfile would treat it as the end


def _check_member(shard: Path, info: tarfile.TarInfo, repeated: bool) -> None:
    """RadiotagError for a member with an unsafe or repeated name, or of a kind that cannot be rewritten."""
    name = PurePosixPath(info.name)
    if "\0" in info.name or len(info.name.encode("utf-8", "surrogatepass")) > LONGEST:
        raise RadiotagError(f"{shard}: the member {info.name[:50]!r}… has a name that no file can have", "rename it")
    if name.is_absolute() or ".." in name.parts:
        raise RadiotagError(f"{shard}: the member {info.name!r} has a name that leads elsewhere", "rename it")
    if repeated:
        raise RadiotagError(f"{shard}: the member {info.name!r} is there twice", "keep one of them")
    if info.sparse is not None or "size" in info.pax_headers:
        raise RadiotagError(f"{shard}: the member {info.name!r} is stored sparsely or beyond 8 GiB", "pack it again")


def assemble(
    source: Path,
    members: Sequence[tuple[str, Member]],
    target: Path,
    marked: Callable[[str], bytes | None],
    work: Path,
) -> None:
    """Write one shard atomically, replacing each image by the bytes of `marked(path)` unless they are None.

    The shard is written in the folder `work` first. A target that is already identical is left as it is.
    """

    def fill(new: IO[bytes]) -> None:
        with source.open("rb") as old:
            for path, member in members:  # in the order of the source
                data = marked(path)
                if data is not None:
                    _copy_until(old, new, member.header)
                    new.write(_with_size(old.read(BLOCK), len(data)))
                    new.write(data + bytes(-len(data) % BLOCK))
                    old.seek(member.end)
            _copy_until(old, new, source.stat().st_size)

    if target.is_file() and _is_already(target, fill):
        return
    work.mkdir(parents=True, exist_ok=True)
    staged = work / "shard"
    try:
        fill_atomically(staged, fill, None)
        try:
            staged.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            fill_atomically(target, fill, None)  # the output is on another file system than `work`
            staged.unlink()
    except RadiotagError as error:
        raise RadiotagError(str(error).replace(str(staged), str(target)), error.hint) from error


def _is_already(target: Path, fill: Callable[[Any], object]) -> bool:
    """Whether a file already holds exactly what `fill` would write."""
    with target.open("rb") as file:
        comparison = _ComparingFile(file)
        fill(comparison)
        return comparison.equal and not file.read(1)


class _ComparingFile:
    """Acts as a file for writing, but compares the bytes with an existing file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.equal = file, True

    def write(self, data: bytes) -> None:
        self.equal = self.equal and self.file.read(len(data)) == data


def _copy_until(old: IO[bytes], new: IO[bytes], end: int) -> None:
    """Copy the old file up to byte `end`."""
    while (missing := end - old.tell()) > 0:
        chunk = old.read(min(missing, CHUNK))
        if not chunk:
            raise OSError(os.strerror(5))  # the file became shorter while it was read
        new.write(chunk)


def _with_size(header: bytes, size: int) -> bytes:
    """A member's header block with another size and a matching checksum."""
    block = header[:124] + b"%011o\0" % size + header[136:148] + b" " * 8 + header[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
