"""Compare generated videos or pictures: the same prompt and noise dense and sparse, with PSNR and SSIM to dense and the time of
each part. A picture is a video of one frame, and is written as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

import mmeff
from mmeff.config import MethodConfig
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.evaluation.comparison import Comparison, Tick, silent, slug, variant_names
from mmeff.evaluation.metrics import background_corrected_psnr, background_shift, latency, psnr, ssim
from mmeff.evaluation.page import Figure, Listing, Section, Table, Videos
from mmeff.evaluation.pictures import density_map, side_by_side, strip, time_split
from mmeff.evaluation.run_folder import RunFolder
from mmeff.handle import describe_model, model_note
from mmeff.pipelines.loading import check_honoured, makes_pictures
from mmeff.report import Report
from mmeff.video_io import to_uint8


def compare_video(
    pipeline: Any,
    methods: Sequence[MethodConfig],
    prompts: str | Sequence[str],
    *,
    height: int = 480,
    width: int = 832,
    num_frames: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int = 512,
    seed: int = 0,
    fps: float = 8,
    warm_up: bool = True,
    folder: RunFolder | None = None,
    tick: Tick = silent,
) -> Comparison:
    """Generate every prompt dense and with each method.

    Args:
        methods: configs of stage diffusion_attn.
        prompts: one or more texts; prompt i uses noise seed `seed + i` in every variant.
        height, width: pixels. num_frames: frames of a video, 81 by default; a pipeline of pictures makes one and takes no other
            number. num_inference_steps: denoising steps.
        guidance_scale, negative_prompt, max_sequence_length: as the pipeline takes them; a video has guidance 5 by default, a
            picture the pipeline's own.
        fps: of the written mp4s. warm_up: run one short generation per variant first, untimed.
        folder: where videos and pictures go; None writes nothing.
    Returns:
        the comparison; times are whole `pipeline(...)` calls, medians over prompts, variants in alternating order.
    Raises:
        ValueError: no prompt, or an empty one; frames or a guidance that the pipeline would not honour.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"compare needs at least one prompt, none empty, got {prompts!r}")
    pictures = makes_pictures(pipeline)
    sizes = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
    check_picture(pipeline, num_frames=num_frames, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    if pictures:
        asked = {**sizes, "text_tokens": max_sequence_length}  # the text is part of the attention that is planned
    else:
        sizes["num_frames"] = 81 if num_frames is None else num_frames
        guidance_scale = 5.0 if guidance_scale is None else guidance_scale
        asked = sizes
    optional = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    call: dict[str, Any] = {**sizes, "max_sequence_length": max_sequence_length}
    call |= {name: value for name, value in optional.items() if value is not None}
    names = ["dense", *variant_names(methods)]
    # The dense run carries a disabled handle, so that its steps are timed by the same hooks.
    configs = dict(zip(names, [methods[0], *methods], strict=True))
    plans = {name: mmeff.plan(pipeline, configs[name], **asked) for name in names[1:]}
    total, done = len(texts) * len(names), 0

    def run(
        name: str, text: str, noise: int, method: MethodConfig | None = None, **changes: Any
    ) -> tuple[np.ndarray, float, Report]:
        with mmeff.accelerate(pipeline, method or configs[name]) as handle:
            handle.enabled = name != "dense"
            generator = torch.Generator(device="cpu").manual_seed(noise)
            began = time.perf_counter()
            output = pipeline(text, **{**call, **changes}, generator=generator, output_type="np")
            seconds = time.perf_counter() - began
            report = handle.report()
            handle.enabled = False  # a method that never acted is reported as such by the comparison, not raised here
        return (output.images if pictures else output.frames[0]), seconds, report

    if warm_up:
        for name in names:
            tick(f"warming up {name}", done, total)
            method = cast(SparseAttention, configs[name]).at_every_step()  # two steps may be fewer than its dense ones
            run(name, texts[0], seed, method, num_inference_steps=min(2, num_inference_steps))
    videos: dict[str, list[Any]] = {name: [None] * len(texts) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    reports: dict[str, Report] = {}
    for i, text in enumerate(texts):
        for name in names if i % 2 == 0 else reversed(names):  # alternate, so that a drifting machine favours nobody
            tick(f"{name}: {text}", done, total)
            videos[name][i], spent, reports[name] = run(name, text, seed + i)
            seconds[name].append(spent)
            done += 1
            tick(f"{name}: {text}", done, total)
    measured = {name: _figures(name, videos, seconds, reports[name]) for name in names}
    for name in names[1:]:
        measured[name]["predicted_speedup"] = plans[name].predicted_speedup
    rows = tuple(_row(name, measured[name]) for name in names)
    sections: tuple[Section, ...] = ()
    if folder is not None:
        sections = _pages(folder, texts, names, videos, measured, reports, plans, fps, pictures, pipeline)
    best = min(names[1:], key=lambda n: measured[n]["latency"].median)
    return Comparison(
        kind="image" if pictures else "video",
        model=describe_model(pipeline),
        note=model_note(pipeline),
        columns=COLUMNS,
        rows=rows,
        measured={"settings": {**call, "seed": seed, "prompts": texts}, "variants": measured},
        reports=reports,
        sections=sections,
        highlights=(
            (f"{measured[best]['speedup']:.2f}x", f"{best}: whole generation against dense, measured"),
            (str(measured[best]["psnr"]), f"{best}: PSNR to dense, same seed"),
        ),
    )


def check_picture(
    pipeline: Any, *, num_frames: int | None = None, guidance_scale: float | None = None, negative_prompt: str | None = None,
    **others: Any,
) -> None:  # fmt: skip
    """Raise ValueError for settings of `compare_video` that a pipeline of pictures would not honour; a video's are all fine."""
    if not makes_pictures(pipeline):
        return
    who = type(pipeline).__name__
    if num_frames not in (None, 1):
        raise ValueError(f"{who} makes pictures, so num_frames must be 1 or left out, got {num_frames}")
    check_honoured(pipeline, {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt})


COLUMNS = ("variant", "median s", "speedup", "predicted", "density", "PSNR dB", "bg-corrected", "SSIM", "bg shift")


def _figures(
    name: str, videos: dict[str, list[Any]], seconds: dict[str, list[float]], report: Report
) -> dict[str, Any]:
    both = list(zip(videos[name], videos["dense"], strict=True))
    whole = [np.concatenate(side) for side in zip(*both, strict=True)]
    figures: dict[str, Any] = {
        "latency": latency(seconds[name]),
        "speedup": float(np.median([d / s for d, s in zip(seconds["dense"], seconds[name], strict=True)])),
        "density": report.density,
        "phases": report.seconds,
    }
    if name != "dense":
        figures["psnr"] = psnr(*whole)
        figures["ssim"] = ssim(*whole)
        corrected = [background_corrected_psnr(a, b).mean for a, b in both]
        figures["background_corrected_psnr"] = float(np.mean(corrected))
        figures["background_shift"] = float(np.mean([background_shift(a, b) for a, b in both]))
    return figures


def _row(name: str, figures: dict[str, Any]) -> tuple[Any, ...]:
    if name == "dense":
        return (name, f"{figures['latency'].median:.2f}", "1.00x", None, "1.000", None, None, None, None)
    density, predicted = figures["density"], figures["predicted_speedup"]
    return (
        name,
        f"{figures['latency'].median:.2f}",
        f"{figures['speedup']:.2f}x",
        None if predicted is None else f"{predicted:.2f}x",
        None if density is None else f"{density:.3f}",
        str(figures["psnr"]).removesuffix(" dB"),
        f"{figures['background_corrected_psnr']:.2f}",
        str(figures["ssim"]),
        f"{figures['background_shift']:.3f}",
    )


def _pages(
    folder: RunFolder, texts: list[str], names: list[str], videos: dict[str, list[Any]], measured: dict[str, Any],
    reports: dict[str, Report], plans: dict[str, Any], fps: float, pictures: bool, pipeline: Any,
) -> tuple[Section, ...]:  # fmt: skip
    """Write mp4s, or PNGs of pictures, and describe them."""
    players, strips = [], []
    for i, text in enumerate(texts):
        if pictures:
            for name in names:
                folder.write_image(f"pictures/{i}-{slug(name)}.png", Image.fromarray(to_uint8(videos[name][i])[0]))
            for name in names[1:]:
                pair = side_by_side(videos["dense"][i], videos[name][i], ("dense", name))
                strips.append(_pair(folder, f"pictures/{i}-dense-and-{slug(name)}.png", pair, text, name))
            continue
        paths = [folder.write_video(f"videos/{i}-{slug(name)}.mp4", videos[name][i], fps) for name in names]
        for name in names[1:]:
            pair = side_by_side(videos["dense"][i], videos[name][i], ("dense", name))
            folder.write_video(f"videos/{i}-dense-and-{slug(name)}.mp4", pair, fps)
        small = videos["dense"][i].shape[1] < 160
        players.append(Videos(paths=paths, labels=names, caption=f"“{text}”, same noise", pixelated=small))
        sheet = strip({name: videos[name][i] for name in names})
        folder.write_image(f"pictures/{i}-strip.png", sheet)
        strips.append(Figure(image=sheet, alt=f"Frames of “{text}”, one row per variant", caption=f"“{text}”"))
    figures = []
    for name in names[1:]:
        for what, layout in plans[name].layouts.items():
            picture = density_map(layout, frames=_frames(plans[name]), title=name)
            folder.write_image(f"pictures/density-{slug(name)}.png", picture)
            caption = f"{name}, {what}: the blocks that are computed. Lines are frame borders."
            figures.append(Figure(image=picture, alt=f"Block map of {name}", caption=caption))
    phases = {}
    for name in names:
        spent = reports[name].seconds
        phases[name] = {k.removeprefix("denoising, "): v for k, v in spent.items() if k.startswith("denoising, ")}
    picture = time_split(phases, title="Time in the transformer, last prompt")
    folder.write_image("pictures/video-time.png", picture)
    figures.append(Figure(image=picture, alt="Seconds in dense and sparse denoising steps per variant"))
    return (
        Section(
            heading=f"{'Pictures' if pictures else 'Video'}: dense and sparse from the same noise",
            paragraphs=[f"{describe_model(pipeline)}. Times are whole generations; predicted speedup counts operations of the transformer "
                        f"and is no measurement. PSNR and SSIM compare with the dense {'picture' if pictures else 'video'} of the same seed."],
            tables=[Table(columns=COLUMNS, rows=[_row(n, measured[n]) for n in names],
                          note="bg-corrected: PSNR after removing the shift of the background colour; bg shift: that shift, in [0, 1].")],
            videos=players,
            figures=[*strips, *figures],
            listings=[Listing(title=f"What ran: {n}", text=str(reports[n])) for n in names[1:]]
            + [Listing(title=f"The plan before the run: {n}", text=str(plans[n])) for n in names[1:]],
        ),
    )  # fmt: skip


def _pair(folder: RunFolder, name: str, pair: np.ndarray, text: str, variant: str) -> Figure:
    """Write two pictures side by side, and describe them."""
    sheet = Image.fromarray(pair[0])
    folder.write_image(name, sheet)
    return Figure(image=sheet, alt=f"“{text}”, dense and {variant}", caption=f"“{text}”, same noise")


def _frames(plan: Any) -> int | None:
    grid = dict(plan.rows).get("grid", "")
    head = str(grid).split("x")[0].strip()
    return int(head) if head.isdigit() else None
