"""The manifest: it records which images are marked, and is the journal from which an interrupted run continues.

The format is JSON lines. The first line holds the settings. Each further line is written after its image's file; the
last line of a path counts. Several processes write one journal each (NAME.rank1, …), and the first process merges them.
"""

import errno
import hashlib
import json
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from radiotag import plainjson
from radiotag.errors import RadiotagError
from radiotag.files import fill_atomically

MANIFEST_FORMAT = 1
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # file systems without locks
WRITTEN = "a manifest is what mark wrote beside its output, OUTPUT.manifest.jsonl"
STATUSES = ("marked", "copied", "failed", "chosen")  # chosen: to be marked by a run that is not finished
TEXTS = ("path", "class", "output", "sha256_in", "sha256_out", "error", "hint")
QUALITY = ("psnr", "ssim", "linf", "gain")  # of a marked image
Row = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Summary:
    """Totals over rows, with a few numbers per image, so that folders of any size fit in memory."""

    images: int  # expected in total
    skipped: int = 0  # done by an earlier run
    ranked: int = 0  # of the images, before the first is marked
    done: int = 0
    under_way: float = 0.0  # steps done for the current batch, in images' worth
    copied: int = 0
    failed: list[Row] = field(default_factory=list)
    psnr: "array[float]" = field(default_factory=lambda: array("d"))  # dB, of marked images in the rows' order
    ssim: "array[float]" = field(default_factory=lambda: array("d"))
    linf: "array[float]" = field(default_factory=lambda: array("d"))
    gain: "array[float]" = field(default_factory=lambda: array("d"))
    dropped: int = 0  # images whose marked files lack further pictures of the source's file
    unmarkable: list[Row] = field(default_factory=list)  # of images copied because they cannot be marked
    full_chroma: int = 0  # JPEGs whose chroma is written at a finer resolution than the source's
    full_colour: int = 0  # images with a palette whose marked files have none
    places: "array[int]" = field(default_factory=lambda: array("q"))  # of their rows, in bytes

    @property
    def marked(self) -> int:
        """Number of marked images."""
        return len(self.psnr)

    @property
    def unchanged(self) -> int:
        """Number of marked images without any change: two colours, or an encoder, can leave no room for a mark."""
        return sum(change == 0 for change in self.linf)

    def add(self, row: Row, place: int = 0) -> None:
        """Add a row that begins at byte `place` of the manifest."""
        self.done += 1
        self.under_way = max(0.0, self.under_way - (row["status"] == "marked"))
        if row["status"] == "failed":
            self.failed.append(row)
        elif row["status"] == "copied":
            self.copied += 1
            self.unmarkable += [row] if "unmarkable" in row else []
        else:
            for name in QUALITY:
                getattr(self, name).append(row[name])
            self.dropped += "dropped" in row
            self.full_chroma += "full_chroma" in row
            self.full_colour += "full_colour" in row
            self.places.append(place)

    def statistics(self) -> dict[str, float | None]:
        """Quality and strength of the marks: PSNR in dB, change in units of 1/255; None if nothing is marked."""
        names = "psnr_median", "psnr_p5", "psnr_min", "ssim_median", "ssim_min", "linf_max", "feature_gain_mean"
        if not self.marked:
            return dict.fromkeys(names)
        psnr, ssim, linf, gain = map(np.asarray, (self.psnr, self.ssim, self.linf, self.gain))
        values = (
            np.median(psnr), np.percentile(psnr, 5), psnr.min(), np.median(ssim), ssim.min(), linf.max(), gain.mean()
        )  # fmt: skip
        return {name: round(float(value), 5) for name, value in zip(names, values, strict=True)}


def begin(path: Path, header: Row) -> None:
    """Write a manifest with only its header. Its mode is 0600, because it tells which images are marked."""
    fill_atomically(path, lambda file: file.write(line(header)), 0o600, hidden(path, "part"))


def hidden(path: Path, suffix: str) -> Path:
    """A hidden file with a fixed name beside a manifest: a hash, because names cannot exceed 255 bytes."""
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{suffix}")


def line(row: Row) -> bytes:
    """A row as a line of the file."""
    return (json.dumps(row, sort_keys=True) + "\n").encode()


def read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """(place in bytes, row) of every complete line, the header first. A torn last line, after a power cut, is ignored.

    RadiotagError for a file that cannot be read or is not a manifest.
    """
    place = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file):
                if not text.endswith(b"\n"):
                    break
                try:
                    row = _parsed(text, first=number == 0)
                except ValueError as error:
                    told = f"{path} is not a radiotag manifest: line {number + 1}: {error}"
                    raise RadiotagError(told, WRITTEN) from error
                yield place, row
                place += len(text)
    except OSError as error:
        raise RadiotagError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    if not place:
        raise RadiotagError(f"{path} is not a radiotag manifest: it is empty", WRITTEN)


def _parsed(text: bytes, first: bool) -> Row:
    row = plainjson.parse(text)
    if not isinstance(row, dict):
        raise ValueError("no row of a manifest")
    if row.get("radiotag") != MANIFEST_FORMAT if first else not isinstance(row.get("path"), str):
        raise ValueError("no header that this version knows" if first else "a row without a path")
    return row


def read_rows(path: Path, *needed: str) -> Iterator[tuple[int, Row]]:
    """(line number, row) of every complete row, which is checked: no reader needs to doubt a status, a row or a path.

    `needed` are further names that a marked image's row must have. RadiotagError names the file and the line.
    """
    for number, (place, row) in enumerate(read_lines(path), 1):
        if not place:
            continue
        try:
            _check_row(row, needed if row.get("status") == "marked" else ())
        except ValueError as error:
            raise RadiotagError(f"{path}, line {number}: {error}", WRITTEN) from error
        yield number, row


def _check_row(row: Row, needed: Iterable[str]) -> None:
    missing = next((name for name in ("status", "class", "row", *needed) if name not in row), None)
    if missing:
        raise ValueError(f"a row without {missing!r}")
    if row["status"] not in STATUSES:
        raise ValueError(f"the status {str(row['status'])[:100]!r}")
    if type(row["row"]) is not int or row["row"] < 0:
        raise ValueError(f"the carrier {str(row['row'])[:100]!r}")
    damaged = next((name for name in TEXTS if not isinstance(row.get(name, ""), str)), None)
    damaged = damaged or next((name for name in QUALITY if type(row.get(name, 0)) not in (int, float)), None)
    if damaged:
        raise ValueError(f"its {damaged!r} is damaged")
    if not (_is_inside(row["path"]) and _is_inside(row.get("output") or row["path"])):
        raise ValueError("a path that leads elsewhere")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def read_header(path: Path) -> Row:
    """The first line. All lines are checked: RadiotagError if the file is not a manifest."""
    (header,) = (row for place, row in read_lines(path) if not place)
    return header


def read_manifest(path: Path) -> tuple[Row, dict[str, Row]]:
    """(header, rows by path) of a manifest."""
    lines = read_lines(path)
    _, header = next(lines)
    return header, {row["path"]: row for _, row in lines}


def places(path: Path) -> dict[str, int]:
    """Path → place in bytes of its last row, the one that counts."""
    return {row["path"]: place for place, row in read_lines(path) if place}


def row_at(file: IO[bytes], place: int) -> Row:
    """The row that begins at a place."""
    file.seek(place)
    return dict(json.loads(file.readline()))


def recorded_rows(path: Path) -> list[Row]:
    """All rows of a manifest, and of the journals that an interrupted run of several processes left beside it."""
    journals = (path, *rank_journals(path))
    return [r for journal in journals for r in {r["path"]: r for _, r in read_rows(journal, "sha256_out")}.values()]


def recorded_classes(path: Path, carriers: int | None = None, *, marked: bool = False) -> dict[str, int]:
    """Class → carrier row of all recorded images, or of the `marked` ones alone.

    RadiotagError, which names file and line, for a class of two rows, two classes of one row, or a row that is not
    among a key's `carriers`.
    """
    row_of, class_of, wanted = dict[str, int](), dict[int, str](), dict[str, int]()
    for journal in (path, *rank_journals(path)):
        for number, row in read_rows(journal):
            name, carrier = row["class"], row["row"]
            if row_of.setdefault(name, carrier) != carrier or class_of.setdefault(carrier, name) != name:
                other = f"'{name}' has {row_of[name]}" if row_of[name] != carrier else f"'{class_of[carrier]}' has it"
                told = f"{journal}, line {number}: class '{name}' and carrier {carrier}, but before {other}"
                raise RadiotagError(told, WRITTEN)
            if carriers is not None and carrier >= carriers:
                told = f"{journal}, line {number}: the carrier {carrier} is beyond the key's {carriers}"
                raise RadiotagError(told, "give the key that marked the folder")
            if row["status"] == "marked" or not marked:
                wanted[name] = carrier
    return wanted


def marked_rows(path: Path | None) -> list[Row]:
    """The recorded rows of marked images; none without a manifest."""
    return [row for row in recorded_rows(path) if row["status"] == "marked"] if path else []


def marked_hashes(rows: Iterable[Row]) -> frozenset[str]:
    """SHA-256 of every marked file, except unchanged ones (an image of two colours may have no room for a mark)."""
    return frozenset(row["sha256_out"] for row in rows if row["sha256_out"] != row.get("sha256_in"))


def rank_journal(path: Path, rank: int) -> Path:
    """The journal of the process with this rank; rank 0 writes the manifest itself."""
    return path.with_name(f"{path.name}.rank{rank}") if rank else path


def rank_journals(path: Path) -> list[Path]:
    """The journals of ranks from 1, beside a manifest."""
    prefix = f"{path.name}.rank"
    files = [file for file in path.parent.iterdir() if file.name.startswith(prefix)]
    return sorted(file for file in files if file.name.removeprefix(prefix).isdigit())


def truncate_torn_line(journal: IO[bytes]) -> None:
    """Cut off a torn last line, which would spoil the next one, and move to the end of the file."""
    end = journal.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        journal.seek(start)
        cut = journal.read(end - start).rfind(b"\n")
        if cut >= 0:
            journal.truncate(start + cut + 1)
            break
        end = start
    else:
        journal.truncate(0)  # there is no complete line
    journal.seek(0, os.SEEK_END)


def merge_journals(path: Path, journal: IO[bytes]) -> None:
    """Append the rows of the other processes' journals, and remove these journals."""
    for rank in rank_journals(path):
        for place, row in read_lines(rank):
            if place:
                journal.write(line(row))
        journal.flush()
        os.fsync(journal.fileno())
        rank.unlink()


def put_in_order(path: Path, header: Row, images: Iterable[str], skipped: int) -> Summary:
    """Rewrite the manifest with one row per path, in the order of `images`, and return its totals."""
    place_of = places(path)
    order = [place_of[image] for image in images]
    summary = Summary(images=len(order), skipped=skipped)

    def fill(new: IO[bytes]) -> None:
        with path.open("rb") as old:
            new.write(line(header))
            for place in order:
                row = row_at(old, place)
                summary.add(row, new.tell())
                new.write(line(row))

    fill_atomically(path, fill, 0o600, hidden(path, "part"))
    return summary


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Lock a manifest by a file beside it. RadiotagError if another run holds the lock."""
    lock_path = hidden(path, "lock")
    lock = FileLock(lock_path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about file systems without locks
            lock.acquire(timeout=0)
    except Timeout as error:
        message = f"another radiotag is marking into {output}"
        raise RadiotagError(message, "wait for it, or choose another -o") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; `release` does it there
            lock_path.unlink()
        lock.release()
