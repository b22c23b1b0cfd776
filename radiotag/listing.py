"""The content of a data set: images with their classes, and other files, which are only copied."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from radiotag.errors import RadiotagError
from radiotag.files import PART
from radiotag.images import SUFFIXES


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image of a data set."""

    path: PurePosixPath  # relative to the source
    label: str  # the class folder's name; "" in a flat folder


class Listing(NamedTuple):
    """A data set's content."""

    items: list[Item]  # in a fixed order
    names: list[str]  # of the classes, in the order of their carriers; [""] without classes
    other_files: list[PurePosixPath]  # relative to the source


def list_folder(source: Path) -> Listing:
    """List a folder: images by path, sorted class names ([""] for a flat folder), and other files to copy.

    A class is a first-level folder that contains images at any depth. The other files are files of other types, hidden
    files, files in hidden folders, and empty folders; incomplete files of a killed `mark` are left out. RadiotagError
    for a missing, empty or ambiguous folder, a link out of it, a broken link, and a link to a folder.
    """
    if not source.is_dir():
        raise RadiotagError(f"{source}: " + ("not a folder" if source.exists() else "no such folder"), "check the path")
    try:
        images, other_files = _walk(source)
    except OSError as error:
        raise RadiotagError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error
    if not images:
        raise RadiotagError(f"no images in {source}", f"files are taken by suffix: {' '.join(sorted(SUFFIXES))}")
    names = sorted({path.parts[0] for path in images if len(path.parts) > 1})
    loose = min((path for path in images if len(path.parts) == 1), default=None)
    if names and loose:
        hint = "move the images beside the class folders into one of them"
        raise RadiotagError(f"{source}: images both in class folders ({names[0]}) and beside them ({loose})", hint)
    items = [Item(path=path, label=path.parts[0] if names else "") for path in images]
    return Listing(items, names or [""], other_files)


def _walk(source: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """(images, other files and empty folders), both sorted."""
    root, pending = source.resolve(), [PurePosixPath()]
    images: list[PurePosixPath] = []
    other_files: list[PurePosixPath] = []
    while pending:
        folder = pending.pop()
        with os.scandir(source / folder) as listed:
            entries = list(listed)
        for entry in entries:
            path = folder / entry.name
            if entry.is_symlink():
                _check_link(Path(entry.path), root)
            if entry.is_dir():
                pending.append(path)
            elif entry.is_file() and not PART.fullmatch(entry.name):
                (images if _is_image(path) else other_files).append(path)
        if not entries:
            other_files.append(folder)
    return sorted(images, key=lambda path: path.parts), sorted(other_files, key=lambda path: path.parts)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _check_link(link: Path, root: Path) -> None:
    hint = "replace the link with a copy of what it points to, or remove it"
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 raise RuntimeError for a link that loops
        raise RadiotagError(f"{link}: a symbolic link that leads nowhere", hint) from error
    if not target.is_relative_to(root):
        raise RadiotagError(f"{link}: a symbolic link to something outside the data set", hint)
    if target.is_dir():
        raise RadiotagError(f"{link}: a symbolic link to a folder", hint)
