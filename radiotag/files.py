"""Files on disk: written atomically (a file is complete or absent), and identified by their SHA-256."""

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from radiotag.errors import RadiotagError

PART = re.compile(r"\.[0-9a-f]{16}\.part")  # a file's name while it is being written


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_or_none(path: Path) -> str | None:
    """Like `file_hash`, but None for a missing or unreadable file."""
    try:
        return file_hash(path)
    except OSError:
        return None


def write_atomically(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file atomically, with permissions `mode` or by the umask. RadiotagError if it cannot be written."""
    fill_atomically(path, lambda file: file.write(data), mode)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file's bytes atomically, without holding them in memory. RadiotagError if it fails."""
    try:
        original = source.open("rb")
    except OSError as error:
        raise RadiotagError(f"cannot read {source}: {error.strerror}", "check the file and its permissions") from error
    with original:
        fill_atomically(target, lambda file: shutil.copyfileobj(original, file), None)


def copy_mode_and_times(source: Path, target: Path) -> None:
    """Give a file its source's permissions and time stamps: new ones would reveal which files are marked."""
    status = source.stat()
    target.chmod(stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def with_parent(path: Path) -> Path:
    """Make the path's folder and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def fill_atomically(
    path: Path, fill: Callable[[IO[bytes]], object], mode: int | None, part: Path | None = None
) -> None:
    """Let `fill` write the temporary file `part`, then rename it to `path`. RadiotagError if it cannot be written.

    The name of `part` must belong to this run alone; the default is random.
    """
    if part:
        part.unlink(missing_ok=True)  # left by a killed run
    # The name is not derived from the target's, which may already have the full length of 255 bytes.
    part = part or path.parent / f".{secrets.token_hex(8)}.part"
    try:
        part.touch(mode=0o666 if mode is None else 0o600, exist_ok=False)
        with part.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            part.chmod(mode)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            hint = "check that the folder exists, is writable and has space"
            raise RadiotagError(f"cannot write {path}: {error.strerror or error}", hint) from error
        raise
