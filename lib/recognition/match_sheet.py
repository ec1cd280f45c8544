"""The picture of identify's matches: each face beside the known faces nearest to it."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.faces.images import to_jpeg
from lib.recognition.recognizer import decoded_crop

PLAIN, WITHIN, BEYOND = "black", "#0b5cad", "#777777"
"""Colours of a name, of a distance within the threshold, and of one beyond it."""

_TILE, _LABEL = 120, 36


def contact_sheet(title: str, rows: Sequence[Sequence[tuple[bytes | None, str, str, str]]]) -> bytes:
    """Return a JPEG: the title, then one row per face: the face, then its matches, each with two lines of text.

    A tile is the encoded crop (None without a picture), the two lines, and the colour of the second.
    """
    width = _TILE * max((len(tiles) for tiles in rows), default=1)
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size=11)
    titles = textwrap.wrap(title, max(20, width // 7))
    top = 18 * len(titles)
    sheet = Image.new("RGB", (width, top + max(1, len(rows)) * (_TILE + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((3, 1), "\n".join(titles), fill=PLAIN, font=font)
    for r, tiles in enumerate(rows):
        for c, (crop, name, text, color) in enumerate(tiles):
            x, y = c * _TILE, top + r * (_TILE + _LABEL)
            if crop is not None:
                pixels = cv2.resize(decoded_crop(crop), (_TILE - 4, _TILE - 4), interpolation=cv2.INTER_AREA)
                sheet.paste(Image.fromarray(pixels), (x + 2, y + 2))
            # Keep the end of a path, which says more than its beginning.
            draw.text((x + 3, y + _TILE), name[-18:], fill=PLAIN, font=font)
            draw.text((x + 3, y + _TILE + 16), text[-18:], fill=color, font=font)
    return to_jpeg(np.ascontiguousarray(np.asarray(sheet)[:, :, ::-1]), quality=88)
