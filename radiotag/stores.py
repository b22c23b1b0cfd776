"""Stores: where the images of a data set are read from and written to, a folder or tar shards.

All differences between the two are in this module, behind one interface (`Store`); the plan and the run use only the
interface. In a folder each image is a file. In shards each image is a member, and marked images wait in a work folder
until `finish` assembles the shards. Paths are relative to the source; the path of an image in shards is SHARD/MEMBER.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Protocol

from radiotag import shards
from radiotag.errors import RadiotagError
from radiotag.files import (
    PART,
    copy_atomically,
    copy_mode_and_times,
    hash_or_none,
    with_parent,
    write_atomically,
)
from radiotag.images import OTHER_SUFFIXES
from radiotag.listing import Listing, is_image, is_map_name, list_folder
from radiotag.manifest import Row


class Store(Protocol):
    """A data set and its marked copy."""

    source: Path
    output: Path
    listing: Listing  # content of the source
    failed_are: str  # for messages: state in the output of images that cannot be marked
    failed_where: str  # for messages, before the output's name

    def check_options(self, format: str) -> None:
        """RadiotagError for a format or an output that does not fit the source."""

    def unmarked_formats(self) -> Counter[str]:
        """Number of files, by suffix, that look like images but have formats that are only copied."""

    def read(self, path: PurePosixPath) -> bytes:
        """Read an image of the source."""

    def hash(self, path: PurePosixPath) -> str | None:
        """SHA-256 of an image of the source; None if it cannot be read."""

    def copy(self, path: PurePosixPath) -> str | None:
        """Copy an image unchanged and return its SHA-256."""

    def write(self, path: PurePosixPath, target: str, data: bytes) -> None:
        """Write an image's marked file atomically."""

    def finish(self, marked: Iterable[Row]) -> None:
        """Complete the output after all marked images are written; `marked` are their rows."""

    def open_output(self) -> None:
        """Read what earlier runs have finished. `is_written` and `read_output` need this."""

    def is_written(self, row: Row) -> bool:
        """Whether the output holds an image exactly as a row records it."""

    def read_output(self, target: str) -> bytes:
        """Read an image of the output; b"" or OSError if it does not exist."""

    def remove_parts(self) -> None:
        """Remove the incomplete files of a killed run."""

    def output_files(self) -> Iterator[str]:
        """Relative paths of all files in the output that may come from somewhere else than the source."""

    def stale(self, rows: Iterable[Row], targets: Set[str]) -> Iterator[tuple[Path, str]]:
        """Files recorded in the rows of earlier runs that are not among this run's targets, with their SHA-256."""

    def output_file(self, target: PurePosixPath | str) -> Path | None:
        """The place of an image, or of a folder of images, in the output; None if images are not files."""


def list_dataset(source: Path) -> Listing:
    """The content of a data set, in a folder or in shards."""
    return shards.list_shards(source)[1] if shards.is_archive(source) else list_folder(source)


def open_store(source: Path, output: Path, exclude: Sequence[str] = ()) -> Store:
    """The store that fits the source: `Shards` or `Folder`. RadiotagError for shards some of which are excluded."""
    if not shards.is_archive(source):
        return Folder(source, output, exclude)
    if exclude:
        raise RadiotagError("--exclude is for folders", "leave these images out when you make the shards")
    return Shards(source, output)


def copy_other_file(source: Path, target: Path) -> None:
    """Copy a file that is not an image, or make an empty folder. An identical copy is left as it is."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists() or hash_or_none(source) != hash_or_none(target):
        copy_atomically(source, with_parent(target))
        copy_mode_and_times(source, target)


class Folder:
    """Images as files in a folder of class sub-folders, or in a flat one."""

    failed_are, failed_where = "missing", "MISSING from"

    def __init__(self, source: Path, output: Path, exclude: Sequence[str] = ()) -> None:
        self.source, self.output, self.listing = source, output, list_folder(source, exclude)

    def check_options(self, format: str) -> None:
        """Do nothing: a folder accepts every format and every output."""

    def unmarked_formats(self) -> Counter[str]:
        return _unmarked_suffixes(self.listing)

    def read(self, path: PurePosixPath) -> bytes:
        return (self.source / path).read_bytes()

    def hash(self, path: PurePosixPath) -> str | None:
        return hash_or_none(self.source / path)

    def copy(self, path: PurePosixPath) -> str | None:
        source, target = self.source / path, with_parent(self.output / path)
        copy_atomically(source, target)
        copy_mode_and_times(source, target)
        return hash_or_none(target)

    def write(self, path: PurePosixPath, target: str, data: bytes) -> None:
        file = with_parent(self.output / target)
        write_atomically(file, data)
        copy_mode_and_times(self.source / path, file)

    def finish(self, marked: Iterable[Row]) -> None:
        """Do nothing: every image is in its place."""

    def open_output(self) -> None:
        """Do nothing: every image is found by its name."""

    def is_written(self, row: Row) -> bool:
        return bool(row["sha256_out"] == hash_or_none(self.output / row["output"]))

    def read_output(self, target: str) -> bytes:
        return (self.output / target).read_bytes()

    def remove_parts(self) -> None:
        _remove_parts(self.output)

    def output_files(self) -> Iterator[str]:
        for folder, _, names in os.walk(self.output):
            yield from ((Path(folder).relative_to(self.output) / name).as_posix() for name in names)

    def stale(self, rows: Iterable[Row], targets: Set[str]) -> Iterator[tuple[Path, str]]:
        for row in rows:
            if (
                row.get("status", "failed") not in {"failed", "chosen"}
                and row.get("output", row["path"]) not in targets
            ):
                yield self.output / row["output"], row.get("sha256_out", "")

    def output_file(self, target: PurePosixPath | str) -> Path | None:
        return self.output / target


class Shards:
    """Images as members of tar shards: a folder of shards, or a single shard."""

    failed_are, failed_where = "left unmarked", "UNMARKED in"

    def __init__(self, source: Path, output: Path) -> None:
        self.source, self.output = source, output
        self.archive, self.listing = shards.list_shards(source)
        self.finished: shards.Archive | None = None  # the index of the output, set by `open_output`

    @property
    def work(self) -> Path:
        """The folder, beside the output, in which marked images wait until a shard can be assembled."""
        output = self.output if self.output.name else self.output.absolute()
        return output.with_name(f".{output.name}.staged")

    def check_options(self, format: str) -> None:
        if format != "keep":
            raise RadiotagError(f"{self.source}: the images of a tar shard keep their format", "leave out --format")
        if self.source.is_file() and (self.output.is_dir() or self.output.suffix.lower() != ".tar"):
            raise RadiotagError(f"{self.output}: a single shard becomes a single shard", "name a .tar file with -o")

    def unmarked_formats(self) -> Counter[str]:
        return _unmarked_suffixes(self.listing) + self.archive.unmarked

    def read(self, path: PurePosixPath) -> bytes:
        return self.archive.read(path)

    def hash(self, path: PurePosixPath) -> str | None:
        return hashlib.sha256(self.read(path)).hexdigest()

    def copy(self, path: PurePosixPath) -> str | None:
        """Return the SHA-256; the image itself is copied when its shard is assembled."""
        return self.hash(path)

    def write(self, path: PurePosixPath, target: str, data: bytes) -> None:
        write_atomically(with_parent(self._staged(target)), data)

    def finish(self, marked: Iterable[Row]) -> None:
        """Assemble the shards from the source's bytes and the marked images, and remove the work folder."""
        self.open_output()
        targets = {row["path"]: row["output"] for row in marked}

        def marked_bytes(path: str) -> bytes | None:
            return self._marked_file(path, targets[path]) if path in targets else None

        for shard, members in self.archive.by_shard().items():
            source, target = self.archive.root / shard, self._output_shard(shard)
            shards.assemble(source, members, with_parent(target), marked_bytes, self.work)
            copy_mode_and_times(source, target)
        shutil.rmtree(self.work, ignore_errors=True)

    def open_output(self) -> None:
        self.finished = shards.finished_archive(self.output)

    def is_written(self, row: Row) -> bool:
        if row["status"] == "copied":
            return True
        digest = hash_or_none(self._staged(row["output"]))
        if digest is None and self.finished:
            digest = hashlib.sha256(self.read_output(row["output"])).hexdigest()
        return bool(row["sha256_out"] == digest)

    def read_output(self, target: str) -> bytes:
        if self.output.is_file():  # a single shard, which may have another name than its source
            target = target.replace(target.split("/", maxsplit=1)[0], self.output.name, 1)
        exists = self.finished is not None and target in self.finished.members
        return self.finished.read(PurePosixPath(target)) if self.finished and exists else b""

    def remove_parts(self) -> None:
        _remove_parts(self.output)
        _remove_parts(self.work)

    def output_files(self) -> Iterator[str]:
        return iter(())

    def stale(self, rows: Iterable[Row], targets: Set[str]) -> Iterator[tuple[Path, str]]:
        recorded = {row["path"].split("/")[0] for row in rows}
        for shard in sorted(recorded - set(self.archive.shards)) if self.source.is_dir() else ():
            if shards.is_shard(self.output / shard):
                yield self.output / shard, ""

    def output_file(self, target: PurePosixPath | str) -> Path | None:
        return None

    def _staged(self, target: str) -> Path:
        """A file in the work folder; the hash makes a valid file name of any member's name."""
        return self.work / hashlib.sha256(os.fsencode(target)).hexdigest()

    def _output_shard(self, shard: str) -> Path:
        return self.output / shard if self.source.is_dir() else self.output

    def _marked_file(self, path: str, target: str) -> bytes:
        staged = self._staged(target)
        data = staged.read_bytes() if self.finished is None or staged.is_file() else self.read_output(path)
        if not data:
            raise RadiotagError(f"{path}, marked, is gone from {self.work}", "run the same command again")
        return data


def _unmarked_suffixes(listing: Listing) -> Counter[str]:
    """What looks like an image among the other files, by kind."""
    found: Counter[str] = Counter()
    for path in listing.other_files:
        if path.suffix.lower() in OTHER_SUFFIXES:
            found[path.suffix.lower()] += 1
        elif is_image(path):
            found["label maps" if len(path.parts) > 1 or is_map_name(path) else "pictures beside the classes"] += 1
    return found


def _remove_parts(folder: Path) -> None:
    for part in folder.rglob(".*.part") if folder.is_dir() else ():
        if PART.fullmatch(part.name):
            part.unlink(missing_ok=True)
