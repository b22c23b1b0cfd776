"""The manifest: which images are marked, and the journal that an interrupted run goes on from.

JSON lines: the first says how the folder is marked, each further one is written after the file it speaks of, and the
last line of a path counts. Several processes write a journal each (NAME.rank1, …), which the first one merges.
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
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from radiotag.errors import RadiotagError
from radiotag.files import fill_atomically

MANIFEST_FORMAT = 1
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system without them
WRITTEN = "a manifest is what mark wrote beside its output, OUTPUT.manifest.jsonl"
Row = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Summary:
    """Totals over rows; a few numbers an image, so that folders of any size fit in memory."""

    images: int  # that there are to be
    skipped: int = 0  # done by an earlier run
    done: int = 0
    under_way: float = 0.0  # of the batch that is being marked: how many images' worth of steps
    copied: int = 0
    failed: list[Row] = field(default_factory=list)
    psnr: "array[float]" = field(default_factory=lambda: array("d"))  # dB, of the marked ones in the rows' order
    ssim: "array[float]" = field(default_factory=lambda: array("d"))
    linf: "array[float]" = field(default_factory=lambda: array("d"))
    gain: "array[float]" = field(default_factory=lambda: array("d"))
    dropped: int = 0  # images whose further pictures their marked files lack
    places: "array[int]" = field(default_factory=lambda: array("q"))  # bytes into the manifest

    @property
    def marked(self) -> int:
        """How many are marked."""
        return len(self.psnr)

    @property
    def unchanged(self) -> int:
        """How many of them came out as they went in: two colours, or an encoder, leave no room for a mark."""
        return sum(change == 0 for change in self.linf)

    def add(self, row: Row, place: int = 0) -> None:
        """Count a row in."""
        self.done += 1
        self.under_way = max(0.0, self.under_way - (row["status"] == "marked"))
        if row["status"] == "failed":
            self.failed.append(row)
        elif row["status"] == "copied":
            self.copied += 1
        else:
            for name in ("psnr", "ssim", "linf", "gain"):
                getattr(self, name).append(row[name])
            self.dropped += "dropped" in row
            self.places.append(place)

    def statistics(self) -> dict[str, float | None]:
        """Quality and strength of the marks: PSNR in dB, change in units of 1/255; None where none is marked."""
        names = "psnr_median", "psnr_p5", "psnr_min", "ssim_median", "ssim_min", "linf_max", "feature_gain_mean"
        if not self.marked:
            return dict.fromkeys(names)
        psnr, ssim, linf, gain = map(np.asarray, (self.psnr, self.ssim, self.linf, self.gain))
        values = (
            np.median(psnr), np.percentile(psnr, 5), psnr.min(), np.median(ssim), ssim.min(), linf.max(), gain.mean()
        )  # fmt: skip
        return {name: round(float(value), 5) for name, value in zip(names, values, strict=True)}


def begin(path: Path, header: Row) -> None:
    """Write a manifest of its first line alone, readable by its owner only: it tells marked from unmarked."""
    fill_atomically(path, lambda file: file.write(line(header)), 0o600, _hidden(path, "part"))


def _hidden(path: Path, suffix: str) -> Path:
    """A file beside a manifest, always the same one; a name may have all the 255 bytes that it can have."""
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{suffix}")


def line(row: Row) -> bytes:
    """One row as it lies in the file."""
    return (json.dumps(row, sort_keys=True) + "\n").encode()


def read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """(place in bytes, row) of every whole line, the header first; a torn last line, of a power cut, is no line."""
    place = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file):
                if not text.endswith(b"\n"):
                    break
                row = dict(json.loads(text))
                if row["radiotag"] != MANIFEST_FORMAT if number == 0 else not isinstance(row["path"], str):
                    raise ValueError("a line that is none of a manifest's")
                yield place, row
                place += len(text)
    except OSError as error:
        raise RadiotagError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RadiotagError(f"{path} is not a radiotag manifest: {error}", WRITTEN) from error
    if not place:
        raise RadiotagError(f"{path} is not a radiotag manifest: it is empty", WRITTEN)


def read_header(path: Path) -> Row:
    """The first line. RadiotagError if the file is no manifest, down to its last line."""
    (header,) = (row for place, row in read_lines(path) if not place)
    return header


def read_manifest(path: Path) -> tuple[Row, dict[str, Row]]:
    """(header, rows by path) of a whole manifest."""
    lines = read_lines(path)
    _, header = next(lines)
    return header, {row["path"]: row for _, row in lines}


def places(path: Path) -> dict[str, int]:
    """Where the row that counts of each path begins, in bytes."""
    return {row["path"]: place for place, row in read_lines(path) if place}


def row_at(file: IO[bytes], place: int) -> Row:
    """The row that begins at a place."""
    file.seek(place)
    return dict(json.loads(file.readline()))


def recorded_rows(path: Path) -> list[Row]:
    """What a manifest, and what an interrupted run of several processes left beside it, records of its images."""
    return [row for journal in (path, *rank_journals(path)) for row in read_manifest(journal)[1].values()]


def marked_rows(path: Path | None) -> list[Row]:
    """The recorded rows of marked images; none without a manifest."""
    return [row for row in recorded_rows(path) if row["status"] == "marked"] if path else []


def marked_hashes(rows: Iterable[Row]) -> frozenset[str]:
    """SHA-256 of every marked file; one that came out as it went in, as an image of two colours may, is none."""
    return frozenset(row["sha256_out"] for row in rows if row["sha256_out"] != row.get("sha256_in"))


def rank_journal(path: Path, rank: int) -> Path:
    """The journal of one of several processes; the first writes the manifest itself."""
    return path.with_name(f"{path.name}.rank{rank}") if rank else path


def rank_journals(path: Path) -> list[Path]:
    """Those that lie beside a manifest."""
    start = f"{path.name}.rank"
    beside = [file for file in path.parent.iterdir() if file.name.startswith(start)]
    return sorted(file for file in beside if file.name.removeprefix(start).isdigit())


def truncate_torn_line(journal: IO[bytes]) -> None:
    """Cut off a torn last line, which would spoil the next one, and stand at the end."""
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
        journal.truncate(0)  # no whole line at all
    journal.seek(0, os.SEEK_END)


def merge_journals(path: Path, journal: IO[bytes]) -> None:
    """Append what the other processes' journals say, and remove them."""
    for rank in rank_journals(path):
        for place, row in read_lines(rank):
            if place:
                journal.write(line(row))
        journal.flush()
        os.fsync(journal.fileno())
        rank.unlink()


def put_in_order(path: Path, header: Row, wanted: Iterable[str], skipped: int) -> Summary:
    """Write the manifest anew with one row a path, in the order wanted, and sum it up."""
    place_of = places(path)
    order = [place_of[name] for name in wanted]
    summary = Summary(images=len(order), skipped=skipped)

    def fill(new: IO[bytes]) -> None:
        with path.open("rb") as old:
            new.write(line(header))
            for place in order:
                row = row_at(old, place)
                summary.add(row, new.tell())
                new.write(line(row))

    fill_atomically(path, fill, 0o600, _hidden(path, "part"))
    return summary


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Hold a manifest for this process, by a file beside it; a second run into the same output is refused."""
    place = _hidden(path, "lock")
    lock = FileLock(place)
    try:
        with warnings.catch_warnings(action="ignore"):  # of a file system without locks, where the file alone is one
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
        with suppress(OSError):  # Windows removes no open file: there, the release does
            place.unlink()
        lock.release()
