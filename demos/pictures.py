"""Small pictures inside the page's HTML: as data, so that nothing has to be served."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def inline(image: Image, alt: str, *, most: int = 360) -> str:
    """An <img> of a picture, no side larger than `most` pixels."""
    shown = image.convert("RGB")
    if max(shown.size) > most:
        shown = shown.copy()
        shown.thumbnail((most, most))
    data = io.BytesIO()
    shown.save(data, format="png")
    address = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{address}" alt="{html.escape(alt, quote=True)}">'


def strip(pictures: Iterable[tuple[Image, str]], label: str) -> str:
    """Pictures with their captions, as many in a row as fit."""
    figures = "".join(
        f"<figure>{inline(image, words)}<figcaption>{html.escape(words)}</figcaption></figure>"
        for image, words in pictures
    )
    return f'<div class="mm-strip" role="group" aria-label="{html.escape(label, quote=True)}">{figures}</div>'
