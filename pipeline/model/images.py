"""Bytes from strangers to RGB, safely: what is not an image, too large or damaged is refused with a reason.

Everything that a header can tell is decided before a pixel is decoded, so memory stays within a few times
`ImageLimits.max_pixels` bytes. Only the formats listed in `_MAGIC` are handed to Pillow, each to its own decoder: the
name of a file means nothing. Pillow's process-wide switches (`MAX_IMAGE_PIXELS`, `LOAD_TRUNCATED_IMAGES`) are not
touched. Colour profiles are ignored, as the published preprocessing does.

Pillow reads the headers, and all but plain JPEG files. Those are decoded by libjpeg-turbo at once, to the same pixels
and without Python's lock; one that it finds anything wrong with goes back to Pillow, which decides and says why.

This module needs Pillow, simplejpeg and numpy, never torch.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np

from pipeline.errors import ImageRejected, MissingExtra
from pipeline.records import ImageLimits, Reason

try:
    import simplejpeg
    from PIL import ExifTags, Image, features
except ModuleNotFoundError as error:
    raise MissingExtra(
        "Reading images needs Pillow and simplejpeg; install them with: pip install 'twotower[search]'."
    ) from error

Style = Literal["shop", "published"]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_OTHER_IMAGES = {
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "icon",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"II+\0": "BigTIFF",
    b"MM\0+": "BigTIFF",
}
MOST_SCANS = 100
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
"""Of JPEG, with a length behind it or the end: what stands in a scan's data, and what stands alone, is none."""
_STRIP_BYTES = 8 << 20

_UPRIGHT: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.T,
    6: lambda pixels: pixels[::-1].T,
    7: lambda pixels: pixels[::-1, ::-1].T,
    8: lambda pixels: pixels.T[::-1],
}
"""EXIF orientation to what undoes it; 1 is upright, anything else is not an orientation."""


@dataclass(frozen=True, slots=True)
class Rgb:
    """A decoded image.

    Attributes:
        pixels: uint8 (H, W, 4), upright, contiguous: red, green, blue, and a byte that says nothing.
        width_px: width of the original, upright; W is smaller where a JPEG was decoded at reduced size.
        height_px: the same for its height.
    """

    pixels: Bytes
    width_px: int
    height_px: int


def read_rgb(
    source: bytes | Image.Image, *, limits: ImageLimits, style: Style = "shop", draft_px: int | None = None
) -> Rgb:
    """Decode one image.

    Args:
        source: an encoded image, or a Pillow image.
        limits: what is refused unread or undecoded.
        style: `shop` applies EXIF orientation, lays transparency on white, scales 16 bits to 8 and undoes inverted
            CMYK; `published` is Pillow's `convert("RGB")` alone, as the published code does.
        draft_px: let the JPEG decoder skip detail while the short side stays at least this long; None decodes all.

    Raises:
        ImageRejected: with the reason, and a sentence for the person who repairs the catalog.
    """
    with _quiet_pillow():
        image = source if isinstance(source, Image.Image) else _open(source, limits)
        _check_shape(image.size, limits)
        width, height = image.size
        is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        if draft_px is not None and is_plain_jpeg:
            short = min(width, height)
            image.draft(image.mode, (-(-width * draft_px // short), -(-height * draft_px // short)))
        try:
            pixels = _jpeg_pixels(source, image.size) if is_plain_jpeg and image is not source else None
            if pixels is None:
                image.load()
            orientation = _orientation(image) if style == "shop" else 1
            if pixels is None:
                image = _shop_rgb(image) if style == "shop" else _converted(image)  # which lets go of the one before
                pixels = rgbx(image)
        except ImageRejected:
            raise
        except Exception as error:  # the boundary to Pillow: its decoders raise nearly every type there is
            _reject_undecoded(error)
    if orientation in _UPRIGHT:
        whole = _UPRIGHT[orientation](pixels.view(np.uint32)[..., 0])  # a pixel as one number
        pixels = np.ascontiguousarray(whole)[..., None].view(np.uint8)
        width, height = (height, width) if orientation >= 5 else (width, height)
    return Rgb(pixels, width, height)


def _jpeg_pixels(data: object, size: tuple[int, int]) -> Bytes | None:
    """Uint8 (H, W, 4) by the steps of Pillow's decoder, which may be told to decode at reduced size.

    Args:
        data: a JPEG file.
        size: width and height that Pillow would decode it to.

    Returns:
        None of a file that is not quite as it should be.
    """
    width, height = size
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGBA", fastdct=False, fastupsample=False, min_height=height, min_width=width
        )
    except ValueError:
        return None
    return np.asarray(pixels, np.uint8) if pixels.shape[:2] == (height, width) else None


def _converted(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def rgbx(image: Image.Image) -> Bytes:
    """A Pillow image of mode RGB as uint8 (H, W, 4), strip by strip: Pillow's own way holds two copies at a time."""
    width, height = image.size
    pixels = np.empty((height, width, 4), np.uint8)
    rows = max(1, _STRIP_BYTES // (4 * width))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.frombuffer(strip.tobytes("raw", "RGBX"), np.uint8).reshape(-1, width, 4)
    return pixels


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG file of thousands of scans, each of which decodes the whole image anew: seconds for a few bytes."""
    if data.count(_START_OF_SCAN) <= MOST_SCANS:  # at once for nearly all; data behind the image may hold the bytes too
        return
    count, place = 0, 2
    while (marker := _MARKER.search(data, place)) is not None and data[marker.start() : marker.end()] != _END_OF_IMAGE:
        count += data[marker.start() : marker.end()] == _START_OF_SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    if count > MOST_SCANS:
        detail = f"{count} scans, where a progressive JPEG has about ten: made to keep a decoder busy"
        raise ImageRejected(Reason.IMAGE_CORRUPT, detail)


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    data = bytes(data)  # a view of an Arrow buffer has no `startswith`
    if not data:
        raise ImageRejected(Reason.IMAGE_EMPTY, "the image holds no bytes")
    if len(data) > limits.max_bytes:
        detail = f"{len(data)} bytes are over the limit of {limits.max_bytes}"
        raise ImageRejected(Reason.IMAGE_TOO_LARGE_BYTES, detail)
    kind = _sniff(data)
    if kind == "JPEG":
        _check_scans(data)
    try:
        return Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        raise ImageRejected(Reason.IMAGE_TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # the boundary to Pillow's header parsers
        if _is_cut_short(kind, data):
            raise ImageRejected(Reason.IMAGE_TRUNCATED, f"the {kind} file ends before its image does") from error
        # A compressed text or profile chunk that unpacks without end stops here too: the pixels may be fine, but the
        # file was made to exhaust memory, so it is called corrupt.
        if "too large" in str(error):
            raise ImageRejected(Reason.IMAGE_CORRUPT, f"decompression bomb in the {kind} header: {error}") from error
        detail = f"the {kind} header cannot be read ({type(error).__name__})"
        raise ImageRejected(Reason.IMAGE_UNDECODABLE, detail) from error


def _sniff(data: bytes) -> str:
    """Pillow's name of the format that the first bytes promise."""
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        if data[8:12] in (b"avif", b"avis") and features.check("avif"):
            return "AVIF"
        brand = data[8:12].decode("latin-1")
        raise ImageRejected(
            Reason.IMAGE_UNSUPPORTED_FORMAT, f"an ISO media file of brand {brand!r} (HEIF, AVIF, video)"
        )
    for magic, name in _OTHER_IMAGES.items():
        if data.startswith(magic):
            raise ImageRejected(Reason.IMAGE_UNSUPPORTED_FORMAT, f"{name} images are not supported")
    if b"<svg" in data[:1024].lower():
        raise ImageRejected(Reason.IMAGE_UNSUPPORTED_FORMAT, "SVG drawings are not supported; export them as PNG")
    raise ImageRejected(Reason.IMAGE_NOT_AN_IMAGE, f"the bytes begin with {data[:8]!r}, which is no known image format")


def _check_shape(size: tuple[int, int], limits: ImageLimits) -> None:
    short, long = sorted(size)
    if short < 1:
        raise ImageRejected(Reason.IMAGE_UNDECODABLE, f"the header says {size[0]} x {size[1]} pixels")
    if short * long > limits.max_pixels:
        detail = f"{size[0]} x {size[1]} pixels are over the limit of {limits.max_pixels}"
        raise ImageRejected(Reason.IMAGE_TOO_MANY_PIXELS, detail)
    if long > limits.max_aspect * short:
        detail = f"{size[0]} x {size[1]} pixels are longer than {limits.max_aspect:g} to 1"
        raise ImageRejected(Reason.IMAGE_EXTREME_ASPECT, detail)
    if short < limits.min_side_px:
        detail = f"{size[0]} x {size[1]} pixels; the short side must have {limits.min_side_px}"
        raise ImageRejected(Reason.IMAGE_TOO_SMALL, detail)


def _reject_undecoded(error: Exception) -> NoReturn:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        raise ImageRejected(Reason.IMAGE_TOO_MANY_PIXELS, text) from error
    if isinstance(error, EOFError) or (isinstance(error, OSError) and "truncated" in str(error)):
        raise ImageRejected(Reason.IMAGE_TRUNCATED, text) from error
    if isinstance(error, MemoryError | NotImplementedError):
        raise ImageRejected(Reason.IMAGE_UNDECODABLE, text) from error
    raise ImageRejected(Reason.IMAGE_CORRUPT, text) from error


def _is_cut_short(kind: str, data: bytes) -> bool:
    """Whether a file that could not be opened is a beginning of one: its own lengths point past its end."""
    if kind == "WEBP":
        return len(data) < 12 or struct.unpack("<I", data[4:8])[0] + 8 > len(data)
    if kind == "JPEG":
        place = 2
        while place + 4 <= len(data) and data[place] == 0xFF:
            place += 2 + int(struct.unpack(">H", data[place + 2 : place + 4])[0])
        return place + 4 > len(data)
    return kind == "PNG" and len(data) < 33  # signature and IHDR


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF says nothing about the pixels: upright is all that can be assumed
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _shop_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB as a person would see it on a white page."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bits(image)
    if image.mode == "F":
        raise ImageRejected(Reason.IMAGE_UNSUPPORTED_FORMAT, "floating-point pixels have no defined white")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for an inverted one, as Adobe writes them; without Adobe's marker none is.
        image = Image.frombytes("CMYK", image.size, bytes(255 - np.asarray(image)))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")
    return _converted(image)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey levels 0 to 65535 to 0 to 255, rounded; a level that is marked transparent becomes white."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65_535:
        raise ImageRejected(Reason.IMAGE_UNSUPPORTED_FORMAT, "32-bit grey levels have no defined white")
    grey = ((levels * 255 + 32_767) // 65_535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


_quiet_lock = threading.Lock()
_quiet_depth = 0


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence warnings that Pillow's modules raise about the image in hand, from any number of threads.

    `warnings.catch_warnings` swaps a process-wide list and is not safe on threads. Here one filter, for Pillow's
    modules alone, stands while any thread decodes, and is taken out by the last one.
    """
    global _quiet_depth
    with _quiet_lock:
        _quiet_depth += 1
        warnings.filterwarnings("ignore", module=r"PIL\.")
        rule = warnings.filters[0]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0 and rule in warnings.filters:
                warnings.filters.remove(rule)  # type: ignore[attr-defined]
