"""Image files: PNGs with a note on how they were made, and contact sheets of labeled rows."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dbtrain.runtime import files

TEXT_KEY = "dbtrain"  # PNG text chunk with the note on how an image was made
GAP, LINE, FONT_SIZE = 8, 18, 13  # px
LEAST_WIDTH = 420  # px, so that labels fit
MOST_CELL = 256  # px
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files


def save_png(path: Path, picture: Image.Image, note: str | None = None) -> None:
    """Write a PNG atomically, with `note` as a text chunk."""
    text, png = PngInfo(), io.BytesIO()
    if note is not None:
        text.add_text(TEXT_KEY, note)
    picture.save(png, "PNG", pnginfo=text)
    files.write_atomically(path, png.getvalue())


def note_in(path: Path) -> str:
    """The note in an image's text chunk; "" if the file has none, is missing or damaged."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return str(getattr(picture, "text", {}).get(TEXT_KEY, ""))
    except BROKEN:
        return ""


@dataclass(frozen=True)
class SheetRow:
    """A row of images with labels above it and one caption per image."""

    pictures: Sequence[Image.Image]
    head: str = ""  # black
    note: str = ""  # gray, below the head
    captions: Sequence[str] = ()  # gray, one above each image


def contact_sheet(rows: Sequence[SheetRow], least_cell: int = 96) -> Image.Image:
    """All rows on one white page. Cells are as wide as the first image, from `least_cell` to MOST_CELL px."""
    # Lay out: the first row's images give the cell, the widest row the page, the labels the height.
    cell = max(least_cell, min(MOST_CELL, rows[0].pictures[0].width))
    columns = max(len(row.pictures) for row in rows)
    width = max(columns * (cell + GAP) + GAP, LEAST_WIDTH)
    font = ImageFont.load_default(FONT_SIZE)
    letters = int((width - 2 * GAP) / font.getlength("n"))
    labels = [
        [(text, "black") for text in textwrap.wrap(row.head, letters)]
        + [(text, "gray") for text in textwrap.wrap(row.note, letters)]
        for row in rows
    ]
    height = GAP + sum(
        (len(lines) + bool(row.captions)) * LINE + cell + GAP for row, lines in zip(rows, labels, strict=True)
    )
    # Draw each row: its labels, its captions, its images.
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    top = GAP
    for row, lines in zip(rows, labels, strict=True):
        for text, color in lines:
            pen.text((GAP, top), text, color, font)
            top += LINE
        for k, caption in enumerate(row.captions):
            pen.text((GAP + k * (cell + GAP), top), caption, "gray", font)
        top += LINE if row.captions else 0
        for k, picture in enumerate(row.pictures):
            fitted = ImageOps.pad(picture.convert("RGB"), (cell, cell), color="white")
            page.paste(fitted, (GAP + k * (cell + GAP), top))
        top += cell + GAP
    return page
