"""The parts of the tab Backbones that are HTML: what each model made of the picture, and how fast. Every text is escaped."""

from __future__ import annotations

from .looks import At, Look, Seen, Sight
from .pictures import inline, strip
from .views import TIMES, environment_line, text


def banner(note: str) -> str:
    """That weights are random; nothing where they are trained."""
    if not note:
        return ""
    head, _, rest = note.partition(":")
    return f'<div class="mm-banner" role="note"><strong>{text(head)}:</strong>{text(rest)}.</div>'


def progress(at: At) -> str:
    """Where a run is, in a line."""
    line = {
        "waiting": f"waiting for your turn: {at.before} {'run is' if at.before == 1 else 'runs are'} before yours" if at.before else "starting",
        "loading": f"{at.model}: being built", "looking": f"{at.model}: looks at the picture",
        "timing": "both in turn, for the times",
    }[at.stage]  # fmt: skip
    return f'<div class="mm-progress" role="status" aria-live="polite"><div class="mm-line"><b>{text(line)}</b></div></div>'


def sight(found: Sight, look: Look) -> str:
    """Both models side by side, and below them on what machine that was."""
    cards = "".join(_card(one, found, look) for one in found.seen)
    words = []
    if found.rounds:
        pictures = "one picture" if found.batch == 1 else f"{found.batch} pictures at once"
        words.append(
            f"Times are of {pictures}, medians of {found.rounds} rounds in which both ran in turn, on {environment_line(found.environment)}; "
            "in brackets the 20th to the 80th percentile"
        )  # fmt: skip
    else:
        words.append(f"On {environment_line(found.environment)}; no times were asked for")
    words.append("Multiply-adds are counted, those of one picture")
    if found.apart is not None:
        words.append(
            f"The outputs of both ways lie {found.apart:.1e} of their norm apart: the same model, but for rounding"
        )
    below = ". ".join(words) + "."
    return f'<div class="mm-sight">{cards}</div><p class="mm-where">{text(below)}</p>'


def _card(one: Seen, found: Sight, look: Look) -> str:
    facts = [
        ("parameters", f"{one.parameters / 1e6:.2f} M"), ("multiply-adds", f"{one.gmacs:.2f} G"),
        ("shown", f"{one.size[0]} {TIMES} {one.size[1]} pixels"),
    ]  # fmt: skip
    if one.milliseconds is not None and one.speedup is not None:
        middle, low, high = one.milliseconds
        rate = 1e3 * found.batch / middle
        kind = "mm-gain" if one.speedup >= 1.005 else "mm-loss" if one.speedup <= 0.995 else ""
        facts.append(("time", f"{_ms(middle)} ({_ms(low)} to {_ms(high)})"))
        facts.append(("throughput", f"{rate:.3g} pictures/s"))
        facts.append(("against the other", f'<span class="{kind}">{one.speedup:.2f}{TIMES}</span>'))
    listed = "".join(
        f"<div><dt>{text(name)}</dt><dd>{value if value.startswith('<span') else text(value)}</dd></div>"
        for name, value in facts
    )
    ran = "".join(f"<li>{text(line)}</li>" for line in one.ran)
    maps = [(image, f"{i + 1}: {_shape(shape)}") for i, (image, shape) in enumerate(one.maps)]
    return (
        f'<section class="mm-plan" aria-label="{text(one.name)}, {text(one.how)}"><h4>{text(one.name)}</h4>'
        f'<p class="mm-how">{text(one.how)}{", random weights" if one.random else ""}</p><dl>{listed}</dl>'
        + (f"<ul>{ran}</ul>" if ran else "")
        + f'<div class="mm-looked">{inline(one.image, "the picture as " + one.name + " gets it")}{_classes(one)}</div>'
        + f"<h5>Feature maps, stage by stage: {text(look.coloured)}</h5>"
        + strip(maps, f"Feature maps of {one.name}")
        + "</section>"
    )


def _classes(one: Seen) -> str:
    if one.random:
        return '<p class="mm-none">No classes: the weights are random, and what they would say means nothing.</p>'
    rows = "".join(
        f"<li><span>{text(name)}</span><b>{p:.1%}</b>"
        f'<span class="mm-track" aria-hidden="true"><span style="width:{100 * p:.1f}%"></span></span></li>'
        for name, p in one.classes
    )
    return f'<ol class="mm-classes">{rows}</ol>'


def _shape(shape: tuple[int, ...]) -> str:
    return f" {TIMES} ".join(map(str, shape))


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.3g} s"
