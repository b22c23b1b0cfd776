"""The content of a data set: images with their classes, and other files, which are only copied."""

import csv
import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from radiotag.errors import RadiotagError
from radiotag.files import PART
from radiotag.images import SUFFIXES

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_MAP = r"(?:masks?|labels?|label_?maps?|seg(?:mentation)?s?|trimaps?|depths?|ground_?truths?|gt|annotations?|mattes?)"
MAP_FOLDER = re.compile(_MAP, re.IGNORECASE)
MAP_SUFFIX = re.compile(rf"[_\-. ]{_MAP}$", re.IGNORECASE)
TABLES = ("metadata.csv", "labels.csv")  # beside the images of a flat folder
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "name")
CLASS_COLUMNS = ("label", "class", "class_name", "category", "species", "target")
FEW_COLOURS = 64  # of a map in colour


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


def list_folder(source: Path, exclude: Sequence[str] = ()) -> Listing:
    """List a folder: images by path, sorted class names ([""] for a flat folder), and other files to copy.

    A class is a folder of the first level that contains images at any depth; where this is a lone folder of folders, or
    where train and val are, of the level below (`class_level`). In a flat folder a table may tell the classes
    (`class_table`). The other files are files of other types, label maps, a few pictures beside the class folders,
    hidden files, files in hidden folders, and empty folders; incomplete files of a killed `mark` are left out. exclude:
    patterns of images that are only copied, too (`is_excluded`).
    RadiotagError for a missing, empty or ambiguous folder, a link out of it, a broken link, and a link to a folder.
    """
    if not source.is_dir():
        raise RadiotagError(f"{source}: " + ("not a folder" if source.exists() else "no such folder"), "check the path")
    try:
        images, other_files = _walk(source)
    except OSError as error:
        raise RadiotagError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error
    images, other_files = _without(images, other_files, exclude)
    if not images:
        raise RadiotagError(f"no images in {source}", f"files are taken by suffix: {' '.join(sorted(SUFFIXES))}")
    maps = label_maps(source, images)
    inside = [path for path in images if path not in maps]
    loose = [path for path in inside if len(path.parts) == 1]
    folders = sorted({path.parts[0] for path in inside if len(path.parts) > 1})
    if folders and 2 * len(loose) >= len(inside):
        hint = "move the images beside the class folders into one of them"
        raise RadiotagError(f"{source}: images both in class folders ({folders[0]}) and beside them ({loose[0]})", hint)
    beside = set(loose if folders else ()) | maps
    inside = [path for path in inside if path not in beside]
    level, table = class_level(inside), {} if folders else class_table(source, inside)
    items = [Item(path=path, label=path.parts[level] if folders else table.get(path, "")) for path in inside]
    names = sorted({item.label for item in items})
    return Listing(items, names, sorted([*other_files, *beside], key=lambda path: path.parts))


def is_excluded(path: PurePosixPath, pattern: str) -> bool:
    """Whether a shell's pattern fits a path: as a whole, where * crosses folders, or its last parts.

    >>> path = PurePosixPath("scans/cat/a_preview.png")
    >>> [is_excluded(path, pattern) for pattern in ("*_preview.png", "scans/*", "cat/*.png", "cat")]
    [True, True, True, False]
    """
    return fnmatch.fnmatchcase(path.as_posix(), pattern) or path.match(pattern)


def _without(
    images: list[PurePosixPath], other_files: list[PurePosixPath], exclude: Sequence[str]
) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Images without the excluded ones, and the other files with them. RadiotagError for a pattern that fits none."""
    left_out = set[PurePosixPath]()
    for pattern in exclude:
        found = {path for path in images if pattern and is_excluded(path, pattern)}
        if not found:
            raise RadiotagError(
                f"no image fits --exclude '{pattern}'", "a pattern fits whole paths, or their last parts"
            )
        left_out |= found
    return [path for path in images if path not in left_out], sorted([*other_files, *left_out])


def class_level(images: Iterable[PurePosixPath]) -> int:
    """Which part of the images' paths is the class: the first, unless it is a folder of class folders.

    That is a folder in which all images lie, in folders of their own; or all first parts are names like train and val.
    """
    parts, level = [path.parts for path in images], 0
    while parts and all(len(part) > level + 2 for part in parts):
        here = {part[level] for part in parts}
        if len(here) > 1 and not here <= SPLITS:
            break
        level += 1
    return level


def class_table(source: Path, images: Sequence[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Image → class by a table in a flat folder, as Hugging Face's data sets have it; empty if there is none.

    RadiotagError if it tells the class of some images and not of others.
    """
    for path in (source / name for name in TABLES if (source / name).is_file()):
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
                of_file = next((columns[name] for name in FILE_COLUMNS if name in columns), None)
                of_class = next((columns[name] for name in CLASS_COLUMNS if name in columns), None)
                pairs = [(row[of_file], row[of_class]) for row in rows] if of_file and of_class else []
        except (OSError, ValueError, csv.Error) as error:
            told = f"{path}: not a table that can be read ({error})"
            raise RadiotagError(told, "mend it, or move it away") from error
        table = {PurePosixPath(name.strip()): label.strip() for name, label in pairs if name and label}
        lacking = [image for image in images if not table.get(image)]
        if len(lacking) < len(images):
            if lacking:
                hint = "complete it, or move it away to mark all images as one class"
                raise RadiotagError(f"{path} gives no class of {lacking[0]}", hint)
            return table
    return {}


# ---------------------------------------------------------------- label maps


def label_maps(source: Path, images: Sequence[PurePosixPath]) -> set[PurePosixPath]:
    """Those images that are no pictures but say what is where in one: masks, trimaps, maps of depth or of classes.

    Such a file is called so, or its folder is; a picture of the same name lies beside it or its folder; and it is grey,
    indexed or of few colours, as three of each folder show. Marking would destroy it.
    """
    named = {path: bare for path in images if (bare := _picture_of(path)) is not None}
    if not named:
        return set()
    pictures = set[tuple[tuple[str, ...], str]]()
    for path in (path for path in images if path not in named):
        pictures.update((path.parts[:count], path.stem) for count in range(len(path.parts)))
    kinds: dict[PurePosixPath, list[PurePosixPath]] = {}
    for path, (place, stem) in named.items():
        if (place, stem) in pictures:
            kinds.setdefault(path.parent, []).append(path)
    return {path for paths in kinds.values() if all(_is_map(source / path) for path in paths[:3]) for path in paths}


def is_map_name(path: PurePosixPath) -> bool:
    """Whether a path is named as a label map's."""
    return _picture_of(path) is not None


def _picture_of(path: PurePosixPath) -> tuple[tuple[str, ...], str] | None:
    """The folder under which a label map's picture lies, and its stem; None if the name tells of no map."""
    suffix = MAP_SUFFIX.search(path.stem)
    stem = path.stem[: suffix.start()] if suffix else path.stem
    for place, part in enumerate(path.parts[:-1]):
        if MAP_FOLDER.fullmatch(part):
            return path.parts[:place], stem
    return (path.parts[:-1], stem) if suffix and stem else None


def _is_map(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            if image.mode in {"1", "L", "P", "I", "F"} or image.mode.startswith("I;16"):
                return True
            return image.mode in {"RGB", "RGBA"} and image.convert("RGB").getcolors(FEW_COLOURS) is not None
    except Exception:  # no picture that can be read is no map; marking will name it
        return False


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
                (images if is_image(path) else other_files).append(path)
        if not entries:
            other_files.append(folder)
    return sorted(images, key=lambda path: path.parts), sorted(other_files, key=lambda path: path.parts)


def is_image(path: PurePosixPath) -> bool:
    """Whether a path is that of an image that can be marked, by its suffix; hidden files are none."""
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
