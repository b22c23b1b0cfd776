"""Image files: decode, encode again in the same format, compare two images, draw a contact sheet.

Only files that can be written back faithfully are accepted: Unmarkable if Pillow would silently change depth or
layout.
"""

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import PurePath, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile
from scipy import ndimage

from radiotag.bands import EACH, bands, sampled
from radiotag.errors import BrokenImage, Unmarkable
from radiotag.tifftags import Tag, exif_block, read_tags, with_tags

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".mpo"})
OTHER_SUFFIXES = frozenset(  # of image formats that are only copied
    {
        *(".gif", ".apng", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".ico", ".exr", ".hdr", ".pcx"),
        *(
            ".ppm",
            ".pgm",
            ".pbm",
            ".pnm",
            ".tga",
            ".psd",
            ".dng",
            ".cr2",
            ".cr3",
            ".nef",
            ".arw",
            ".raf",
            ".orf",
            ".rw2",
        ),
    }
)
OTHER_FORMATS = {  # by a file's first bytes
    b"GIF8": "a GIF", b"\0\0\0\x0cjP  ": "a JPEG 2000", b"\xff\x4f\xff\x51": "a JPEG 2000", b"8BPS": "a PSD",
    b"\xff\x0a": "a JPEG XL", b"\0\0\0\x0cJXL ": "a JPEG XL", b"\0\0\1\0": "an ICO", b"P5": "a PGM", b"P6": "a PPM",
}  # fmt: skip
BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIC"}
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"})
GREY = frozenset({"1", "L", "LA", "I;16"})  # modes without colour
PNG_MODES = {"1": "L", "P": "RGB", "CMYK": "RGB"}  # replaced under `--format png`: the old modes would lose the mark
PNG_CHUNKS = frozenset(
    {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"pHYs", b"tIME"}
)
BACKGROUND, SIGNIFICANT, INDEXED = b"bKGD", b"sBIT", 3  # two chunks, and a colour type
TIFF_COMPRESSIONS = frozenset({"raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "lzma", "zstd"})
TURN_BACK = {  # Pillow turns TIFFs, and no other format, upright on reading; this undoes it, by orientation tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SCAN, HUFFMAN, RESTART, ADOBE, COMMENT = 0xDA, 0xC4, 0xDD, 0xEE, 0xFE  # markers of JPEG segments
FURTHER_PICTURES = b"MPF\0"  # start of the list of further pictures, whose offsets become invalid
METADATA = ("exif", "icc_profile", "xmp", "dpi")  # in Pillow's words
WEBP_QUALITY = 90  # a lossy WebP does not record its quality; the usual 75-80 would remove part of the mark
SHEET_SMALLEST, SHEET_LARGEST = 128, 320  # pixels on the long side of an image in the contact sheet
UNSIGNED, ORIENTATION, PREDICTOR = 1, 274, 317  # of a TIFF: a format of samples, and two tags
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
Pixels = NDArray[np.uint8] | NDArray[np.float32]  # the latter for 16 bits per sample
# Pillow warns of odd metadata, and of large images, which are refused here. The filter is global because
# `catch_warnings` is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\b")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """A decoded image with everything needed to write it again."""

    name: str  # for error messages
    rgb: Pixels  # (H, W, 3) in [0, 255], the input of networks; 16-bit values are divided by 257
    format: str  # one of FORMATS, by content and not by suffix
    mode: str  # Pillow's mode for writing
    depth: int  # bits per sample to write: 1, 2, 4, 8 or 16
    plane: NDArray[np.uint8] | None  # (H, W), written unchanged: alpha, or the black ink of CMYK
    options: dict[str, Any] = field(repr=False)  # Pillow's options to write the same format as before
    chunks: bytes = field(repr=False)  # metadata, copied unchanged: chunks of a PNG, or segments of a JPEG
    tags: tuple[Tag, ...] = field(default=(), repr=False)  # the same of a TIFF
    orientation: int  # of a TIFF, which Pillow has turned upright; 1 for other formats, which it leaves as stored
    obstacle: str  # the reason why the same format cannot be written again; "" if it can
    full_chroma: bool = False  # a JPEG whose chroma is written at a finer resolution, as its own cannot be written
    dropped: int = 0  # further pictures that a telephone's JPEG loses (a gain map, a film)


def decode(data: bytes, name: str) -> Picture:
    """Decode an image file. Only a TIFF is turned upright; in other formats the orientation stays a tag.

    BrokenImage for a file that is empty, truncated, not an image, animated, too large, or cannot be written back. The
    message contains `name`.
    """
    try:
        return _picture(_open(data, name), data, name)
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's limit is twice as high
        raise _bomb(name) from error
    except Exception as error:  # a broken file can raise anything inside a decoder: struct.error, SyntaxError, ...
        raise BrokenImage(f"{name}: not an image that can be read ({error})", "replace or remove the file") from error


def _bomb(name: str) -> BrokenImage:
    hint = f"reduce it to fewer than {Image.MAX_IMAGE_PIXELS} pixels, or leave it out"
    return BrokenImage(f"{name}: too many pixels, it may be a decompression bomb", hint)


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BrokenImage(f"{name}: the file is empty", "replace or remove the file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its message shows only the address of a buffer
        hint = f"the formats read are {', '.join(FORMATS)}; replace or remove the file"
        if kind := other_format(data):
            raise Unmarkable(f"{name}: it is {kind}, whatever its name says", hint, kind) from error
        raise BrokenImage(f"{name}: not an image, or a broken one", hint) from error
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise _bomb(name)
    if getattr(image, "n_frames", 1) > 1 and not isinstance(image, JpegImageFile):
        raise Unmarkable(f"{name}: it holds several frames or pages", "keep one frame per file", "several frames")
    if isinstance(image, TiffImageFile):
        image.info["orientation"] = image.tag_v2.get(ORIENTATION, 1)  # load() removes the tag
    image.load()
    if isinstance(image.info.get("transparency"), str):  # a PNG text of that name, where Pillow expects numbers
        del image.info["transparency"]
    return image


def other_format(data: bytes) -> str | None:
    """The name of an image format that is only copied, by a file's first bytes; None for others."""
    if data[4:8] == b"ftyp":
        return BRANDS.get(data[8:12])
    return next((name for start, name in OTHER_FORMATS.items() if data.startswith(start)), None)


def kind_of_loss(reason: str) -> str:
    """What such images have in common, from the reason why one cannot be kept."""
    return reason.partition(",")[0].removesuffix(" again")


def _picture(image: Image.Image, data: bytes, name: str) -> Picture:
    loss = _depth_loss(image, data)
    if loss:
        raise Unmarkable(f"{name}: {loss}", "convert it to 8 bits per channel, grey or RGB, first", kind_of_loss(loss))
    options, obstacle = _save_options(image, data)
    depth = _depth(image, data)
    if image.mode == "L" and depth < 8 and "transparency" in image.info:  # Pillow scales the pixels, but not this value
        image.info["transparency"] *= 255 // (2**depth - 1)
    rgb, plane = _pixels(image)
    mode = "I;16" if depth == 16 else image.mode
    if plane is not None and mode in ("1", "L", "RGB"):  # one transparent colour, which marking would change
        mode, depth = ("RGBA" if mode == "RGB" else "LA"), 8
    format = "JPEG" if isinstance(image, JpegImageFile) else str(image.format)  # MPO: a JPEG with several pictures
    chunks = _png_chunks(data) if format == "PNG" else _jpeg_metadata(image)
    return Picture(
        name=name, rgb=rgb, format=format, mode=mode, depth=depth, plane=plane, options=options,
        chunks=chunks, orientation=image.info.get("orientation", 1), obstacle=obstacle,
        dropped=_jpeg_dropped(image, data), tags=read_tags(data) if format == "TIFF" else (),
        full_chroma=isinstance(image, JpegImageFile) and _has_odd_chroma(image),
    )  # fmt: skip


def _depth_loss(image: Image.Image, data: bytes) -> str:
    """The reason why decoding alone would lose information; "" if it does not."""
    grey16 = image.mode.startswith("I;16")
    if image.format == "PNG" and data[12:16] != b"IHDR":
        return "a PNG whose header is not where it must be"
    if image.format == "PNG" and data[24] == 16 and not grey16:
        return "a 16-bit PNG with colour or alpha, which could only be kept at 8 bits"
    if isinstance(image, TiffImageFile) and (loss := _tiff_loss(image, grey16)):
        return loss
    if image.mode not in MODES or (grey16 and image.has_transparency_data):
        return f"pixels of mode {image.mode} with this layout cannot be kept"
    return ""


def _tiff_loss(image: TiffImageFile, grey16: bool) -> str:
    bits = max(image.tag_v2.get(258, (1,)))
    if bits > 8 and not (grey16 and bits == 16):
        return f"a TIFF of {bits} bits per sample, which cannot be kept"
    if grey16 and image.tag_v2.get(262) == 0:
        return "a 16-bit TIFF in which 0 is white, which cannot be kept"
    if any(kind != UNSIGNED for kind in _values(image, 339, UNSIGNED)):
        return "a TIFF of samples that are signed or floating, which would become others"
    bands, kept = _values(image, 277, 1)[0], len(image.getbands())
    if image.mode in MODES and bands != kept:
        return f"a TIFF of {bands} bands, of which {kept} would be kept"
    return ""


def _values(image: TiffImageFile, tag: int, default: int) -> tuple[Any, ...]:
    value = image.tag_v2.get(tag, default)
    return value if isinstance(value, tuple) else (value,)


def _depth(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG" and image.mode == "L":
        return data[24]
    return {"1": 1, "I;16": 16, "I;16B": 16}.get(image.mode, 8)


def _pixels(image: Image.Image) -> tuple[Pixels, NDArray[np.uint8] | None]:
    """Return the colours, (H, W, 3) in [0, 255], and the alpha or black plane (H, W) if there is one."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float32) / np.float32(257)
        return np.repeat(grey[..., None], 3, axis=2), None
    if image.mode == "CMYK":
        return np.asarray(image.convert("RGB")), np.asarray(image)[..., 3].copy()
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.asarray(image), None
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3].copy() if image.has_transparency_data else None
    return rgba[..., :3].copy(), alpha


def _save_options(image: Image.Image, data: bytes) -> tuple[dict[str, Any], str]:
    """Return Pillow's options to save the image in its own format, and the obstacle ("" if there is none)."""
    options = {key: image.info[key] for key in METADATA if image.info.get(key)}
    if isinstance(image, JpegImageFile):
        return options | _jpeg_options(image, data), ""
    if isinstance(image, TiffImageFile):
        return _tiff_options(image, data)
    if image.format == "WEBP":
        lossless = _webp_is_lossless(data)
        # `exact` keeps the colours of transparent pixels, which networks get.
        options |= {"lossless": lossless, "exact": True, "quality": 80 if lossless else WEBP_QUALITY}
    elif image.format == "BMP":
        options = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
        return options, "a BMP with alpha, which cannot be written again" if image.mode == "RGBA" else ""
    elif image.format == "PNG":  # its metadata are copied as chunks
        options = {"bits": data[24]} if image.mode == "L" else {}
    return options, ""


def _jpeg_options(image: JpegImageFile, data: bytes) -> dict[str, Any]:
    numbers = [layer[3] for layer in image.layer]  # the table of each component
    rgb = image.mode == "RGB" and [layer[0] for layer in image.layer] == list(b"RGB") and "jfif" not in image.info
    if len(set(numbers)) == 1 or (image.mode == "CMYK" and image.info.get("adobe_transform") == 2):
        numbers = numbers[:1]  # YCCK is written as CMYK: no ink must get the coarse chroma table
    elif numbers[1:2] == numbers[2:] and not rgb:
        numbers = numbers[:2]
    return {
        "qtables": [list(image.quantization[number]) for number in numbers],
        "subsampling": 0 if _has_odd_chroma(image) else get_sampling(image),
        "progressive": bool(image.info.get("progressive")),
        "keep_rgb": rgb,
        "optimize": not _huffman(data) <= _standard_huffman(),
        "restart_marker_blocks": _restart_interval(data),
    }


def _restart_interval(data: bytes) -> int:
    """After how many blocks a decoder can start anew; 0: nowhere."""
    found = (struct.unpack_from(">H", part, 4)[0] for marker, part in _jpeg_segments(data) if marker == RESTART)
    return next(found, 0)


def _has_odd_chroma(image: JpegImageFile) -> bool:
    """Whether a JPEG's chroma has a resolution that Pillow cannot write, as 4:4:0 and 4:1:1: it becomes 4:4:4."""
    return bool(image.layers == 3 and get_sampling(image) == -1)


def _jpeg_segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, segment including the marker) of all segments before a JPEG's first scan."""
    segments, position = [], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != SCAN:
        size = 1 if data[position + 1] == 0xFF else 2 + struct.unpack_from(">H", data, position + 2)[0]  # 1: padding
        if size > 1:
            segments.append((data[position + 1], data[position : position + size]))
        position += size
    return segments


def _is_metadata(marker: int) -> bool:
    return 0xE0 <= marker <= 0xEF or marker == COMMENT  # APP0 to APP15


def _jpeg_metadata(image: Image.Image) -> bytes:
    """A JPEG's metadata segments, without the list of further pictures and without Adobe's segment unless it is YCbCr.

    They are taken from Pillow, because there may be other bytes between segments. Empty for other formats.
    """
    kept = []
    for name, body in image.applist if isinstance(image, JpegImageFile) else ():
        marker = COMMENT if name == "COM" else 0xE0 + int(name.removeprefix("APP"))
        if not body.startswith(FURTHER_PICTURES) and (marker != ADOBE or body[11:12] == b"\1"):
            kept.append(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body)
    return b"".join(kept)


def _jpeg_dropped(image: Image.Image, data: bytes) -> int:
    """The number of further pictures that a JPEG loses; 1 for other data behind the first; 0 for other formats."""
    if not isinstance(image, JpegImageFile):
        return 0
    listed = any(body.startswith(FURTHER_PICTURES) for _, body in image.applist)
    behind = not data.rstrip(b"\0").endswith(b"\xff\xd9")
    return max(getattr(image, "n_frames", 1) - 1, int(listed or behind))


def _with_metadata(data: bytes, metadata: bytes) -> bytes:
    """Replace the metadata of a newly written JPEG, so that marked files begin like copied files."""
    segments = _jpeg_segments(data)
    scans = data[2 + sum(len(part) for _, part in segments) :]
    if any(marker == ADOBE for marker, _ in segments):
        metadata = b"".join(part for marker, part in _jpeg_segments(data[:2] + metadata) if marker != ADOBE)
    coding = (part for marker, part in segments if marker == ADOBE or not _is_metadata(marker))
    return data[:2] + metadata + b"".join(coding) + scans


def _huffman(data: bytes) -> set[bytes]:
    """A JPEG's Huffman tables, each including its number."""
    tables = set()
    for part in (part for marker, part in _jpeg_segments(data) if marker == HUFFMAN):
        position = 4
        while position + 17 <= len(part):
            end = position + 17 + sum(part[position + 1 : position + 17])
            tables.add(part[position:end])
            position = end
    return tables


def _standard_huffman() -> set[bytes]:
    """The Huffman tables of an encoder that does not optimise them."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return _huffman(file.getvalue())


def _tiff_options(image: TiffImageFile, data: bytes) -> tuple[dict[str, Any], str]:
    compression = image.info.get("compression", "raw")
    options = {
        "compression": compression,
        # For `--format png`, where the pixels stay upright; a TIFF's tags are copied as they are.
        "exif": exif_block([tag for tag in read_tags(data) if tag.number != ORIENTATION]),
        "icc_profile": image.info.get("icc_profile"),
    }
    if image.tag_v2.get(PREDICTOR) == 2 and compression in ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"):
        options["tiffinfo"] = {PREDICTOR: 2}
    if compression not in TIFF_COMPRESSIONS:
        return options, f"a TIFF with compression {compression}, which cannot be written again"
    return options, ""


def _webp_is_lossless(data: bytes) -> bool:
    position = 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8L")
        position += 8 + size + size % 2
    return False


def _png_chunks(data: bytes) -> bytes:
    """The chunks of a PNG that stay true: metadata, what may be copied by anyone, and what fits the colours written."""
    kept, position, kinds = [], 8, set[bytes]()
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + 12 + size]
        if chunk[8 + size :] == struct.pack(">I", zlib.crc32(chunk[4 : 8 + size])):
            kept.append((kind, chunk))  # only intact ones: a damaged chunk would damage the file
            kinds.add(kind)
        position += len(chunk)
    depth, colour = data[24], data[25]
    fitting = {BACKGROUND} if colour != INDEXED and depth >= 8 else set[bytes]()
    fitting |= {SIGNIFICANT} if colour != INDEXED and b"tRNS" not in kinds else set()
    return b"".join(chunk for kind, chunk in kept if kind in PNG_CHUNKS or kind in fitting or _may_be_copied(kind))


def _may_be_copied(kind: bytes) -> bool:
    """Whether a chunk's letters say that it is ancillary, and holds whatever happens to the pixels."""
    return kind.isalpha() and kind[0:1].islower() and kind[3:4].islower()


def encode(picture: Picture, rgb: NDArray[Any], format: str = "keep") -> bytes:
    """Write `rgb`, (H, W, 3) in [0, 255], rounded and clipped, with the picture's format, depth and metadata.

    `format="png"` always writes a PNG. Unmarkable if the same format cannot be written faithfully.
    """
    if rgb.shape != picture.rgb.shape or format not in ("keep", "png"):
        raise ValueError(f"format {format!r}, pixels {rgb.shape} for an image of {picture.rgb.shape}")
    if format == "keep" and picture.obstacle:
        hint = "write PNG files instead: --format png"
        raise Unmarkable(f"{picture.name}: {picture.obstacle}", hint, kind_of_loss(picture.obstacle))
    try:
        return _write(picture, rgb, format)
    except Exception as error:  # encoders refuse metadata with many exception types
        hint = "write PNG files instead: --format png" if format == "keep" else "leave the file out"
        told = f"{picture.name}: cannot be written again ({error})"
        raise Unmarkable(told, hint, f"{picture.format} that cannot be written again") from error


def _write(picture: Picture, rgb: NDArray[Any], format: str) -> bytes:
    mode, depth, options, target = picture.mode, picture.depth, picture.options, picture.format
    if format == "png":
        target, depth = "PNG", max(8, depth)
        # The ICC profile of CMYK inks does not apply to the RGB pixels that replace them.
        keys = ("exif", "dpi") if mode == "CMYK" else ("exif", "dpi", "icc_profile")
        options = {key: options[key] for key in keys if options.get(key)}
        if not all(0 < dots < 1e8 for dots in options.get("dpi", ())):  # beyond the range of a PNG
            del options["dpi"]
        options["pnginfo"] = text = PngInfo()
        if "xmp" in picture.options:
            text.add_itxt("XML:com.adobe.xmp", picture.options["xmp"].decode("utf-8", "replace"))
        mode = "RGBA" if mode == "P" and picture.plane is not None else PNG_MODES.get(mode, mode)
    image = _image(rgb, mode, depth, picture.plane)
    if target == "TIFF":
        if picture.orientation in TURN_BACK:
            image = image.transpose(TURN_BACK[picture.orientation])
        coding = {key: value for key, value in options.items() if key != "exif"}
        return with_tags(_save(image, target, coding), picture.tags)
    if target == "JPEG":  # its metadata are copied as segments
        coding = {key: value for key, value in options.items() if key not in METADATA}
        return _with_metadata(_save(image, target, coding), picture.chunks)
    data = _save(image, target, options)
    if target == "WEBP":
        return _with_exif(data, options.get("exif", b""))
    chunks = picture.chunks if picture.format == "PNG" else b""
    return data[:33] + chunks + data[33:]  # after the signature and IHDR


def _with_exif(data: bytes, exif: bytes) -> bytes:
    """A newly written WebP with its EXIF data as they were: Pillow takes off the prefix that some writers give them."""
    parts, position = [data[8:12]], 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        body = exif if kind == b"EXIF" else data[position + 8 : position + 8 + size]
        parts.append(struct.pack("<4sI", kind, len(body)) + body + b"\0" * (len(body) % 2))
        position += 8 + size + size % 2
    whole = b"".join(parts)
    return data[:4] + struct.pack("<I", len(whole)) + whole


def _save(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    try:
        image.save(file, format, **options)
    except OSError:  # Pillow reserves two bytes per pixel for a two-pass JPEG; noise may need more
        if not (options.get("optimize") or options.get("progressive")):
            raise
        file = io.BytesIO()
        image.save(file, format, **options | {"optimize": False, "progressive": False})
    return file.getvalue()


def _image(rgb: NDArray[Any], mode: str, depth: int, plane: NDArray[np.uint8] | None) -> Image.Image:
    if rgb.dtype == np.uint8 and mode == "RGB":
        return Image.fromarray(rgb)
    colours = np.clip(rgb, 0, 255)  # (H, W, 3)
    if mode == "CMYK" and plane is not None:
        return _cmyk(np.rint(colours), plane)
    if mode == "P":
        return _palette(np.rint(colours).astype(np.uint8), plane)
    if mode in ("1", "L", "LA", "I;16"):
        colours = colours.mean(axis=2, dtype=np.float64)  # (H, W)
    top = 2**depth - 1
    levels = np.rint(colours * (top / 255))
    if depth == 16:
        return Image.fromarray(levels.astype(np.uint16))
    samples = (levels * (255 // top)).astype(np.uint8)
    if mode in ("LA", "RGBA") and plane is not None:
        samples = np.dstack([samples, plane])
    image = Image.fromarray(samples)
    return image.convert("1", dither=Image.Dither.NONE) if mode == "1" else image


def _cmyk(rgb: NDArray[Any], black: NDArray[np.uint8]) -> Image.Image:
    """Invert Pillow's conversion of CMYK to RGB exactly. The black ink stays, unless a brighter colour needs less."""
    rgb = rgb.astype(np.float64)  # with bytes, NumPy would compute in half floats, which are too coarse
    white = np.maximum(255 - black.astype(np.float64), rgb.max(axis=2))[..., None]  # (H, W, 1)
    inks = np.where(white > 0, 255 - 255 * rgb / np.maximum(white, 1), 0)
    return Image.fromarray(np.rint(np.concatenate([inks, 255 - white], axis=2)).astype(np.uint8), "CMYK")


def _palette(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8] | None) -> Image.Image:
    """Quantise to at most 256 colours. Each level of alpha gets a share of them, so that alpha stays exact."""
    pixels = rgb.reshape(-1, 3)
    flat = np.full(len(pixels), 255, np.uint8) if alpha is None else alpha.ravel()
    levels, counts = np.unique(flat, return_counts=True)
    indices, colours, opacity = np.empty(len(pixels), np.uint8), b"", b""
    for level, count in zip(levels, counts, strict=True):
        share = 1 + int((256 - len(levels)) * count) // len(pixels)
        # k-means until only 1 pixel in 1000 changes: 3 dB better than median cut on a photograph.
        part = Image.fromarray(pixels[flat == level][None]).quantize(share, kmeans=1 + int(count) // 1000)
        indices[flat == level] = np.asarray(part)[0] + len(opacity)
        table = bytes(part.getpalette() or [])
        colours, opacity = colours + table, opacity + bytes([level]) * (len(table) // 3)
    image = Image.fromarray(indices.reshape(rgb.shape[:2]))
    image.putpalette(colours)
    if alpha is not None:
        image.info["transparency"] = opacity
    return image


def finer(picture: Picture) -> Picture | None:
    """The picture in a coding of the same format that costs less; None if there is none."""
    if picture.mode == "P":  # 256 colours in all, or fewer for each level of alpha
        return replace(picture, mode="RGB" if picture.plane is None else "RGBA", depth=8)
    if picture.format == "WEBP" and not picture.options["lossless"] and picture.options["quality"] < 100:
        return replace(picture, options=picture.options | {"quality": 100})
    return None


def sample_of(picture: Picture) -> Picture:
    """Some rows of a large picture, to measure what its coding costs; another picture itself."""
    parts = sampled(*picture.rgb.shape[:2])
    if len(parts) == 1 or picture.mode == "P":  # a palette is chosen for the whole
        return picture
    plane = None if picture.plane is None else np.concatenate([picture.plane[rows] for rows in parts])
    return replace(picture, rgb=np.concatenate([picture.rgb[rows] for rows in parts]), plane=plane)


def roundtrip(picture: Picture, rgb: NDArray[Any], format: str = "keep") -> Pixels:
    """Encode and decode: the pixels of the written file, (H, W, 3) in [0, 255]."""
    return decode(encode(picture, rgb, format), picture.name).rgb


def extension(path: PurePath, format: str = "keep") -> PurePosixPath:
    """Return the output's relative path: unchanged, or ending in .png (two names may then become equal)."""
    out = PurePosixPath(path)
    return out if format == "keep" or out.suffix.lower() == ".png" else out.with_suffix(".png")


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a plain PNG file of (H, W, 3) pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the peak signal-to-noise ratio in dB for a data range of 255; infinite for equal arrays.

    >>> round(psnr(np.zeros(4), np.full(4, 2.55)), 6)
    40.0
    """
    rows = bands(len(a), a[:1].size)
    error = sum(float(np.square(a[part].astype(np.float64) - b[part]).sum()) for part in rows) / a.size
    return 10 * math.log10(255**2 / error) if error > 0 else math.inf


def ssim(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the mean structural similarity of two (H, W, 3) images in [0, 255], on luma (Wang et al. 2004).

    Gaussian windows with σ = 1.5 and 11 x 11 pixels, only those inside the image; all windows if it is smaller. Of a
    large image, `sampled` bands stand for the whole.
    """
    parts = sampled(a.shape[0], a.shape[1], 2 * EACH)
    return float(np.mean([_similarity(a[rows], b[rows]) for rows in parts]))


def _similarity(a: NDArray[Any], b: NDArray[Any]) -> float:
    x, y = a.astype(np.float64) @ LUMA, b.astype(np.float64) @ LUMA  # (H, W)

    def local(values: NDArray[Any]) -> NDArray[np.float64]:
        blurred: NDArray[np.float64] = ndimage.gaussian_filter(values, 1.5, truncate=3.5)
        return blurred[5:-5, 5:-5] if min(values.shape) > 10 else blurred

    mean_x, mean_y, c1, c2 = local(x), local(y), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    spread = local(x * x) + local(y * y) - mean_x**2 - mean_y**2
    shared = local(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (spread + c2))
    return float(similarity.mean())


def linf(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the largest absolute difference."""
    rows = bands(len(a), a[:1].size)
    return max(float(np.abs(a[part].astype(np.float64) - b[part]).max()) for part in rows)


def contact_sheet(rows: list[tuple[NDArray[Any], NDArray[Any], str]]) -> bytes:
    """Return a PNG with one row per (original, marked, caption), images (H, W, 3) in [0, 255].

    A row shows original | marked | difference x 10, and the caption below.
    """
    cells = [[_sheet_picture(p) for p in (a, b, 128 + 10 * (b.astype(np.float64) - a))] for a, b, _ in rows]
    width = max((cell.width for line in cells for cell in line), default=SHEET_SMALLEST)
    gap, text = 8, 24
    height = text + gap + sum(line[0].height + text + gap for line in cells)
    sheet = Image.new("RGB", (3 * width + 4 * gap, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(("original", "marked", "difference x 10")):
        draw.text((gap + column * (width + gap), gap), title, "black", font)
    top = text + gap
    for line, (_, _, caption) in zip(cells, rows, strict=True):
        for column, cell in enumerate(line):
            sheet.paste(cell, (gap + column * (width + gap), top))
        draw.text((gap, top + line[0].height + 3), caption, "dimgray", font)
        top += line[0].height + text + gap
    return png(np.asarray(sheet))


def _sheet_picture(pixels: NDArray[Any]) -> Image.Image:
    """Enlarge a small image by a whole factor, so that its pixels stay visible; reduce a large one."""
    image = Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))
    side = max(image.size)
    if side < SHEET_SMALLEST:
        factor = -(-SHEET_SMALLEST // side)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SHEET_LARGEST, SHEET_LARGEST), Image.Resampling.LANCZOS)  # does nothing to an image that fits
    return image
