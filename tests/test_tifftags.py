"""A TIFF's tags: every byte comes back, whatever the type, the byte order, the coding; damage is left out."""

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from radiotag import images
from radiotag.tifftags import FOLDERS, LAYOUT, WIDTHS, Tag, exif_block, read_tags, with_tags

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
KINDS = sorted(set(WIDTHS) - {13, 16, 17, 18})


def tiff(order="<", big=False, tags=(), compression="raw"):
    """A TIFF of PIXELS, written here: a header, the pixels, then tags (number, type, count, bytes in `order`)."""
    if not big and order == "<":
        file = BytesIO()
        Image.fromarray(PIXELS).save(file, "TIFF", compression=compression)
        return file.getvalue()
    pixels, width = PIXELS.tobytes(), 8 if big else 4
    head = (b"II" if order == "<" else b"MM") + (
        struct.pack(f"{order}HHHQ", 43, 8, 0, 16 + len(pixels)) if big else
        struct.pack(f"{order}HI", 42, 8 + len(pixels))
    )  # fmt: skip
    short, long = (lambda n: struct.pack(f"{order}H", n)), (lambda n: struct.pack(f"{order}I", n))
    own = [
        (256, 3, 1, short(10)), (257, 3, 1, short(12)), (258, 3, 3, short(8) * 3), (259, 3, 1, short(1)),
        (262, 3, 1, short(2)), (273, 4, 1, long(len(head))), (277, 3, 1, short(3)), (278, 3, 1, short(12)),
        (279, 4, 1, long(len(pixels))), (284, 3, 1, short(1)),
    ]  # fmt: skip
    every, out = sorted([*own, *tags]), bytearray(head + pixels)
    folder_size = (8 + 20 * len(every) + 8) if big else (2 + 12 * len(every) + 4)
    folder, behind = bytearray(), bytearray()
    for number, kind, count, value in every:
        folder += struct.pack(f"{order}HH", number, kind) + struct.pack(f"{order}{'Q' if big else 'I'}", count)
        place = struct.pack(f"{order}{'Q' if big else 'I'}", len(out) + folder_size + len(behind))
        behind += value if len(value) > width else b""
        folder += place if len(value) > width else value.ljust(width, b"\0")
    out += struct.pack(f"{order}{'Q' if big else 'H'}", len(every)) + folder + bytes(width) + behind
    return bytes(out)


def drawn(number, kind, count, seed):
    return Tag(number, kind, count, np.random.default_rng(seed).bytes(count * WIDTHS[kind]))


NUMBERS = st.integers(1, 65535).filter(lambda number: number not in {*LAYOUT, *FOLDERS, 274})  # 274 turns the image
tags = st.lists(
    st.builds(drawn, NUMBERS, st.sampled_from(KINDS), st.integers(1, 40), st.integers(0, 2**32)),
    max_size=12,
    unique_by=lambda tag: tag.number,
)


@pytest.mark.filterwarnings("ignore")  # of what Pillow makes of them
@given(tags)
def test_tags_of_any_type_come_back_as_they_were(tags):
    file = with_tags(tiff(), tags)
    assert read_tags(file) == tuple(sorted(tags))
    assert np.array_equal(np.asarray(Image.open(BytesIO(file))), PIXELS)
    again = with_tags(file, tags)
    assert read_tags(again) == read_tags(file)


@pytest.mark.parametrize(("order", "big"), [(">", False), ("<", True)])  # Pillow reads no others
def test_other_byte_orders_and_big_files_say_the_same(order, big):
    text = "© Größe".encode() + b"\0"
    numbers = struct.pack(f"{order}3I", 1, 2**31, 7), struct.pack(f"{order}2H", 1, 3), struct.pack(f"{order}2I", 72, 1)
    given = [(270, 2, len(text), text), (33723, 4, 3, numbers[0]), (297, 3, 2, numbers[1]), (282, 5, 1, numbers[2])]
    long8 = [(65000, 16, 2, struct.pack(f"{order}2Q", 5, 2**32))] if big else []
    file = tiff(order, big, [*given, *long8])
    picture = images.decode(file, "x.tif")
    assert np.array_equal(picture.rgb, PIXELS)
    expected = [
        Tag(270, 2, len(text), text), Tag(282, 5, 1, struct.pack("<2I", 72, 1)),
        Tag(297, 3, 2, struct.pack("<2H", 1, 3)), Tag(33723, 4, 3, struct.pack("<3I", 1, 2**31, 7)),
        *([Tag(65000, 4, 2, struct.pack("<2I", 5, 2**32 - 1))] if big else []),
    ]  # fmt: skip
    assert list(picture.tags) == expected
    written = images.encode(picture, picture.rgb)
    assert list(read_tags(written)) == expected and images.encode(picture, picture.rgb) == written
    assert np.array_equal(np.asarray(Image.open(BytesIO(written))), PIXELS)
    with Image.open(BytesIO(images.encode(picture, picture.rgb, "png"))) as png:
        assert png.getexif()[297] == (1, 3)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_exif_and_gps_survive_in_any_coding(compression):
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2026:11:30 10:00:00", 0x829A: TiffImagePlugin.IFDRational(1, 125)}
    exif[0x8825] = {2: (52.0, 30.0, 1.5)}
    exif[315] = "Zoë"
    file = BytesIO()
    Image.fromarray(PIXELS).save(file, "TIFF", exif=exif.tobytes())
    data = with_tags(tiff(compression=compression), read_tags(file.getvalue()))
    picture = images.decode(data, "x.tif")
    assert not picture.obstacle
    written = images.encode(picture, picture.rgb)
    with Image.open(BytesIO(written)) as image:
        assert image.info["compression"] == compression
        found = image.getexif()
        assert found.get_ifd(0x8769)[0x9003] == "2026:11:30 10:00:00" and found.get_ifd(0x8769)[0x829A] == 1 / 125
        assert [float(x) for x in found.get_ifd(0x8825)[2]] == [52.0, 30.0, 1.5]
    assert read_tags(written) == read_tags(data)


@given(st.binary(max_size=200), st.integers(0, 399))
def test_damaged_tags_are_left_out_and_nothing_raises(noise, at):
    whole = with_tags(tiff(), [Tag(270, 2, 9, b"any text\0"), Tag(700, 1, 40, bytes(40))])
    broken = bytearray(whole)
    start = min(at, len(broken)) if at < 200 else max(0, len(broken) - at + 199)
    broken[start : start + len(noise)] = noise
    read_tags(bytes(broken))
    read_tags(bytes(broken[: len(broken) - at]))
    read_tags(noise)


def test_a_folder_of_tags_that_holds_itself_ends():
    file = bytearray(with_tags(tiff(), [Tag(0x8769, 4, 1, b"", (Tag(0x8825, 4, 1, b"", ()),))]))
    at = bytes(file).index(struct.pack("<HHI", 0x8825, 4, 1)) + 8
    struct.pack_into("<I", file, at, at - 10)  # points to the folder that it lies in
    assert len(read_tags(bytes(file))) == 1


def test_without_tags_there_is_no_block():
    assert exif_block([]) == b"" and read_tags(exif_block([Tag(270, 2, 2, b"a\0")])) == (Tag(270, 2, 2, b"a\0"),)
    with pytest.raises(ValueError, match="plain"):
        with_tags(b"MM\0*", [])
