"""The tags of a TIFF, read and written as the bytes that they are.

Libraries decode tags and encode them again, and lose what they do not understand: text beyond ASCII, numbers of an
unusual type, captions of agencies (IPTC). Here bytes are copied; only their order may change.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

LAYOUT = frozenset({  # of the storage of pixels, which the writer sets itself; the ICC profile is passed separately
    254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 288, 289, 317, 320, 322, 323, 324, 325, 330,
    338, 339, 340, 341, 347, 512, 513, 514, 530, 531, 532, 34675,
})  # fmt: skip
FOLDERS = frozenset({0x8769, 0x8825, 0xA005})  # tags that point to further tags: EXIF, GPS, interoperability
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
UNITS = WIDTHS | {5: 4, 10: 4}  # a fraction is two numbers
LONG, LONG8, FOLDER_KINDS = 4, 16, (4, 13, 16, 18)
MOST_TAGS, DEEPEST = 65_535, 3
EMPTY = b"II*\0\x08\0\0\0" + bytes(6)  # a TIFF without tags


class Tag(NamedTuple):
    """One tag: its number, its type, how many values it has, and their bytes in little-endian order, or its tags."""

    number: int
    kind: int
    length: int
    value: bytes
    tags: "tuple[Tag, ...] | None" = None  # of a folder


class _Form(NamedTuple):
    """How a file writes numbers."""

    order: str  # "<" or ">"
    big: bool  # whether it is a BigTIFF

    def entries(self, data: bytes, place: int) -> Iterator[tuple[int, int, int, bytes, int]]:
        """(number, type, count, value field, its place) of each tag in the folder at `place`."""
        count = self.number(data, place, 8 if self.big else 2)
        place, size = place + (8 if self.big else 2), 20 if self.big else 12
        for start in range(place, place + min(count, MOST_TAGS) * size, size):
            entry = data[start : start + size]
            if len(entry) < size:
                return
            number, kind = struct.unpack_from(f"{self.order}HH", entry)
            width = 8 if self.big else 4
            yield number, kind, self.number(entry, 4, width), entry[4 + width :], start + 4 + width

    def number(self, data: bytes, place: int, width: int) -> int:
        """An unsigned number; 0 beyond the end."""
        found = data[place : place + width]
        return int.from_bytes(found, "little" if self.order == "<" else "big") if len(found) == width else 0


def read_tags(data: bytes) -> tuple[Tag, ...]:
    """The tags of a TIFF's first picture that say nothing of how its pixels are stored; what is damaged is left out."""
    form = _Form(order="<" if data[:2] == b"II" else ">", big=data[2:4] in (b"+\0", b"\0+"))
    first = form.number(data, 8, 8) if form.big else form.number(data, 4, 4)
    return tuple(tag for tag in _read(data, form, first, 0) if tag.number not in LAYOUT)


def _read(data: bytes, form: _Form, place: int, depth: int) -> Iterator[Tag]:
    for number, kind, count, field, at in form.entries(data, place):
        size = WIDTHS.get(kind, 0) * count
        if not size:
            continue
        start = at if size <= len(field) else form.number(field, 0, len(field))
        value = data[start : start + size]
        if len(value) < size:
            continue
        if number in FOLDERS and kind in FOLDER_KINDS and count == 1:
            inner = form.number(value, 0, WIDTHS[kind])
            if inner and depth < DEEPEST:
                yield Tag(number, LONG, 1, b"", tuple(_read(data, form, inner, depth + 1)))
            continue
        yield _classic(Tag(number, kind, count, value if form.order == "<" else _swapped(value, UNITS[kind])))


def _swapped(value: bytes, unit: int) -> bytes:
    return b"".join(value[start : start + unit][::-1] for start in range(0, len(value), unit)) if unit > 1 else value


def _classic(tag: Tag) -> Tag:
    """The tag as a plain TIFF can hold it: numbers of 64 bits become numbers of 32 if they fit."""
    if tag.kind != LONG8:
        return tag
    numbers = struct.unpack(f"<{tag.length}Q", tag.value)
    return tag._replace(kind=LONG, value=struct.pack(f"<{tag.length}I", *(min(one, 2**32 - 1) for one in numbers)))


def with_tags(file: bytes, tags: Iterable[Tag]) -> bytes:
    """A plain little-endian TIFF of one picture with these tags added; they take the place of the same numbers."""
    if file[:4] != b"II*\0":
        raise ValueError("no plain little-endian TIFF")
    form = _Form(order="<", big=False)
    own = [
        Tag(number, kind, count, field if WIDTHS.get(kind, 0) * count <= 4 else _at(file, form, kind, count, field))
        for number, kind, count, field, _ in form.entries(file, form.number(file, 4, 4))
    ]
    merged = {tag.number: tag for tag in (*own, *tags)}
    out = bytearray(file) + b"\0" * (len(file) % 2)
    place = _append(out, sorted(merged.values()))
    struct.pack_into("<I", out, 4, place)
    return bytes(out)


def exif_block(tags: Sequence[Tag]) -> bytes:
    """The tags as a block of EXIF data for other formats; empty if there are none."""
    return with_tags(EMPTY, tags) if tags else b""


def _at(file: bytes, form: _Form, kind: int, count: int, field: bytes) -> bytes:
    start = form.number(field, 0, 4)
    return file[start : start + WIDTHS.get(kind, 0) * count]


def _append(out: bytearray, tags: Sequence[Tag]) -> int:
    """Append a folder of tags behind what it points to; returns its place."""
    fields = []
    for tag in tags:
        value = tag.value if tag.tags is None else struct.pack("<I", _append(out, tag.tags))
        if len(value) > 4:
            place = len(out)
            out += value + b"\0" * (len(value) % 2)
            value = struct.pack("<I", place)
        fields.append(struct.pack("<HHI", tag.number, tag.kind, tag.length) + value.ljust(4, b"\0"))
    place = len(out)
    out += struct.pack("<H", len(fields)) + b"".join(fields) + b"\0" * 4
    return place
