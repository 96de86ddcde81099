"""Boxes on pictures, drawn by Pillow."""

from collections.abc import Sequence
from typing import Any

from .prediction import Found


def with_boxes(image: Any, found: Sequence[Found]) -> Any:
    """A copy of the picture with a box for each find, in the colour of its class, with class and score."""
    from PIL import ImageDraw, ImageFont

    from .runs.files import printable
    from .runs.picture import CLASS_COLORS

    image = image.convert("RGB")
    draw, side = ImageDraw.Draw(image), min(image.size)
    width, font = max(1, side // 200), ImageFont.load_default(max(9, side // 40))
    if not found:
        draw.text((2, 2), "nothing found", fill="white", font=font, stroke_width=1, stroke_fill="black")
    for result in reversed(found):  # the best on top
        x, y, right, bottom = result.box
        color = CLASS_COLORS[result.number % len(CLASS_COLORS)]
        draw.rectangle((x, y, max(x, right), max(y, bottom)), outline=color, width=width)
        words = f"{printable(result.label)} {result.score:.2f}"
        place = draw.textbbox((x, y), words, font=font, anchor="lb")
        lower = max(0, -place[1])  # of a box at the upper edge
        draw.rectangle((place[0], place[1] + lower, place[2], place[3] + lower), fill=color)
        draw.text((x, y + lower), words, fill="white", font=font, anchor="lb")
    return image
