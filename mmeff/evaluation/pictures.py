"""Pictures for reports: paired videos, frame strips, density maps, curves and time bars.

Frames come in as (T, H, W, 3), uint8 or float in [0, 1], and everything comes out as frames or as a PIL image on a
light background, so that a figure looks the same in every page. Text is DejaVu Sans throughout, which matplotlib
brings along. Colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines differ in their
markers too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmeff.report import TokenPlaces
from mmeff.video_io import spread, to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, RULE = "#ffffff", "#1c2128", "#5a6472", "#d9dee5"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4fa3", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "d")
# The phases a report knows keep their order and colour in every figure.
PHASES = {
    "prefill": "#0072b2", "selection": "#e69f00", "decode": "#56b4e9",
    "dense steps": "#0072b2", "sparse steps": "#009e73", "layout": "#e69f00",
}  # fmt: skip
MIN_HEIGHT = 240  # pixels of a watchable panel
DPI = 200


# ---------------------------------------------------------------- frames


def side_by_side(
    left: Any, right: Any, labels: tuple[str, str] = ("dense", "accelerated"), *, min_height: int = MIN_HEIGHT
) -> np.ndarray:
    """Put two videos next to each other, captioned.

    Args:
        left, right: (T, H, W, 3) of one shape.
        labels: a caption for each, over at most two lines; the rest is cut with an ellipsis.
        min_height: videos lower than this are enlarged by a whole factor, pixel by pixel, so that nothing is smoothed.
    Returns: uint8 (T, H', W', 3), with even H' and W', so that `video_io.write` need not pad.
    Raises: ValueError for different shapes.
    """
    videos = to_uint8(left), to_uint8(right)
    if videos[0].shape != videos[1].shape:
        raise ValueError(f"side_by_side needs two videos of one shape, got {videos[0].shape} and {videos[1].shape}")
    _, H, W, _ = videos[0].shape
    factor = _factor(H, min_height)
    h, w = H * factor, W * factor
    margin = max(8, h // 30)
    size = max(13, round(h * 0.05))
    font = _font(size, bold=True)
    captions = [_wrapped(label, font, w) for label in labels]
    bar = round(size * (1.2 + 1.2 * max(len(lines) for lines in captions)))
    canvas = Image.new("RGB", (_even(2 * w + 3 * margin), _even(h + bar + margin)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(captions):
        for row, line in enumerate(lines):
            middle = bar / 2 + (row - (len(lines) - 1) / 2) * 1.2 * size
            draw.text((margin + i * (w + margin), middle), line, font=font, fill=COLOURS[1] if i else INK, anchor="lm")
    frames = np.broadcast_to(np.asarray(canvas), (len(videos[0]), canvas.height, canvas.width, 3)).copy()
    for i, video in enumerate(videos):
        x = margin + i * (w + margin)
        frames[:, bar : bar + h, x : x + w] = _enlarged(video, factor)
    return frames


def strip(videos: Mapping[str, Any], count: int = 8, *, min_height: int = 96) -> Image.Image:
    """Lay out frames as a table: one row per video, one column per moment.

    Args:
        videos: label -> (T, H, W, 3); all of one length, so that a column shows one moment. Sizes may differ.
        count: columns, spread evenly from the first frame to the last; at most T.
        min_height: rows of smaller videos are enlarged by a whole factor, pixel by pixel.
    Raises: ValueError for no videos, or videos of different lengths.
    """
    rows = {label: to_uint8(video) for label, video in videos.items()}
    lengths = {label: len(video) for label, video in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"strip needs videos of one length, got {lengths or 'none'}")
    (T,) = set(lengths.values())
    if count < 1:
        raise ValueError(f"strip needs count >= 1 columns, got {count}")
    chosen = spread(T, min(count, T))
    tiles = {label: _enlarged(v[chosen], _factor(v.shape[1], min_height)) for label, v in rows.items()}
    tile_w = max(t.shape[2] for t in tiles.values())
    heads = [f"frame {i}" if tile_w >= 72 else str(i) for i in chosen]
    return _sheet({label: list(tile) for label, tile in tiles.items()}, heads)


def kept_sheet(frames: Sequence[Any], kept: Mapping[int, Any], places: TokenPlaces, *, count: int = 8) -> Image.Image:
    """Show which visual tokens survive from layer to layer: stages beside one picture, or below several pictures or frames.

    A picture that the model sees whole and in tiles stands twice, once with the tokens of each.

    Args:
        frames: PIL images or (H, W, 3) as the model saw them; with more frames than the model's pictures, each of those
            stands for equally many frames, of which the first is shown.
        kept: layer -> positions in [0, V) of the tokens kept from there on; -1 is skipped.
        places: of one prompt: picture (V,), box (V, 4), tile (V,); see `Report.places`. Tokens without a place are not drawn.
        count: pictures shown at most, spread evenly from the first to the last.
    Raises: ValueError for no frames, fewer frames than pictures, no token with a place, or positions outside.
    """
    picture, box, tile = (np.asarray(x) for x in (places.picture, places.box, places.tile))
    pictures, tokens = int(picture.max(initial=-1)) + 1, int((picture >= 0).sum())
    if not frames or len(frames) < pictures:
        raise ValueError(f"kept_sheet needs a frame for each of {max(pictures, 1)} pictures, got {len(frames)}")
    placed = (picture >= 0) & np.isfinite(box).all(-1)
    if not placed.any():
        raise ValueError(f"kept_sheet needs tokens whose places are known, got none of {tokens}")
    panels = []
    for p in spread(pictures, min(count, pictures)):
        parts = [(word, placed & (picture == p) & (tile == t)) for t, word in ((False, "whole"), (True, "in tiles"))]
        parts = [(word, mine) for word, mine in parts if mine.any()]
        name = f"{'picture' if len(frames) == pictures else 'frames from'} {p * len(frames) // pictures}"
        panels += [(p, f"{name}, {word}" if len(parts) > 1 else name, mine) for word, mine in parts]
    height = 240 if len(panels) == 1 else 160 if len(panels) <= 4 else 96
    images = [_fit(frames[p * len(frames) // pictures], height) for p, _, _ in panels]
    rows: dict[str, list[np.ndarray]] = {"as seen": images}
    for layer, positions in kept.items():
        mine = np.asarray(positions).astype(np.int64).reshape(-1)
        mine = mine[mine != -1]
        if mine.size and not (mine.min() >= 0 and mine.max() < tokens):
            raise ValueError(
                f"kept must hold positions in [0, {tokens - 1}] for {tokens} tokens, got {mine.min()} to {mine.max()}"
            )
        stays = np.isin(np.arange(len(picture)), mine)
        rows[f"from layer {layer}: {mine.size}"] = [
            np.asarray(kept_overlay(image, box[here & stays], min_height=0))
            for image, (_, _, here) in zip(images, panels, strict=True)
        ]
    if len(panels) == 1:
        return _sheet({"": [row[0] for row in rows.values()]}, list(rows))
    return _sheet(rows, [head for _, head, _ in panels])


def _fit(image: Any, height: int) -> np.ndarray:
    """(H, W, 3) uint8: enlarged by a whole factor to at least this height, or shrunk to it."""
    pixels = to_uint8([image] if isinstance(image, Image.Image) else np.asarray(image)[None])[0]
    if pixels.shape[0] > 1.25 * height:
        whole = Image.fromarray(pixels)
        return np.asarray(
            whole.resize((max(1, round(whole.width * height / whole.height)), height), Image.Resampling.LANCZOS)
        )
    return _enlarged(pixels[None], _factor(pixels.shape[0], height))[0]


def _sheet(rows: Mapping[str, Sequence[np.ndarray]], heads: Sequence[str]) -> Image.Image:
    """Pictures as a table: labelled rows, each with a picture (H, W, 3) for every head; sizes may differ."""
    gap, font, small = 6, _font(15, bold=True), _font(13)
    widths = [
        max(min(120, math.ceil(small.getlength(text))), *(tile.shape[1] for tile in column))
        for text, column in zip(heads, zip(*rows.values(), strict=True), strict=True)
    ]
    label_w = min(max(math.ceil(font.getlength(label)) for label in rows) + 3 * gap, 220) if any(rows) else gap
    head = 26
    starts = np.cumsum([label_w, *(w + gap for w in widths)]).tolist()
    width = starts[-1] + gap
    height = head + sum(max(tile.shape[0] for tile in row) + gap for row in rows.values()) + gap
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(heads):
        x = starts[column] + widths[column] / 2
        draw.text((x, head / 2), _fitted(text, small, widths[column]), font=small, fill=MUTED, anchor="mm")
    y = head
    for label, row in rows.items():
        h = max(tile.shape[0] for tile in row)
        draw.text((2 * gap, y + h / 2), _fitted(label, font, label_w - 3 * gap), font=font, fill=INK, anchor="lm")
        for column, tile in enumerate(row):
            sheet.paste(Image.fromarray(tile), (starts[column] + (widths[column] - tile.shape[1]) // 2, y))
        y += h + gap
    return sheet


def kept_overlay(image: Any, boxes: Any, *, min_height: int = 336, darken: float = 0.6) -> Image.Image:
    """Show which visual tokens of an image survived: what none of them covers is darkened, the rest stays as it is.

    Args:
        image: PIL image or (H, W, 3), as the model saw it (after resizing and cropping).
        boxes: (K, 4) left, top, right, bottom of the kept tokens, in shares of width and height.
        darken: how much light the dropped tokens lose, 0 to 1.
    Raises: ValueError for boxes outside the image.
    """
    pixels = to_uint8([image] if isinstance(image, Image.Image) else np.asarray(image)[None])[0]
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if not ((boxes >= -1e-6) & (boxes <= 1 + 1e-6) & (boxes[:, [0, 1, 0, 1]] <= boxes)).all():
        raise ValueError(
            f"boxes must be (left, top, right, bottom) in [0, 1], got values from {boxes.min()} to {boxes.max()}"
        )
    pixels = _enlarged(pixels[None], _factor(pixels.shape[0], min_height))[0].astype(np.float32)
    H, W = pixels.shape[:2]
    lit = np.zeros((H, W), bool)
    for left, top, right, bottom in np.rint(boxes * (W, H, W, H)).astype(int):
        lit[top:bottom, left:right] = True
    grey = pixels.mean(-1, keepdims=True)
    dropped = (0.35 * pixels + 0.65 * grey) * (1 - darken)  # less colour too: a dark object must not look dropped
    picture = np.where(lit[..., None], pixels, dropped)
    # a hairline where kept meets dropped, so that the border is visible on a dark image as well
    edge = np.zeros((H, W), bool)
    edge[:, 1:] |= lit[:, 1:] != lit[:, :-1]
    edge[1:] |= lit[1:] != lit[:-1]
    picture[edge] = 0.5 * picture[edge] + 0.5 * 255
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _factor(height: int, wanted: int) -> int:
    return max(1, math.ceil(wanted / height))


def _enlarged(video: np.ndarray, factor: int) -> np.ndarray:
    return video.repeat(factor, 1).repeat(factor, 2) if factor > 1 else video


def _even(value: int) -> int:
    return value + value % 2


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager

    file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    return ImageFont.truetype(file, size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` on one line, cut with an ellipsis where it does not fit."""
    text = " ".join(str(text).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip(" ,;:") + "…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """`text` on one or two lines, the second cut where it does not fit."""
    words = str(text).split()
    first = 0
    while first < len(words) and font.getlength(" ".join(words[: first + 1])) <= width:
        first += 1
    if first in (0, len(words)):
        return [_fitted(text, font, width)]
    return [" ".join(words[:first]), _fitted(" ".join(words[first:]), font, width)]


# ---------------------------------------------------------------- charts


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One measurement for `accuracy_curve`: `accuracy` in [0, 1] of `policy` with `tokens` visual tokens kept,
    measured on `questions` questions, which gives the error bar sqrt(p (1 - p) / questions)."""

    policy: str
    tokens: float
    accuracy: float
    questions: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `accuracy`."""
        return math.sqrt(max(self.accuracy * (1 - self.accuracy), 0) / self.questions)


def density_map(
    layout_or_mask: Any, *, frames: int | None = None, text_blocks: float = 0, title: str = "", head: int | None = None
) -> Image.Image:
    """Draw which key blocks each query block visits.

    Args:
        layout_or_mask: a `BlockLayout`, or a 2-D array (nQ, nK): bool, or float in [0, 1] for a mean over heads or
            layers.
        frames: draw a line at each frame border; the blocks before the text are shared out evenly among the frames.
        text_blocks: blocks at the end that hold text; may be fractional.
        title: one line over the map.
        head: which head of a layout to draw; None is the mean over batch and heads.
    Raises: ValueError for arrays that are not 2-D or not in [0, 1].
    """
    mask, note = _block_mask(layout_or_mask, head)
    nQ, nK = mask.shape
    with chart(4.8, 4.8 * min(max(nQ / nK, 0.35), 1.6) + 0.4) as (figure, axes):
        shades = density_shades()
        picture = axes.imshow(mask, cmap=shades, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_xlabel("key block")
        axes.set_ylabel("query block")
        for spine in axes.spines.values():
            spine.set_visible(True)
        if frames and frames > 1:
            for n, line in ((nK, axes.axvline), (nQ, axes.axhline)):
                per_frame = (n - text_blocks) / frames
                last = frames if text_blocks else frames - 1  # the border to the text is one more
                for k in range(1, last + 1):
                    line(k * per_frame - 0.5, color=COLOURS[1], linewidth=0.7, alpha=0.75)
        density = f"{mask.mean():.1%} of the blocks visited"
        lines = f"; lines: {frames} frames" + (" and text" if text_blocks else "") if frames and frames > 1 else ""
        titles(axes, title or "Block density", density + note + lines)
        if not np.isin(mask, (0, 1)).all():
            bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
            bar.set_label("fraction of heads")
            bar.outline.set_edgecolor(RULE)
        return as_picture(figure)


def accuracy_curve(
    points: Sequence[CurvePoint],
    *,
    dense: CurvePoint | None = None,
    title: str = "Accuracy against visual tokens kept",
    ylabel: str = "exact match",
) -> Image.Image:
    """Draw one line per policy, with binomial standard errors.

    Args:
        points: in any order; policies keep the order of their first appearance.
        dense: the unpruned model: a horizontal line with its standard error as a band; `tokens` is how many it sees.
    Raises: ValueError for no points.
    """
    if not points:
        raise ValueError("accuracy_curve needs at least one point, got none")
    policies = list(dict.fromkeys(p.policy for p in points))
    with chart(6.6, 4.2) as (figure, axes):
        if dense is not None:
            axes.axhline(dense.accuracy, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
            se = dense.standard_error
            axes.axhspan(dense.accuracy - se, dense.accuracy + se, color=INK, alpha=0.08, linewidth=0, zorder=0)
        for i, policy in enumerate(policies):
            mine = sorted((p for p in points if p.policy == policy), key=lambda p: p.tokens)
            nudge = 1 + 0.012 * (i - (len(policies) - 1) / 2)  # error bars of one budget must not hide each other
            axes.errorbar(
                [p.tokens * nudge for p in mine],
                [p.accuracy for p in mine],
                yerr=[p.standard_error for p in mine],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=policy,
                linewidth=1.7, markersize=5.5, elinewidth=1, capsize=2.5, markeredgecolor=PAPER, markeredgewidth=0.6,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({p.tokens for p in points} | ({dense.tokens} if dense else set()))
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_xlabel("visual tokens kept")
        axes.set_ylabel(ylabel)
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        if dense is not None:
            axes.annotate(
                f"dense {dense.accuracy:.1%}", (0, dense.accuracy), (4, 4), xycoords=("axes fraction", "data"),
                textcoords="offset points", color=INK, fontsize=8.5,
            )  # fmt: skip
        sizes = sorted({p.questions for p in points})
        n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        titles(axes, title, f"{n} questions per point; bars are one standard error")
        figure.legend(loc="outside lower center", ncols=min(len(policies), 4))
        return as_picture(figure)


def time_split(
    rows: Mapping[str, Mapping[str, float]], *, title: str = "Where the time goes", unit: str = "s"
) -> Image.Image:
    """Draw stacked horizontal bars: one row per variant, one segment per phase, the total at the end.

    Args:
        rows: label -> phase -> time. Phases named in `PHASES` keep their colours; others take the colours left over.
        unit: what the times are in, for the labels.
    Raises: ValueError for no rows, and for negative or non-finite times.
    """
    seen = dict.fromkeys(phase for parts in rows.values() for phase in parts)
    phases = [p for p in PHASES if p in seen] + [p for p in seen if p not in PHASES]
    wrong = [v for parts in rows.values() for v in parts.values() if not (math.isfinite(v) and v >= 0)]
    if not phases or wrong:
        raise ValueError(f"time_split needs rows of finite times, none negative, got {wrong or 'no times'}")
    colours = _phase_colours(phases)
    totals = {label: math.fsum(parts.values()) for label, parts in rows.items()}
    longest = max(totals.values()) or 1.0
    with chart(6.6, 1.35 + 0.46 * len(rows)) as (figure, axes):
        for phase in phases:
            widths = [parts.get(phase, 0.0) for parts in rows.values()]
            before = [
                math.fsum(v for k, v in parts.items() if phases.index(k) < phases.index(phase))
                for parts in rows.values()
            ]
            axes.barh(range(len(rows)), widths, left=before, height=0.62, color=colours[phase], label=phase,
                      edgecolor=PAPER, linewidth=0.8)  # fmt: skip
            for y, (start, width) in enumerate(zip(before, widths, strict=True)):
                if width > 0.09 * longest:
                    axes.text(start + width / 2, y, f"{width:.3g}", ha="center", va="center", fontsize=8.5,
                              color=_on(colours[phase]))  # fmt: skip
        for y, total in enumerate(totals.values()):
            axes.text(
                total + 0.012 * longest, y, f"{total:.3g} {unit}", va="center", fontsize=9, color=INK, weight="bold"
            )
        axes.set_yticks(range(len(rows)), [_shortened(label) for label in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, longest * 1.16)
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_xlabel(f"time ({unit})")
        axes.spines["left"].set_visible(False)
        titles(axes, title, "")
        figure.legend(loc="outside lower center", ncols=min(len(phases), 6))
        return as_picture(figure)


def _block_mask(source: Any, head: int | None) -> tuple[np.ndarray, str]:
    """(nQ, nK) float in [0, 1], and words about the heads."""
    note = ""
    if hasattr(source, "block_mask"):
        stacked = np.asarray(source.block_mask().cpu(), dtype=np.float64)
        heads = stacked.shape[1]
        if head is not None:
            if not 0 <= head < heads:
                raise ValueError(f"head must be in [0, {heads - 1}] for this layout, got {head}")
            note = f", head {head}"
        elif heads > 1:
            note = f", mean of {heads} heads"
        mask = (stacked if head is None else stacked[:, head : head + 1]).mean((0, 1))
    else:
        mask = np.asarray(source.cpu() if hasattr(source, "cpu") else source, dtype=np.float64)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"density_map needs a BlockLayout or a 2-D mask (nQ, nK), got shape {mask.shape}")
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"density_map needs values in [0, 1], got [{mask.min():.4g}, {mask.max():.4g}]")
    return mask, note


def _phase_colours(phases: Sequence[str]) -> dict[str, str]:
    known = {phase: PHASES[phase] for phase in phases if phase in PHASES}
    spare = [c for c in COLOURS if c not in known.values()] or list(COLOURS)
    others = [phase for phase in phases if phase not in known]
    return {**known, **{phase: spare[i % len(spare)] for i, phase in enumerate(others)}}


def _on(colour: str) -> str:
    """Ink or paper, whichever is readable on a colour."""
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return INK if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.42 else PAPER


def _shortened(label: str, limit: int = 34) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def density_shades() -> Any:
    """The colours of densities from 0 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("density", ["#f3f5f8", "#a9cde6", COLOURS[0], "#0a3f66"])


@contextmanager
def chart(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure in the house style. No pyplot: it would keep every figure alive and pick a backend for the user."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK,
        "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.facecolor": PAPER, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.frameon": False, "legend.fontsize": 9, "figure.facecolor": PAPER, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def titles(axes: Axes, title: str, subtitle: str) -> None:
    """A heading and, smaller, what it is about."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=22 if subtitle else 8)
    if subtitle:
        axes.annotate(subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
                      fontsize=8.5, color=MUTED)  # fmt: skip


def as_picture(figure: Figure) -> Image.Image:
    """Render a figure; the image remembers its resolution, so that a page can show it at its physical size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as opened:
        image = opened.convert("RGB")
    image.info["dpi"] = (DPI, DPI)
    return image
