"""Images keep their format, depth and metadata; data sets are listed completely; files appear whole or not at all."""

import io
import math
import os
import re
import stat
import struct
import zlib
from pathlib import PurePosixPath

import numpy as np
import pytest
from helpers import encoded, png_chunk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin
from PIL.JpegImagePlugin import get_sampling

from radiotag import files, images
from radiotag.errors import RadiotagError
from radiotag.listing import list_folder

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
pixels = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3)))


def smooth(height=48, width=40, channels=3):
    """A picture with structure, so that lossy coders and palettes do not ruin it."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin((x * (c + 1) + y * (3 - c)) / 25) for c in range(channels)]
    return np.rint(np.stack(waves, axis=2)).astype(np.uint8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def exif(orientation=6):
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "a maker"
    tags.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    return b"Exif\0\0" + tags.tobytes().removeprefix(b"Exif\0\0")


def rewrite(data, format="keep", change=3.0):
    """Decode, change every pixel, encode; return the picture, the pixels asked for and the new file."""
    picture = images.decode(data, "some/file")
    wanted = np.clip(picture.rgb + change, 0, 255)
    return picture, wanted, images.encode(picture, wanted, format)


# -- lossless formats: what is asked for is what is read


LOSSLESS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff-packbits": ("TIFF", {"compression": "packbits"}),
    "webp": ("WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=15, deadline=None)
@given(before=pixels, data=st.data())
def test_lossless_rgb_is_exact(kind, before, data):
    format, options = LOSSLESS[kind]
    after = data.draw(hnp.arrays(np.float32, before.shape, elements=st.floats(-9, 265, width=32)))
    picture = images.decode(encoded(Image.fromarray(before), format, **options), "x")
    assert np.array_equal(picture.rgb, before)
    assert picture.rgb.dtype == np.uint8
    file = images.encode(picture, after)
    assert (opened(file).format, opened(file).mode) == (format, "RGB")
    if format == "TIFF":
        assert opened(file).info["compression"] == options.get("compression", "raw")
    assert np.array_equal(images.decode(file, "x").rgb, np.rint(np.clip(after, 0, 255)))
    assert np.array_equal(images.roundtrip(picture, after), np.rint(np.clip(after, 0, 255)))


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_alpha_is_untouched_and_colours_under_it_exact(format, options):
    before, after = noise(9, 7, 4), noise(9, 7, 3, seed=1)
    before[:3, :, 3], before[3:5, :, 3] = 0, 255
    picture = images.decode(encoded(Image.fromarray(before), format, exact=True, **options), "x")
    file = images.encode(picture, after)
    assert opened(file).mode == "RGBA"
    assert np.array_equal(np.asarray(opened(file)), np.dstack([after, before[..., 3]]))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_with_alpha(format):
    before = noise(5, 6, 2)
    picture = images.decode(encoded(Image.fromarray(before), format), "x")
    assert np.array_equal(picture.rgb, np.repeat(before[..., :1], 3, axis=2))
    file = images.encode(picture, picture.rgb + np.array([0, 3, 9]))  # the mean of the channels is 4 more
    assert opened(file).mode == "LA"
    want = np.minimum(before[..., 0].astype(float)[..., None] + [0, 3, 9], 255).mean(axis=2)
    assert np.array_equal(np.asarray(opened(file))[..., 0], np.rint(want))
    assert np.array_equal(np.asarray(opened(file))[..., 1], before[..., 1])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_grey_takes_the_mean(format):
    before = noise(5, 6) // 2
    picture = images.decode(encoded(Image.fromarray(before), format), "x")
    file = images.encode(picture, picture.rgb + np.array([0, 2, 7]))
    assert opened(file).mode == "L"
    assert np.array_equal(np.asarray(opened(file)), before + 3)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_16_bit_grey_stays_16_bit(format, options):
    before = np.random.default_rng(0).integers(0, 65536, (8, 9)).astype(np.uint16)
    before[0, :2] = 0, 65535
    picture = images.decode(encoded(Image.fromarray(before), format, **options), "x")
    assert picture.rgb.min() == 0
    assert picture.rgb.max() == 255
    assert np.allclose(picture.rgb[..., 1], before / 257.0, atol=1e-4)
    for keep in ("keep", "png"):
        file = images.encode(picture, picture.rgb, keep)
        assert opened(file).mode == "I;16"
        assert np.array_equal(np.asarray(opened(file)), before)  # an unchanged picture loses none of its 16 bits
    finer = images.encode(picture, np.full_like(picture.rgb, 100 + 3 / 257))
    assert (np.asarray(opened(finer)) == 25703).all()


def test_big_endian_16_bit_tiff():
    before = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    image = Image.frombytes("I;16B", (4, 3), before.astype(">u2").tobytes())
    picture = images.decode(encoded(image, "TIFF"), "x")
    assert np.allclose(picture.rgb[..., 0], before / 257.0, atol=1e-4)
    assert np.array_equal(np.asarray(opened(images.encode(picture, picture.rgb))), before)


@pytest.mark.parametrize("bits", [2, 4])
def test_shallow_grey_png_keeps_its_depth(bits):
    step = 255 // (2**bits - 1)
    before = (noise(6, 5) >> (8 - bits)) * step
    data = encoded(Image.fromarray(before), "PNG", bits=bits)
    picture = images.decode(data, "x")
    assert np.array_equal(picture.rgb[..., 0], before)
    file = images.encode(picture, picture.rgb + step * 0.4)
    assert file[24] == bits
    assert np.array_equal(np.asarray(opened(file)), before)
    file = images.encode(picture, picture.rgb + step * 0.6)
    assert np.array_equal(np.asarray(opened(file)), np.minimum(before.astype(int) + step, 255))
    assert images.encode(picture, picture.rgb, "png")[24] == 8  # asked for PNG, the mark gets all it can


def test_bilevel():
    before = noise(9, 11) > 127
    picture = images.decode(encoded(Image.fromarray(before), "PNG"), "x")
    assert np.array_equal(picture.rgb[..., 2], before * 255.0)
    file = images.encode(picture, np.where(picture.rgb > 0, 130, 120))
    assert opened(file).mode == "1"
    assert np.array_equal(np.asarray(opened(file)), before)
    assert (images.roundtrip(picture, np.full_like(picture.rgb, 120), "png") == 120).all()


# -- bands that would be lost


@pytest.mark.parametrize(
    ("mode", "tags", "told"),
    [("RGBX", {338: 0}, "4 bands, of which 3"), ("L", {339: 2}, "signed or floating")],
)
def test_a_tiff_whose_bands_would_be_lost_is_refused(mode, tags, told):
    tiff = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        tiff[tag] = value
    data = encoded(Image.fromarray(smooth()).convert(mode), "TIFF", tiffinfo=tiff)
    with pytest.raises(RadiotagError, match=rf"field\.tif: a TIFF of .*{told}"):
        images.decode(data, "field.tif")


# -- palettes


def test_palette_stays_a_palette():
    before = Image.fromarray(smooth(60, 60)).quantize(64)
    _, wanted, file = rewrite(encoded(before, "PNG"))
    assert opened(file).mode == "P"
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 45  # 64 colours moved by 3 fit in 256


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("colours", [1, 2, 5, 16, 17, 256])
def test_few_colours_are_exact_in_a_palette(format, colours):
    table = noise(colours, 3, seed=colours)
    after = table[np.random.default_rng(1).integers(0, colours, (20, 30))]
    picture = images.decode(encoded(Image.fromarray(smooth(20, 30)).quantize(256), format), "x")
    file = images.encode(picture, after.astype(np.float32))
    assert opened(file).mode == "P"
    assert np.array_equal(images.decode(file, "x").rgb, after)


@pytest.mark.parametrize("levels", [[0, 255], [255], [7], list(range(256))])
def test_palette_alpha_is_exact(levels):
    before = Image.fromarray(smooth(32, 32)).quantize(256)
    before.putdata(list(range(256)) * 4)
    alpha = bytes(levels[i % len(levels)] for i in range(256))
    data = encoded(before, "PNG", transparency=alpha)
    want = np.asarray(opened(data).convert("RGBA"))[..., 3]
    picture, wanted, file = rewrite(data)
    assert opened(file).mode == "P"
    assert np.array_equal(np.asarray(opened(file).convert("RGBA"))[..., 3], want)
    assert len(opened(file).getpalette()) <= 768
    full = opened(images.encode(picture, wanted, "png"))
    assert full.mode == "RGBA"
    assert np.array_equal(np.asarray(full), np.dstack([np.rint(wanted), want]))


@pytest.mark.parametrize(("mode", "key", "out"), [("RGB", (1, 2, 3), "RGBA"), ("L", 17, "LA"), ("1", 1, "LA")])
def test_a_transparent_colour_becomes_alpha(mode, key, out):
    """A marked pixel no longer equals the key, so that transparency by colour would open and close at random."""
    before = smooth(8, 8)
    before[2:4, 2:4] = key if mode == "RGB" else 17
    image = Image.fromarray(before).convert(mode)
    if mode == "L":
        image.paste(17, (2, 2, 4, 4))
    data = encoded(image, "PNG", transparency=key)
    alpha = np.asarray(opened(data).convert("RGBA"))[..., 3]
    assert 0 < (alpha == 0).sum() < alpha.size
    _, _, file = rewrite(data)
    assert opened(file).mode == out
    assert np.array_equal(np.asarray(opened(file).convert("RGBA"))[..., 3], alpha)


def test_a_transparent_grey_of_a_shallow_png():
    before = np.repeat(np.arange(16, dtype=np.uint8)[None] * 17, 3, axis=0)
    data = encoded(Image.fromarray(before), "PNG", bits=4, transparency=5)  # level 5 of 16, in the file's own units
    file = images.encode(images.decode(data, "x"), np.repeat(before[..., None], 3, axis=2))
    assert np.array_equal(np.asarray(opened(file))[..., 1] == 0, before == 85)


# -- JPEG


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_keeps_how_it_was_made(subsampling, progressive):
    app13 = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x09\x1c\x02\x78\0\x04capt\0"
    extra = b"\xff\xed" + struct.pack(">H", len(app13) + 2) + app13
    data = encoded(
        Image.fromarray(smooth()), "JPEG", quality=83, subsampling=subsampling, progressive=progressive, dpi=(300, 300),
        exif=exif(), icc_profile=ICC, xmp=b"<x:xmpmeta/>", comment=b"a comment", extra=extra,
    )  # fmt: skip
    picture, wanted, file = rewrite(data)
    old, new = opened(data), opened(file)
    assert (new.format, new.mode, new.size) == ("JPEG", "RGB", old.size)
    assert new.quantization == old.quantization
    assert len(new.quantization) == 2
    assert get_sampling(new) == get_sampling(old) == subsampling
    assert bool(new.info.get("progressive")) is progressive
    for key in ("exif", "icc_profile", "xmp", "comment", "dpi"):
        assert new.info[key] == old.info[key], key
    assert ("APP13", app13) in new.applist
    assert picture.rgb.shape == (48, 40, 3)  # orientation 6 is kept as a tag, and the pixels are not turned
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35


@pytest.mark.parametrize("tables", [1, 2, 3])
def test_jpeg_keeps_its_own_tables(tables):
    wanted = [[1 + (7 * t + i) % 200 for i in range(64)] for t in range(tables)]
    data = encoded(Image.fromarray(smooth()), "JPEG", qtables=wanted, subsampling=0)
    _, _, file = rewrite(data)
    assert {key: list(table) for key, table in opened(file).quantization.items()} == dict(enumerate(wanted))
    assert [layer[3] for layer in opened(file).layer] == [layer[3] for layer in opened(data).layer]


def test_an_unchanged_jpeg_is_almost_unchanged():
    data = encoded(Image.fromarray(smooth()), "JPEG", quality=90, subsampling=0)
    picture = images.decode(data, "x")
    assert images.linf(images.roundtrip(picture, picture.rgb), picture.rgb) <= 2


def test_jpeg_stored_as_rgb_stays_so():
    data = encoded(Image.fromarray(smooth()), "JPEG", keep_rgb=True)
    _, _, file = rewrite(data)
    assert [layer[0] for layer in opened(file).layer] == list(b"RGB")
    _, _, ordinary = rewrite(encoded(Image.fromarray(smooth()), "JPEG"))
    assert [layer[0] for layer in opened(ordinary).layer] == [1, 2, 3]


def test_jpeg_without_density_gets_none():
    data = encoded(Image.fromarray(smooth()), "JPEG", exif=exif())
    _, _, file = rewrite(data)
    assert opened(file).info["jfif_unit"] == opened(data).info["jfif_unit"] == 0


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def segments(data):
    """(marker, body) before the first scan: read apart from the code under test, by each segment's length."""
    found, rest = [], data[2:]
    while rest[1] != 0xDA:
        size = int.from_bytes(rest[2:4], "big")
        found.append((rest[1], rest[4 : 2 + size]))
        rest = rest[2 + size :]
    return found


def as_cameras_write(image, *more, **options):
    """A JPEG with EXIF and no JFIF segment, and more segments behind it."""
    data = encoded(image, "JPEG", **options)
    assert data[2:4] == b"\xff\xe0"
    body = data[4 + int.from_bytes(data[4:6], "big") :]
    return data[:2] + segment(0xE1, exif()) + b"".join(segment(*each) for each in more) + body


def test_every_segment_of_a_jpeg_travels_as_it_is():
    """Otherwise only the marked files would begin with Pillow's segments."""
    more = (
        (0xEB, b"JP\0\1 a box"),
        (0xFE, b"one"),
        (0xE5, b"any"),
        (0xFE, b"two"),
        (0xEE, b"Adobe\0\x64" + bytes(4) + b"\1"),
    )
    data = as_cameras_write(Image.fromarray(smooth()), *more, quality=90)
    _, wanted, file = rewrite(data)
    metadata = [(marker, body) for marker, body in segments(data) if marker >= 0xE0]
    assert [(marker, body) for marker, body in segments(file) if marker >= 0xE0] == metadata
    assert [marker for marker, _ in metadata] == [0xE1, *(marker for marker, _ in more)]
    assert [marker for marker, _ in segments(file)[: len(metadata)]] == [marker for marker, _ in metadata]
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35


@pytest.mark.parametrize("odd", [b"\0", b"\xff\xff", b"\xff\xe4\0\0", b"\xff\xfe\0\0"])
def test_what_lies_between_segments_costs_none_of_them(odd):
    data = encoded(Image.fromarray(smooth()), "JPEG", exif=exif(), icc_profile=ICC)
    place = data.index(b"\xff\xe1")
    data = data[:place] + odd + data[place:]
    _, wanted, file = rewrite(data)
    for key in ("exif", "icc_profile"):
        assert opened(file).info[key] == opened(data).info[key]
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("optimize", [False, True])
def test_jpeg_keeps_optimised_tables_optimised(mode, optimize):
    image = Image.fromarray(smooth()).convert(mode)
    data = encoded(image, "JPEG", optimize=optimize)
    _, _, file = rewrite(data)

    def huffman(data):
        return [body for marker, body in segments(data) if marker == 0xC4]

    plain = huffman(encoded(image, "JPEG"))
    assert (huffman(file) == plain) is (huffman(data) == plain) is (not optimize)


def test_a_jpeg_with_nothing_to_compress_can_be_optimised():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", qtables=[[1] * 64], subsampling=0)
    picture = images.decode(data, "x")
    picture.options["optimize"] = True
    assert len(images.encode(picture, picture.rgb)) > noise.size


def test_only_the_first_picture_of_a_telephones_jpeg_is_marked():
    first, second = Image.fromarray(smooth()), Image.fromarray(smooth()[::-1])
    data = encoded(first, "MPO", save_all=True, append_images=[second], exif=exif())
    assert opened(data).n_frames == 2
    picture, wanted, file = rewrite(data)
    assert (picture.format, picture.dropped) == ("JPEG", 1)
    assert np.array_equal(picture.rgb, np.asarray(opened(data)))
    assert (opened(file).format, getattr(opened(file), "n_frames", 1)) == ("JPEG", 1)
    assert opened(file).info["exif"] == opened(data).info["exif"]
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35
    assert images.decode(file, "x").dropped == 0


@pytest.mark.parametrize("listed", [False, True])
def test_what_lies_behind_a_jpeg_is_known_to_be_dropped(listed):
    """A gain map or a film, which Pillow may not count as a picture."""
    data = encoded(Image.fromarray(smooth()), "JPEG")
    assert images.decode(data + bytes(40), "x").dropped == 0  # filling
    more = data + b"ftypmp42"
    if listed:
        pictures = encoded(Image.fromarray(smooth()), "MPO", save_all=True, append_images=[Image.fromarray(smooth())])
        gain = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="1.0"/>')
        more = pictures[:2] + gain + pictures[2:]
        assert not hasattr(opened(more), "n_frames")
    picture, _, file = rewrite(more)
    assert picture.dropped == 1
    assert images.decode(file, "x").dropped == 0
    assert b"MPF" not in file and b"ftyp" not in file


def test_a_jpeg_whose_colours_are_named_rgb_but_are_not():
    """JFIF means YCbCr, independent of the components' names."""
    data = bytearray(encoded(Image.fromarray(smooth()), "JPEG", subsampling=0))
    frame = data.index(b"\xff\xc0")
    scan = data.index(b"\xff\xda")
    for n in range(3):
        data[frame + 10 + 3 * n] = data[scan + 5 + 2 * n] = b"RGB"[n]
    _, wanted, file = rewrite(bytes(data))
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35


def test_what_a_png_keeps_of_a_jpeg():
    profile = {"exif": exif(), "icc_profile": ICC, "xmp": "<x:xmpmeta>é</x:xmpmeta>".encode(), "dpi": (300, 300)}
    picture = images.decode(encoded(Image.fromarray(smooth()), "JPEG", **profile), "x")
    new = opened(images.encode(picture, picture.rgb, "png"))
    assert new.info["XML:com.adobe.xmp"] == profile["xmp"].decode()
    assert new.info["icc_profile"] == ICC
    assert new.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    assert new.getexif()[274] == 6


def test_a_resolution_beyond_all_measure_is_left_out():
    tags = Image.Exif()
    tags[282] = tags[283] = 110000000.0
    tags[296] = 2  # an inch
    picture = images.decode(encoded(Image.fromarray(smooth()), "JPEG", exif=tags), "x")
    assert "dpi" not in opened(images.encode(picture, picture.rgb, "png")).info


def test_grey_jpeg():
    data = encoded(Image.fromarray(smooth()[..., 0]), "JPEG", quality=70)
    _, wanted, file = rewrite(data)
    assert opened(file).mode == "L"
    assert opened(file).quantization == opened(data).quantization
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35


def test_cmyk_jpeg_keeps_black_and_tables():
    before = np.dstack([smooth(), np.full((48, 40), 60, np.uint8)])
    data = encoded(Image.fromarray(before, "CMYK"), "JPEG", quality=92, icc_profile=ICC)
    picture, wanted, file = rewrite(data, change=1.0)
    new = opened(file)
    assert (new.mode, new.quantization) == ("CMYK", opened(data).quantization)
    assert new.info["icc_profile"] == ICC
    assert np.array_equal(picture.rgb, np.asarray(opened(data).convert("RGB")))
    assert images.psnr(images.decode(file, "x").rgb, wanted) > 35
    assert abs(np.asarray(new)[..., 3].astype(float) - 60).mean() < 3
    png = opened(images.encode(picture, wanted, "png"))
    assert png.mode == "RGB"
    assert "icc_profile" not in png.info  # it described inks
    assert np.array_equal(np.asarray(png), np.rint(wanted))


@settings(max_examples=30, deadline=None)
@given(inks=hnp.arrays(np.uint8, (6, 5, 4)), after=hnp.arrays(np.uint8, (6, 5, 3)))
@example(inks=np.full((6, 5, 4), 8, np.uint8), after=np.full((6, 5, 3), 200, np.uint8))
def test_cmyk_tiff_is_exact(inks, after):
    picture = images.decode(encoded(Image.fromarray(inks, "CMYK"), "TIFF"), "x")
    file = images.encode(picture, after)
    assert opened(file).mode == "CMYK"
    assert np.array_equal(np.asarray(opened(file).convert("RGB")), after)
    black = np.minimum(inks[..., 3], 255 - after.max(axis=2))
    assert np.array_equal(np.asarray(opened(file))[..., 3], black)


@pytest.mark.parametrize("blocks", [0, 1, 7])
def test_jpeg_keeps_where_a_decoder_can_start_anew(blocks):
    data = encoded(Image.fromarray(smooth(64, 64)), "JPEG", quality=90, restart_marker_blocks=blocks)
    picture, _, file = rewrite(data)
    intervals = [re.findall(rb"\xff\xdd\x00\x04(..)", one, re.DOTALL) for one in (data, file)]
    assert intervals[0] == intervals[1] == ([struct.pack(">H", blocks)] if blocks else [])
    assert picture.options["restart_marker_blocks"] == blocks


@pytest.mark.parametrize("sampling", [b"\x12", b"\x41"])
def test_jpeg_with_other_subsampling_gets_full_chroma(sampling):
    """4:4:0, as some cameras turn their pictures, and 4:1:1: neither is one of Pillow's three."""
    data = encoded(Image.fromarray(smooth(64, 64)), "JPEG", quality=95, subsampling=0)
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x11
    picture = images.decode(data[:at] + sampling + data[at + 1 :], "odd.jpg")
    assert picture.rgb.shape == (64, 64, 3) and picture.full_chroma and not picture.obstacle
    file = images.encode(picture, picture.rgb)
    assert get_sampling(opened(file)) == 0
    assert images.psnr(images.decode(file, "x").rgb, picture.rgb) > 40
    assert not images.decode(data, "plain.jpg").full_chroma
    assert not images.decode(encoded(Image.fromarray(smooth()).convert("L"), "JPEG"), "grey.jpg").full_chroma


# -- metadata of the other formats


def test_png_chunks_are_copied_as_they_are():
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a title")
    info.add_itxt("Note", "näheres", "de", "Notiz")
    info.add_text("Long", "text " * 50, zip=True)
    info.add(b"gAMA", struct.pack(">I", 45455))
    info.add(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
    data = encoded(Image.fromarray(smooth()), "PNG", pnginfo=info, exif=exif(), icc_profile=ICC, dpi=(72, 144))
    picture, wanted, file = rewrite(data)
    old, new = opened(data), opened(file)
    assert new.text == old.text == {"Title": "a title", "Note": "näheres", "Long": "text " * 50}
    for key in ("gamma", "chromaticity", "exif", "icc_profile", "dpi"):
        assert new.info[key] == old.info[key], key
    assert images.encode(picture, wanted, "png") == file


def with_chunks(data, *chunks):
    """A PNG with these (type, content) behind its header."""
    made = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return data[:33] + b"".join(made) + data[33:]


def chunks_of(data):
    position, found = 8, {}
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        found[kind] = data[position + 8 : position + 8 + size]
        position += 12 + size
    return found


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_chunks_that_stay_true_are_kept_and_no_others(mode):
    """By their letters: a lower fourth one says that a chunk may be copied whatever becomes of the pixels."""
    image = Image.fromarray(smooth()).convert(mode)
    background = b"\0\5" if mode == "L" else b"\5" if mode == "P" else b"\0\5\0\6\0\7"
    given = {
        b"bKGD": background,
        b"sBIT": b"\5" * len(mode if mode != "P" else "RGB"),
        b"prVt": b"mine",
        b"prVT": b"of the pixels",
    }
    written = chunks_of(rewrite(with_chunks(encoded(image, "PNG"), *given.items()))[2])
    assert written[b"prVt"] == b"mine" and b"prVT" not in written
    for kind in (b"bKGD", b"sBIT"):
        assert written.get(kind) == (None if mode == "P" else given[kind])


@pytest.mark.parametrize("lossless", [False, True])
def test_webp_keeps_its_kind_and_metadata(lossless):
    metadata = {"exif": exif(), "icc_profile": ICC, "xmp": b"<x:xmpmeta/>"}
    data = encoded(Image.fromarray(smooth()), "WEBP", lossless=lossless, **metadata)
    _, wanted, file = rewrite(data)
    assert (b"VP8L" in file, b"VP8 " in file) == (lossless, not lossless)
    for key in ("exif", "icc_profile", "xmp"):
        assert opened(file).info[key] == opened(data).info[key], key
    assert images.psnr(images.decode(file, "x").rgb, wanted) > (99 if lossless else 30)
    _, _, plain = rewrite(encoded(Image.fromarray(smooth()), "WEBP", lossless=lossless))
    assert (plain[12:16] == b"VP8L") is lossless  # without the extended header


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
@pytest.mark.parametrize("odd", [b"", b"!"])
def test_webp_keeps_its_exif_as_it_was(prefix, odd):
    block = prefix + exif().removeprefix(b"Exif\0\0") + odd
    plain = encoded(Image.fromarray(smooth()), "WEBP", lossless=True, exif=b"Exif\0\0" + block.removeprefix(prefix))
    data = images._with_exif(plain, block)
    assert opened(data).info["exif"] == block
    written = rewrite(data)[2]
    assert opened(written).info["exif"] == block and struct.unpack_from("<I", written, 4)[0] == len(written) - 8


def test_lossy_webp_keeps_alpha_exactly():
    before = np.dstack([smooth(), noise(48, 40)])
    _, _, file = rewrite(encoded(Image.fromarray(before), "WEBP"))
    assert b"VP8 " in file
    assert np.array_equal(np.asarray(opened(file))[..., 3], before[..., 3])


def test_tiff_keeps_tags():
    tags = Image.Exif()
    tags[0x010E], tags[0x013B] = "a description", "an artist"
    tags.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    data = encoded(Image.fromarray(smooth()), "TIFF", exif=tags.tobytes(), dpi=(300, 150), icc_profile=ICC)
    picture, wanted, file = rewrite(data)
    new = opened(file)
    assert [new.tag_v2[tag] for tag in (0x010E, 0x013B)] == ["a description", "an artist"]
    assert new.getexif().get_ifd(0x8769) == {0x9003: "2020:01:02 03:04:05"}
    assert (new.info["dpi"], new.info["icc_profile"]) == ((300, 150), ICC)
    png = opened(images.encode(picture, wanted, "png"))
    assert png.getexif()[0x013B] == "an artist"
    assert png.info["icc_profile"] == ICC
    assert np.array_equal(np.asarray(png), np.rint(wanted))


def test_compressed_tiff_keeps_predictor_and_plain_tags():
    tags = {317: 2, 0x010E: "words"}
    data = encoded(Image.fromarray(smooth()), "TIFF", compression="tiff_lzw", tiffinfo=tags, dpi=(99, 99))
    assert opened(data).tag_v2[317] == 2
    _, wanted, file = rewrite(data)
    assert opened(file).tag_v2[317] == 2
    assert opened(file).tag_v2[0x010E] == "words"
    assert opened(file).info["dpi"] == (99, 99)
    assert np.array_equal(np.asarray(opened(file)), np.rint(wanted))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiff_orientation(orientation, compression):
    """Pillow shows the picture upright; the file keeps its tag and the layout of what is stored."""
    data = encoded(Image.fromarray(smooth()), "TIFF", compression=compression, tiffinfo={274: orientation})
    picture, wanted, file = rewrite(data)
    assert picture.rgb.shape == ((40, 48, 3) if orientation > 4 else (48, 40, 3))
    assert np.array_equal(np.asarray(opened(file)), np.rint(wanted))
    raw = Image.open(io.BytesIO(file))
    assert raw.tag_v2.get(274) == orientation
    assert (raw.tag_v2[257], raw.tag_v2[256]) == (48, 40)
    png = opened(images.encode(picture, wanted, "png"))
    assert png.getexif().get(274, 1) == 1
    assert np.array_equal(np.asarray(png), np.rint(wanted))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_nested_exif_of_a_compressed_tiff(compression):
    data = encoded(Image.fromarray(smooth()), "TIFF", exif=exif(orientation=1))
    if compression == "tiff_lzw":  # Pillow cannot write such a file, so give the plain one an LZW strip
        strip, whole = lzw_of(smooth().tobytes()), bytearray(data)
        for entry in range(10, 10 + 12 * data[8], 12):
            tag = struct.unpack_from("<H", data, entry)[0]
            if tag in (259, 273, 279):  # compression, where the strip is, how long it is
                struct.pack_into("<H", whole, entry + 2, 4)
                struct.pack_into("<I", whole, entry + 8, {259: 5, 273: len(data), 279: len(strip)}[tag])
        data = bytes(whole) + strip
    assert opened(data).info["compression"] == compression
    picture = images.decode(data, "nested.tif")
    assert np.array_equal(picture.rgb, smooth())
    written = opened(images.encode(picture, picture.rgb))
    assert written.info["compression"] == compression
    assert written.getexif().get_ifd(0x8769)[0x9003].startswith("2020")
    png = opened(images.encode(picture, picture.rgb, "png"))
    assert png.getexif().get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"


def lzw_of(pixels):
    """The LZW strip that Pillow writes for these pixels, on its own."""
    image = Image.frombytes("RGB", (40, 48), pixels)
    data = encoded(image, "TIFF", compression="tiff_lzw", strip_size=1 << 20)
    tags = opened(data).tag_v2
    assert len(tags[273]) == 1
    return data[tags[273][0] :][: tags[279][0]]


def test_lossy_tiff_can_only_become_png():
    picture = images.decode(encoded(Image.fromarray(smooth()), "TIFF", compression="jpeg"), "lossy.tif")
    with pytest.raises(RadiotagError, match=r"lossy\.tif.*jpeg"):
        images.encode(picture, picture.rgb)
    assert np.array_equal(images.roundtrip(picture, picture.rgb, "png"), picture.rgb)


def test_bmp_with_alpha_can_only_become_png():
    before = noise(4, 5, 4)
    header = struct.pack("<IiiHHIIiiII4I", 108, 5, -4, 1, 32, 3, 80, 0, 0, 0, 0, 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    body = header.ljust(108, b"\0") + before.tobytes()
    picture = images.decode(b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 122) + body, "a.bmp")
    assert np.array_equal(picture.rgb, before[..., :3])
    with pytest.raises(RadiotagError, match=r"a\.bmp.*alpha"):
        images.encode(picture, picture.rgb)
    assert np.array_equal(np.asarray(opened(images.encode(picture, picture.rgb, "png"))), before)


def test_bmp_keeps_resolution():
    data = encoded(Image.fromarray(smooth()), "BMP", dpi=(200, 100))
    _, _, file = rewrite(data)
    assert opened(file).info["dpi"] == opened(data).info["dpi"]


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_png_on_request_keeps_profile_and_exif(format):
    data = encoded(Image.fromarray(smooth()), format, exif=exif(), icc_profile=ICC)
    _, wanted, file = rewrite(data, "png")
    assert (opened(file).format, opened(file).info["icc_profile"]) == ("PNG", ICC)
    assert dict(opened(file).getexif()) == dict(opened(data).getexif())
    assert opened(file).getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(opened(file)), np.rint(wanted))


# -- what is refused


def png(depth, colour, samples):
    """A 2 x 2 PNG, by hand: Pillow cannot write these depths."""

    row = b"\0" + bytes(2 * samples * depth // 8)
    header = png_chunk(b"IHDR", struct.pack(">2I5B", 2, 2, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(row * 2)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png_is_refused(colour, samples):
    assert images.decode(png(8, colour, samples), "x").rgb.shape == (2, 2, 3)  # the hand-made file itself is sound
    with pytest.raises(RadiotagError, match=r"deep\.png.*16-bit"):
        images.decode(png(16, colour, samples), "deep.png")


def test_float_and_16_bit_colour_tiff_are_refused():
    with pytest.raises(RadiotagError, match=r"f\.tif.*32 bits"):
        images.decode(encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "f.tif")
    entries = [(256, 4, 1), (257, 4, 1), (258, 3, 16), (259, 3, 1), (262, 3, 2), (277, 3, 3), (278, 4, 1), (279, 4, 6)]
    body = b"".join(struct.pack("<2HII", tag, kind, 1, value) for tag, kind, value in entries[:2])
    body += struct.pack("<2HII", 258, 3, 3, 122)  # three shorts, after the directory
    body += b"".join(struct.pack("<2HII", tag, kind, 1, value) for tag, kind, value in entries[3:5])
    body += struct.pack("<2HII", 273, 4, 1, 128)
    body += b"".join(struct.pack("<2HII", tag, kind, 1, value) for tag, kind, value in entries[5:])
    data = b"II*\0" + struct.pack("<IH", 8, 9) + body + struct.pack("<I", 0)
    data = data.ljust(122, b"\0") + struct.pack("<3H", 16, 16, 16) + bytes(6)
    assert opened(data).mode == "RGB"  # this is the silent loss
    with pytest.raises(RadiotagError, match=r"deep\.tif.*16 bits"):
        images.decode(data, "deep.tif")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_named(format, share):
    data = encoded(Image.fromarray(noise(64, 64, 3)), format)
    assert images.decode(data, "x").rgb.shape == (64, 64, 3)
    with pytest.raises(RadiotagError, match=r"dir/broken file") as caught:
        images.decode(data[: int(len(data) * share)], "dir/broken file")
    assert caught.value.hint


@pytest.mark.parametrize("data", [b"", b"just some text\n" * 20, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(500)])
def test_what_is_no_image_is_named(data):
    with pytest.raises(RadiotagError, match=r"n\.png: ") as caught:
        images.decode(data, "n.png")
    assert "BytesIO" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP"]))
def test_damaged_files_give_an_image_or_a_clear_error(data, format):
    whole = bytearray(encoded(Image.fromarray(smooth(16, 16)), format))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = images.decode(bytes(whole), "damaged")
        assert images.encode(picture, picture.rgb)
    except RadiotagError as error:
        assert str(error).startswith("damaged: ")


@pytest.mark.parametrize("limit", [900, 500])  # Pillow warns over its limit and refuses over twice that
def test_decompression_bombs_are_errors(monkeypatch, limit):
    data = encoded(Image.fromarray(smooth(32, 32)), "PNG")
    assert images.decode(data, "x").rgb.shape == (32, 32, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(RadiotagError, match=r"b\.png.*bomb") as caught:
        images.decode(data, "b.png")
    assert str(limit) in caught.value.hint


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(format):
    frames = [Image.fromarray(noise(8, 8, 3, seed=n)) for n in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(RadiotagError, match=r"moving\.x.*several"):
        images.decode(data, "moving.x")


def test_gif_and_wrong_use_are_refused():
    with pytest.raises(RadiotagError, match=r"a\.png"):
        images.decode(encoded(Image.fromarray(smooth()), "GIF"), "a.png")
    picture = images.decode(encoded(Image.fromarray(smooth()), "PNG"), "x")
    with pytest.raises(ValueError, match="gif"):
        images.encode(picture, picture.rgb, "gif")
    with pytest.raises(ValueError, match="pixels"):
        images.encode(picture, picture.rgb[1:])


def test_an_encoder_that_fails_names_the_file(monkeypatch):
    picture = images.decode(encoded(Image.fromarray(smooth()), "JPEG"), "big.jpg")
    picture.options["comment"] = bytes(70000)
    with pytest.raises(RadiotagError, match=r"big\.jpg: cannot be written") as caught:
        images.encode(picture, picture.rgb)
    assert "png" in caught.value.hint


# -- names


@pytest.mark.parametrize(
    ("path", "want"), [("a/b.jpg", "a/b.png"), ("a/b.PNG", "a/b.PNG"), ("x.y.tiff", "x.y.png"), ("n\n.webp", "n\n.png")]
)
def test_extension(path, want):
    assert images.extension(PurePosixPath(path)) == PurePosixPath(path)
    assert images.extension(PurePosixPath(path), "png") == PurePosixPath(want)


# -- listing a folder


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def listed(source):
    items, names, others = list_folder(source)
    return [(str(item.path), item.label) for item in items], names, [str(path) for path in others]


def test_listing_classes_nested_files_and_others(tmp_path):
    root = tree(
        tmp_path, "dog/2.JPG", "dog/1.png", "cat/deep/er/3.webp", "cat/notes.txt", "labels.csv", "docs/readme.md",
        "cat/.thumb.png", ".cache/4.png", "dog/5.png.part", "Zoo/6.tif", "cat/png", "cat/.png",
        "dog/.0123456789abcdef.part",
    )  # fmt: skip
    (root / "dog" / "none" / "yet").mkdir(parents=True)
    assert listed(root) == (
        [("Zoo/6.tif", "Zoo"), ("cat/deep/er/3.webp", "cat"), ("dog/1.png", "dog"), ("dog/2.JPG", "dog")],
        ["Zoo", "cat", "dog"],
        [".cache/4.png", "cat/.png", "cat/.thumb.png", "cat/notes.txt", "cat/png", "docs/readme.md",
         "dog/5.png.part", "dog/none/yet", "labels.csv"],
    )  # fmt: skip


def test_listing_orders_classes_as_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    root = tree(tmp_path, "b/1.png", "B/2.png", "a b/3.png", "a/4.png", "a.x/5.png", "10/6.png", "9/7.png", "é/8.png")
    items, names, _ = list_folder(root)
    folder = ImageFolder(str(root))
    assert names == folder.classes
    assert {str(root / item.path): names.index(item.label) for item in items} == dict(folder.samples)


def test_listing_flat(tmp_path):
    root = tree(tmp_path, "b.png", "a.bmp", "notes/x.txt")
    assert listed(root) == ([("a.bmp", ""), ("b.png", "")], [""], ["notes/x.txt"])


def test_listing_odd_names(tmp_path):
    names = ["a b.png", "new\nline.jpg", "ünï→.webp", "x" * 251 + ".png", "-rf.png", "a.b.c.tiff"]
    raw = os.fsdecode(b"latin\xe9.png")
    try:
        tree(tmp_path, f"class\n1/{raw}")
        names.append(raw)
    except OSError:
        pass  # some file systems take only UTF-8
    tree(tmp_path, *(f"class\n1/{name}" for name in names))
    items, classes, others = list_folder(tmp_path)
    assert [item.path.name for item in items] == sorted(names)
    assert (classes, others) == (["class\n1"], [])
    assert all((tmp_path / item.path).is_file() for item in items)


def test_listing_mixed_is_ambiguous(tmp_path):
    with pytest.raises(RadiotagError, match=r"cat.*loose\.png") as caught:
        list_folder(tree(tmp_path, "cat/1.png", "loose.png"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("train/cat/1.png", "train/dog/2.png"), ["cat", "dog"]),
        (("set/images/cat/1.png", "set/images/dog/deep/2.png", "set/readme.txt"), ["cat", "dog"]),
        (("train/cat/1.png", "val/cat/2.png", "train/dog/3.png"), ["cat", "dog"]),
        (("train/cat/1.png",), ["cat"]),
        (("cat/1.png", "cat/2.png"), ["cat"]),
        (("cat/1.png", "cat/more/2.png"), ["cat"]),
        (("cat/a/1.png", "dog/a/2.png"), ["cat", "dog"]),
        (("train/1.png", "val/2.png"), ["train", "val"]),
    ],
)
def test_the_folders_of_a_lone_root_are_the_classes(names, classes, tmp_path):
    items, found, _ = list_folder(tree(tmp_path, *names))
    assert found == classes == sorted({item.label for item in items})
    assert all(item.label in item.path.parts[:-1] for item in items)


def test_a_table_tells_the_classes_of_a_flat_folder(tmp_path):
    root = tree(tmp_path, "1.png", "2.png", "3.png")
    (root / "metadata.csv").write_text("\ufefffile_name,label\n1.png,cat\n2.png,dog\n3.png,cat\n", encoding="utf-8")
    assert listed(root)[:2] == ([("1.png", "cat"), ("2.png", "dog"), ("3.png", "cat")], ["cat", "dog"])
    (root / "metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,\n")
    with pytest.raises(RadiotagError, match=r"metadata\.csv gives no class of 2\.png") as caught:
        list_folder(root)
    assert "move it away" in caught.value.hint
    (root / "metadata.csv").write_text("file_name,text\n1.png,a cat\n")
    assert listed(root)[1] == [""]
    (root / "metadata.csv").write_bytes(b"file_name,label\n1.png,\xff\n")
    with pytest.raises(RadiotagError, match=r"metadata\.csv: not a table"):
        list_folder(root)


def test_a_few_pictures_beside_the_class_folders_are_copied(tmp_path):
    root = tree(tmp_path, "cat/1.png", "dog/2.png", "teaser.png")
    assert listed(root) == ([("cat/1.png", "cat"), ("dog/2.png", "dog")], ["cat", "dog"], ["teaser.png"])


def picture_tree(root, **pictures):
    for name, image in pictures.items():
        path = root / name.replace("__", "/")
        path = path.with_name(f"{path.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def test_label_maps_beside_their_pictures_are_copied(tmp_path):
    photo = Image.fromarray(smooth(30, 30))
    grey, few = photo.convert("L"), photo.quantize(20)
    apart = picture_tree(tmp_path / "apart", images__a=photo, masks__a=few, images__b=photo, masks__b=few)
    assert listed(apart) == (
        [("images/a.png", "images"), ("images/b.png", "images")], ["images"], ["masks/a.png", "masks/b.png"]
    )  # fmt: skip
    beside = picture_tree(tmp_path / "beside", cat__a=photo, cat__a_mask=grey, cat__b=photo, **{"cat__b-seg": few})
    assert [path for path, _ in listed(beside)[0]] == ["cat/a.png", "cat/b.png"]
    deep = picture_tree(tmp_path / "deep", cat__a=photo, dog__b=photo, depth__cat__a=grey, depth__dog__b=grey)
    assert listed(deep)[1:] == (["cat", "dog"], ["depth/cat/a.png", "depth/dog/b.png"])


def test_pictures_that_are_only_called_like_label_maps_are_marked(tmp_path):
    """Classes of people with and without masks, a picture whose twin is gone, a photograph as large as its mask."""
    photo = Image.fromarray(noise(40, 40, 3))
    root = picture_tree(tmp_path / "faces", mask__1=photo, no_mask__1=photo, mask__2=photo)
    assert listed(root)[1] == ["mask", "no_mask"]
    alone = picture_tree(tmp_path / "alone", masks__a=photo.convert("L"), images__b=photo)
    assert listed(alone)[1] == ["images", "masks"]


def test_listing_nothing_to_mark(tmp_path):
    with pytest.raises(RadiotagError, match="no images in") as caught:
        list_folder(tree(tmp_path, "cat/1.gif", "2.png.part"))
    assert all(suffix in caught.value.hint for suffix in images.SUFFIXES)
    with pytest.raises(RadiotagError, match="no such folder"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(RadiotagError, match="not a folder"):
        list_folder(tmp_path / "cat/1.gif")


def test_listing_follows_links_that_stay_inside(tmp_path):
    root = tree(tmp_path / "set", "cat/1.png", "dog/2.png", "notes.txt")
    (root / "dog/link.png").symlink_to("../cat/1.png")
    (root / "dog/link.txt").symlink_to("../notes.txt")
    (tmp_path / "alias").symlink_to("set")  # the source itself may be a link
    want = ["cat/1.png", "dog/2.png", "dog/link.png"]
    for source in (root, tmp_path / "alias"):
        items, _, others = listed(source)
        assert [path for path, *_ in items] == want
        assert others == ["dog/link.txt", "notes.txt"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("../../secret.png", "outside"),
        ("nothing", "nowhere"),
        ("link.png", "nowhere"),
        ("../cat", "to a folder"),
        ("..", "to a folder"),
    ],
)
def test_listing_refuses_other_links(tmp_path, target, why):
    root = tree(tmp_path / "set", "cat/1.png", "dog/2.png")
    tree(tmp_path, "secret.png", "set-beside/3.png")
    (root / "dog/link.png").symlink_to(target)
    with pytest.raises(RadiotagError, match=rf"dog/link\.png.*{why}"):
        list_folder(root)


def test_listing_refuses_a_link_to_a_sibling_with_the_same_prefix(tmp_path):
    root = tree(tmp_path / "set", "cat/1.png")
    tree(tmp_path, "set-beside/3.png")
    (root / "cat/link.png").symlink_to(tmp_path / "set-beside/3.png")
    with pytest.raises(RadiotagError, match="outside"):
        list_folder(root)


def test_listing_passes_over_what_is_no_file(tmp_path):
    root = tree(tmp_path, "cat/1.png")
    os.mkfifo(root / "cat/pipe.png")
    assert listed(root) == ([("cat/1.png", "cat")], ["cat"], [])


# -- writing


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("umask", "mode", "want"), [(0o022, None, 0o644), (0o077, None, 0o600), (0o022, 0o600, 0o600),
                                                     (0o077, 0o664, 0o664), (0o022, 0o400, 0o400)])  # fmt: skip
def test_write_mode(tmp_path, umask, mode, want):
    old = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "f", b"content", mode)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == want
    assert (tmp_path / "f").read_bytes() == b"content"
    assert names_in(tmp_path) == ["f"]


def test_write_replaces_and_takes_long_names(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    for content in (b"old", b"new"):
        files.write_atomically(path, content)
    assert path.read_bytes() == b"new"
    files.copy_atomically(path, tmp_path / ("m" * 255))
    assert (tmp_path / ("m" * 255)).read_bytes() == b"new"
    assert len(names_in(tmp_path)) == 2


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, step, error):
    seen = []

    def fail(*args):
        seen.extend(names_in(tmp_path))
        raise error

    path = tmp_path / "f.png"
    path.write_bytes(b"old")
    source = tmp_path / "source"
    source.write_bytes(b"new")
    monkeypatch.setattr(os, step, fail)
    expected = RadiotagError if isinstance(error, OSError) else KeyboardInterrupt
    for write in (lambda: files.write_atomically(path, b"new"), lambda: files.copy_atomically(source, path)):
        seen.clear()
        with pytest.raises(expected) as caught:
            write()
        if expected is RadiotagError:
            assert "f.png" in str(caught.value)
            assert "No space" in str(caught.value)
        assert [name for name in seen if name.endswith(".part")]  # it was under way, in the same folder
        assert names_in(tmp_path) == ["f.png", "source"]
        assert path.read_bytes() == b"old"


def test_write_into_a_missing_folder_and_copy_of_nothing(tmp_path):
    with pytest.raises(RadiotagError, match=r"cannot write .*gone/f\.png"):
        files.write_atomically(tmp_path / "gone/f.png", b"")
    with pytest.raises(RadiotagError, match=r"cannot read .*absent"):
        files.copy_atomically(tmp_path / "absent", tmp_path / "f")
    assert names_in(tmp_path) == []


def test_copy_is_exact(tmp_path):
    data = noise(300_001).tobytes()
    (tmp_path / "a").write_bytes(data)
    files.copy_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


# -- measures and the sheet


@settings(max_examples=40, deadline=None)
@given(a=pixels, data=st.data())
def test_psnr_and_linf_against_plain_sums(a, data):
    b = data.draw(hnp.arrays(np.uint8, a.shape))
    gaps = [int(x) - int(y) for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    assert images.linf(a, b) == max(abs(gap) for gap in gaps)
    power = sum(gap * gap for gap in gaps)
    want = 20 * math.log10(255) - 10 * math.log10(power / len(gaps)) if power else math.inf
    assert images.psnr(a, b) == pytest.approx(want, abs=1e-9)
    assert images.psnr(b, a) == images.psnr(a, b)


def test_sheet_size_and_panels():
    small, tall = noise(32, 50, 3), noise(100, 640, 3)
    marked = small.astype(np.float32)
    marked[:, 25:] += 5
    sheet = np.asarray(opened(images.contact_sheet([(small, marked, "one"), (tall, tall, "two")])))
    # 50 x 32 grows threefold to 150 x 96; 640 x 100 halves to 320 x 50; 8 px between, 24 px of text a row and on top
    assert sheet.shape == (24 + 8 + (96 + 24 + 8) + (50 + 24 + 8), 3 * 320 + 4 * 8, 3)
    assert np.array_equal(sheet[32:128, 8:158], np.repeat(np.repeat(small, 3, axis=0), 3, axis=1))
    difference = sheet[32:128, 8 + 2 * 328 :][:, :150]
    assert (difference[:, :75] == 128).all()
    assert (difference[:, 75:] == 178).all()
    second = sheet[160:210, 8 + 2 * 328 :][:, :320]
    assert (second == 128).all()
    assert (sheet[128:152] < 128).any()  # the caption is there
    assert (sheet[:32, :320] < 64).any()


def test_sheet_difference_is_clipped_and_taken_before_reducing():
    grey = np.full((400, 400, 3), 100.0)
    fine = grey.copy()
    fine[::2], fine[1::2] = 90, 110  # averages to nothing once reduced
    sheet = np.asarray(opened(images.contact_sheet([(grey, fine, "")])))
    panel = sheet[40:340, 8 + 2 * 328 + 8 :][:, :300]
    assert panel.shape == (300, 300, 3)
    assert panel.std() > 5
    flat = np.asarray(opened(images.contact_sheet([(grey, grey + 50, "")])))
    assert (flat[32:352, 8 + 2 * 328 :][:, :320] == 255).all()
