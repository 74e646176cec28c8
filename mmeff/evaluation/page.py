"""One self-contained report.html: tables, figures and videos inside the file, nothing fetched from anywhere.

Describe the page with the dataclasses below and hand it to `write_page`. All text is escaped; text between backticks
is set as code. The page forbids its own network access, so it can be mailed, archived and opened offline.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmeff.errors import MediaError
from mmeff.video_io import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageSource = str | os.PathLike[str] | Image

TEMPLATE = "report.html.j2"
_VIDEO_TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime"}
# What people write into a cell for a number: 12, -3.5, 1.42x, 24.3 dB, 0.87 ± 0.02, 95 %, 1.2 GiB. Not: 8x8, 2 of 3.
_NUMERIC = re.compile(
    "[-+\u2212~\u2248<>]?\\s?"  # a sign, or about
    "[\\d.,\u202f]+(e[-+]?\\d+)?\\s?"  # digits; thin spaces between thousands
    "(±\\s?[\\d.,]+\\s?)?(%|\u00d7|x|[kMGT]i?B|[mnµ]?s|dB|fps)?"  # an uncertainty, a unit
)
MINUS, DASH, THIN_SPACE = "\u2212", "\u2013", "\u202f"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table. `rows` hold strings, numbers, None (shown as a dash) or anything with a `str`; a column of numbers, or
    of strings like "24.3 dB" or "1.4x", is right-aligned, and the numbers of a column share their decimals. The first
    cell of a row is its header. `note` goes below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"every row of a table must have {len(self.columns)} cells {list(self.columns)}, got {row}"
                )

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [
            any(row[i] is not None for row in self.rows)
            and all(row[i] is None or is_numeric(row[i]) for row in self.rows)
            for i in range(len(self.columns))
        ]

    @property
    def cells(self) -> list[list[str]]:
        """The text of every row."""
        decimals = [_decimals([row[i] for row in self.rows]) for i in range(len(self.columns))]
        return [[format_cell(v, d) for v, d in zip(row, decimals, strict=True)] for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture: a file or a PIL image. `alt` says what it shows to those who cannot see it, and must not be empty.
    Images that know their resolution (charts do) are shown at their physical size."""

    image: ImageSource
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("Figure.alt must say what the figure shows, for readers who cannot see it; got nothing")


@dataclass(frozen=True, kw_only=True)
class Videos:
    """One video, or several that play in step: starting, pausing or seeking one does the same to all.

    `paths` are mp4 or webm files; `labels` one caption for each; `pixelated` keeps enlarged pixels sharp.
    """

    paths: Sequence[str | os.PathLike[str]]
    labels: Sequence[str] = ()
    caption: str = ""
    pixelated: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.paths, str | os.PathLike):
            object.__setattr__(self, "paths", (self.paths,))
        if not self.paths or (self.labels and len(self.labels) != len(self.paths)):
            raise ValueError(
                f"Videos needs at least one path and one label for each or none, "
                f"got {len(self.paths)} paths and {len(self.labels)} labels"
            )


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A block of plain text behind a heading to open: a resolved config, the text of a `Report`."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page. Shown in this order: heading, notes (set off as warnings), paragraphs, tables, videos,
    figures, listings."""

    heading: str
    paragraphs: Sequence[str] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    videos: Sequence[Videos] = ()
    figures: Sequence[Figure] = ()
    listings: Sequence[Listing] = ()


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str = "",
    environment: Mapping[str, Any],
    sections: Sequence[Section],
    notes: Sequence[str] = (),
    highlights: Sequence[tuple[Any, str]] = (),
) -> Path:
    """Write a self-contained HTML page.

    Args:
        path: the file to write; its folder must exist. It appears only when it is complete.
        title, subtitle: the headline and one sentence under it.
        environment: versions and hardware (`mmeff.report.environment()`), shown with the headline.
        sections: the body. A table of contents is made when there are three or more.
        notes: what the reader must know before any number, such as "This is a tiny model trained in this project."
        highlights: up to five (value, what it is) pairs, set large: ("1.42x", "faster than dense").
    Returns: the path.
    Raises: MediaError for an image or video that is missing, empty or of another kind; OSError for a folder that
        cannot be written to.
    """
    import jinja2

    path = Path(path)
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters.update(inline=_inline, cell=format_cell)
    env.tests["numeric"] = is_numeric
    template = env.from_string(resources.files("mmeff.evaluation").joinpath(TEMPLATE).read_text("utf-8"))
    with replacing(path) as partial:  # opened first: a folder that cannot be written to fails before the work
        text = template.render(
            title=title,
            subtitle=subtitle,
            environment=environment,
            notes=notes,
            highlights=highlights,
            sections=[(slug, section) for slug, section in zip(_slugs(sections), sections, strict=True)],
            embed_image=embed_image,
            embed_video=embed_video,
        )
        partial.write_text(text, "utf-8")
    return path


def is_numeric(value: Any) -> bool:
    """Whether a table cell is a number, or a string that people read as one."""
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, str):
        return bool(_NUMERIC.fullmatch(value.strip()))
    return isinstance(value, int | float | np.number) or hasattr(value, "spread") or hasattr(value, "per_frame")


def format_cell(value: Any, decimals: int | None = None) -> str:
    """The text of a table cell: `decimals` for numbers if given, else four significant digits for floats; thin spaces
    between thousands; a dash for None and NaN."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    if isinstance(value, int | float) and decimals is None and (isinstance(value, int) or abs(value) >= 1e4):
        decimals = 0
    if isinstance(value, int | float) and decimals is not None:
        return f"{value:,.{decimals}f}".replace(",", THIN_SPACE).replace("-", MINUS)
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", MINUS)
    return str(value)


def _decimals(column: Sequence[Any]) -> int | None:
    """How many decimals give the smallest float of a column three significant digits; None where one is too small."""
    numbers = [v.item() if isinstance(v, np.generic) else v for v in column]
    if not any(isinstance(v, float) for v in numbers):
        return None
    sizes = [abs(v) for v in numbers if isinstance(v, int | float) and math.isfinite(v) and v != 0]
    if not sizes or min(sizes) < 1e-3:
        return None
    return min(max(2 - math.floor(math.log10(min(sizes))), 0), 4)


def embed_image(image: ImageSource) -> dict[str, Any]:
    """Return `src` (a data URI) and the `width` and `height` to show an image at, in CSS pixels.

    Raises: MediaError for a file that is missing, empty or not an image.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        file = _embeddable(Path(image), "image")
        try:
            with Image.open(io.BytesIO(file)) as opened:
                size, dpi, mime = opened.size, opened.info.get("dpi"), Image.MIME.get(opened.format or "")
        except Exception as error:  # Pillow's plugins raise many kinds
            raise MediaError(f"{image} cannot be read as an image: {error}") from error
        if mime not in ("image/png", "image/jpeg", "image/webp", "image/gif"):
            raise MediaError(f"a page can show png, jpeg, webp and gif, got {mime} in {image}; convert it first")
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        file, size, dpi, mime = buffer.getvalue(), image.size, image.info.get("dpi"), "image/png"
    resolution = float(dpi[0]) if isinstance(dpi, tuple) else 0.0
    scale = 96 / resolution if resolution > 96 else 1.0
    return {"src": _data_uri(file, mime), "width": round(size[0] * scale), "height": round(size[1] * scale)}


def embed_video(path: str | os.PathLike[str]) -> str:
    """Return a video file as a data URI. Raises: MediaError for a file that is missing, empty or no mp4 or webm."""
    path = Path(path)
    mime = _VIDEO_TYPES.get(path.suffix.lower())
    if mime is None:
        raise MediaError(f"a page can play {', '.join(_VIDEO_TYPES)}, got {path}; write it with mmeff.video_io.write")
    return _data_uri(_embeddable(path, "video"), mime)


def _embeddable(path: Path, kind: str) -> bytes:
    if not path.is_file():
        raise MediaError(f"the {kind} {path} of the page does not exist")
    content = path.read_bytes()
    if not content:
        raise MediaError(f"the {kind} {path} of the page is empty (0 bytes)")
    return content


def _data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _inline(text: str) -> Any:
    """Escape text and set what stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:  # an odd backtick is just a backtick
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _slugs(sections: Sequence[Section]) -> list[str]:
    """A distinct anchor for each section."""
    taken: list[str] = []
    for section in sections:
        slug = base = "s-" + re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-")
        number = 2
        while slug in taken:
            slug, number = f"{base}-{number}", number + 1
        taken.append(slug)
    return taken
