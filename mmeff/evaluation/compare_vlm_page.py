"""The page of a comparison of answers: which tokens stayed, where the time went, what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmeff.evaluation.comparison import slug
from mmeff.evaluation.page import Figure, Listing, Section, Table
from mmeff.evaluation.pictures import kept_sheet, time_split
from mmeff.evaluation.run_folder import RunFolder
from mmeff.handle import describe_model
from mmeff.report import Report, TokenPlaces

SHOWN = 6  # questions with a picture of their tokens
FRAMES = 8  # of a video that a picture shows


def pages(
    folder: RunFolder, cases: Sequence[Mapping[str, Any]], measured: Mapping[str, dict[str, Any]],
    reports: Mapping[str, Report], kept: Mapping[str, Sequence[Mapping[int, Any]]],
    places: Mapping[str, Sequence[TokenPlaces | None]], *, columns: Sequence[str], rows: Sequence[Sequence[Any]], model: Any,
    remark: str,
) -> tuple[Section, ...]:  # fmt: skip
    """Write the pictures into the folder, and make the section that shows them.

    Args:
        measured, reports: by variant, dense first. kept, places: by variant and question, the tokens kept from each layer
            on, and where those of the prompt lie.
        columns, rows: of the table of figures.
    """
    names = list(measured)
    figures = []
    for name in names[1:]:
        for i, case in enumerate(cases[:SHOWN]):
            words = f"“{case['question']}”: dense “{measured['dense']['answers'][i]}”, {name} “{measured[name]['answers'][i]}”."
            figures += _kept(folder, name, i, case["images"], kept[name][i], places[name][i], model, words)
    split = {name: {k: v for k, v in measured[name]["phases"].items() if v} for name in names}
    picture = time_split(split, title="Time of one answer")
    folder.write_image("pictures/vlm-time.png", picture)
    figures.append(Figure(image=picture, alt="Seconds in vision encoder, prefill, selection and decode per variant"))
    answers = Table(
        columns=("question", *names),
        rows=[(c["question"], *(measured[n]["answers"][i] for n in names)) for i, c in enumerate(cases)],
        caption="Answers",
    )
    note = (
        "Visual tokens, operations and cache are those of the language model in prefill, operations as a share of dense ones; "
        "cache is of the prompt, over all layers."
    )
    return (
        Section(
            heading="Vision-language: dense and pruned answers",
            paragraphs=[
                f"{describe_model(model)}, one question at a time. Prefill is without the selection of tokens, which stands apart.",
                *([remark] if remark else []),
            ],
            tables=[Table(columns=columns, rows=rows, note=note), answers],
            figures=figures,
            listings=[Listing(title=f"What ran: {n}", text=str(reports[n])) for n in names[1:]],
        ),
    )


def _kept(
    folder: RunFolder, name: str, i: int, images: Sequence[Any], kept: Mapping[int, Any], places: TokenPlaces | None,
    model: Any, words: str,
) -> list[Figure]:  # fmt: skip
    """The picture of one question, or nothing where the method never acted or no token's place is known."""
    if places is None or not kept:
        return []
    mine = TokenPlaces(*(np.asarray(x[0]) for x in (places.picture, places.box, places.tile)))
    if not np.isfinite(mine.box).any():
        return []
    picture = kept_sheet(
        [as_seen(image, model) for image in images], {k: np.asarray(p[0]) for k, p in kept.items()}, mine, count=FRAMES
    )
    folder.write_image(f"pictures/kept-{slug(name)}-{i}.png", picture)
    left = ", ".join(f"{int((np.asarray(p[0]) >= 0).sum())} from layer {layer} on" for layer, p in kept.items())
    there = mine.picture >= 0
    lost = int((there & ~np.isfinite(mine.box).all(-1)).sum())
    notes = f" {FRAMES} of {len(images)} frames are shown." if int(mine.picture.max()) >= FRAMES else ""
    notes += f" {lost} tokens, whose places cannot be told, are not drawn." if lost else ""
    return [
        Figure(
            image=picture, alt=f"What the model saw, with the tokens that {name} dropped darkened",
            caption=f"{words} Of {int(there.sum())} tokens {left}.{notes}",
        )
    ]  # fmt: skip


def as_seen(image: Any, model: Any) -> Any:
    """An image as the model was shown it: of LLaVA-1.5 the square centre, which CLIP's preprocessing cuts out."""
    if model.config.model_type != "llava":
        return image
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    size = int(model.config.vision_config.image_size)
    return image.crop((left, top, left + side, top + side)).resize((size, size))
