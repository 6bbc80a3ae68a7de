"""The contact sheet as a PNG, drawn by Pillow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache

from pipeline.errors import MissingExtra
from pipeline.query.contact_sheet import Caption, Section, caption
from pipeline.records import Hit
from pipeline.shown import visible

try:
    from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
except ModuleNotFoundError as error:
    raise MissingExtra("A picture needs Pillow, which is not installed: pip install 'twotower[search]'.") from error

COLUMNS = 10
MIN_COLUMNS = 5
TILE_PX = 196
IMAGE_PX = 196
CAPTION_PX = 92
LABEL_PX = 78
"""What a section's label and note take."""
GAP_PX = 14
MARGIN_PX = 32
MAX_TILES = 400
"""Per section: a sheet is for looking at, and a picture of thousands of tiles cannot be."""

_BACK, _CARD, _LINE, _TEXT, _SOFT, _BLANK = "#f4f4f2", "#ffffff", "#dcdcd6", "#1b1b1a", "#5c5c58", "#ececea"
_MARK, _MARK_TEXT = "#fff3cd", "#5a3d00"
_BADGES = ("#2f5fb3", "#a8440f", "#22783c", "#8a3c94", "#7d5700", "#0f7479", "#b02a57", "#57575a")

_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def picture(sections: Sequence[Section], *, query: str, thumbnails: Mapping[str, bytes], note: str = "") -> bytes:
    """Draw the sheet.

    Returns:
        PNG bytes; tiles of one size, pictures whole on white, texts cut with an ellipsis where they are too long.
    """
    shown = [section.hits[:MAX_TILES] for section in sections]
    columns = min(COLUMNS, max([MIN_COLUMNS, *(len(hits) for hits in shown)]))
    width = 2 * MARGIN_PX + columns * TILE_PX + (columns - 1) * GAP_PX
    head = MARGIN_PX + 44 + (26 if note else 0)
    step = IMAGE_PX + CAPTION_PX + GAP_PX
    heights = [LABEL_PX + (-(-len(hits) // columns) * step or 44) for hits in shown]
    sheet = Image.new("RGB", (width, head + sum(heights) + MARGIN_PX - GAP_PX), _BACK)
    draw = ImageDraw.Draw(sheet)
    inner = width - 2 * MARGIN_PX
    _write(draw, (MARGIN_PX, MARGIN_PX), visible(query), 32, inner, _TEXT)
    if note:
        _write(draw, (MARGIN_PX, MARGIN_PX + 44), visible(note), 16, inner, _SOFT)
    top = head
    for section, hits, height in zip(sections, shown, heights, strict=True):
        _label(draw, section, top + 16, inner)
        for number, hit in enumerate(hits):
            row, column = divmod(number, columns)
            at = (MARGIN_PX + column * (TILE_PX + GAP_PX), top + LABEL_PX + row * step)
            _tile(sheet, draw, at, hit, caption(hit, section.better(number)), thumbnails.get(hit.product_id))
        if not hits:
            draw.text((MARGIN_PX, top + LABEL_PX), "Nothing was found.", _SOFT, _font(16))
        top += height
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _label(draw: ImageDraw.ImageDraw, section: Section, top: int, width: int) -> None:
    _write(draw, (MARGIN_PX, top), visible(section.label), 21, width, _TEXT)
    _write(draw, (MARGIN_PX, top + 30), visible(section.note), 15, width, _SOFT)


def _tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    hit: Hit,
    shown: Caption,
    thumbnail: bytes | None,
) -> None:
    left, top = at
    inner = TILE_PX - 20
    box = (left - 1, top - 1, left + TILE_PX, top + IMAGE_PX + CAPTION_PX)
    draw.rounded_rectangle(box, radius=8, fill=_CARD, outline=_SOFT if shown.same else _LINE)
    image = _fitted(thumbnail)
    if image is None:
        draw.rounded_rectangle((left, top, left + TILE_PX - 1, top + IMAGE_PX - 1), radius=7, fill=_BLANK)
        draw.text((left + TILE_PX // 2, top + IMAGE_PX // 2), "no image", _SOFT, _font(15), anchor="mm")
    else:
        faint = Image.blend(image, Image.new("RGB", image.size, _CARD), 0.4) if shown.same else image
        sheet.paste(faint, (left + 4, top + 4))
    if shown.same:
        bottom = top + IMAGE_PX - 1
        draw.rectangle((left, bottom - 23, left + TILE_PX - 1, bottom), fill=_MARK)
        _write(draw, (left + 10, bottom - 20), shown.same, 13, inner, _MARK_TEXT)
    if hit.cluster is not None:
        width = int(draw.textlength(shown.cluster, _font(13))) + 16
        badge = (left + 8, top + 8, left + 8 + width, top + 29)
        draw.rounded_rectangle(badge, radius=10, fill=_BADGES[hit.cluster % len(_BADGES)])
        draw.text((left + 8 + width / 2, top + 18), shown.cluster, "#ffffff", _font(13), anchor="mm")
    title = _drawable(shown.title)
    for number, line in enumerate(_lines(title, _font(15, title), inner)):
        draw.text((left + 10, top + IMAGE_PX + 7 + 19 * number), line, _TEXT, _font(15, title))
    _write(draw, (left + 10, top + IMAGE_PX + 48), shown.category, 13, inner, _SOFT)
    score = f"{shown.score}  ({shown.left_out})" if shown.left_out else shown.score
    _write(draw, (left + 10, top + IMAGE_PX + 67), score, 13, inner, _SOFT)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size_px: int, width: float, colour: str
) -> float:
    """Draw a text on one line, cut to `width`; returns how wide it came out."""
    text = _drawable(text)
    font = _font(size_px, text)
    line = _cut(text, font, width)
    draw.text(at, line, colour, font)
    return float(font.getlength(line))


def _fitted(thumbnail: bytes | None) -> Image.Image | None:
    """The whole picture in the middle of a white square, or None where there is none to show."""
    if not thumbnail:
        return None
    try:
        with Image.open(io.BytesIO(thumbnail), formats=["JPEG"]) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    side = IMAGE_PX - 8
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (side, side), "#ffffff")
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _lines(text: str, font: Font, width: float) -> list[str]:
    """Text on at most two lines, broken between words where that is possible."""
    if font.getlength(text[:200]) <= width:
        return [text]
    first = ""
    for word in text[:200].split():
        if font.getlength(f"{first} {word}".strip()) > width:
            break
        first = f"{first} {word}".strip()
    if not first:
        return [_cut(text, font, width)]
    return [first, _cut(text[text.index(first) + len(first) :].strip(), font, width)]


def _cut(text: str, font: Font, width: float) -> str:
    """Text that is at most `width` pixels wide, with an ellipsis where something was cut."""
    text = text[:400]
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "…") <= width else (low, middle - 1)
    return text[:low].rstrip() + "…"


def _drawable(text: str) -> str:
    return text[:400].replace("®", "(R)").replace("©", "(C)")


def _font(size_px: int, text: str = "") -> Font:
    """Pillow's own font; for a text that it has no glyphs for, one of the machine's, where there is a better one."""
    own = _own_font(size_px)
    if text.isascii() or not any(_is_missing(own, character) for character in set(text) if ord(character) > 127):
        return own
    return _machine_font(size_px) or own


def _is_missing(font: Font, character: str) -> bool:
    return bytes(font.getmask(character)) == bytes(font.getmask("\U0010fffe"))


@cache
def _own_font(size_px: int) -> Font:
    return ImageFont.load_default(size=size_px)


@cache
def _machine_font(size_px: int) -> Font | None:
    for name in _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size_px)
        except OSError:
            continue
    return None
