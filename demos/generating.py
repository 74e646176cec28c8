"""Videos and pictures, dense and with methods, from the same noise: what the tabs Generate and Images show.

The library does the work; this file puts it in order: wait for a turn, load, plan, warm up, run dense, run each method, compare.
"""

from __future__ import annotations

import hashlib
import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmeff.config import MethodConfig
from mmeff.evaluation.comparison import slug, variant_names
from mmeff.report import Plan, Report, environment

from .kept import DenseRuns
from .models import Models
from .runs import Run, Runs
from .settings import Settings
from .turns import Ticket, Turns
from .wishes import Progress, Result, Variant, Wish

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmeff.pipelines import Clip, VideoGenerator

SIZES = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
Tell = Callable[[Progress], None]


class Generating:
    """Runs wishes. `defaults` and `plan` answer at once; `run` takes its turn."""

    def __init__(self, settings: Settings, models: Models, turns: Turns, runs: Runs) -> None:
        self.settings, self.models, self.turns, self.runs = settings, models, turns, runs
        self._dense = DenseRuns(settings.dense_cache_mb)
        self._warm: set[tuple[Any, ...]] = set()

    def defaults(self, model: str) -> dict[str, Any]:
        """A model's own sizes, what it takes, and what must be known about it; loads the model."""
        from mmeff.pipelines.loading import guided

        generator = self.models.load(self.models.offer(model, "video", "image"))
        given = inspect.signature(generator.pipe.__call__).parameters
        values = {name: p.default for name, p in given.items() if name in SIZES} | generator.defaults
        if not guided(generator.pipe):
            values.pop("guidance_scale", None)
        image = given.get("image")
        return {
            **{name: values.get(name) for name in SIZES},
            "takes_image": image is not None,
            "needs_image": image is not None and image.default is image.empty,
            "note": str(getattr(generator.pipe, "mmeff_note", "")),
        }

    def plan(self, wish: Wish) -> dict[str, Plan]:
        """What each method would do, by variant; loads the model.

        Raises: TypeError, ValueError: as `Wish.check` (an empty prompt apart) and `mmeff.plan`.
        """
        replace(wish, prompt=wish.prompt if wish.prompt and wish.prompt.strip() else "any").check(self.settings)
        return self._plans(self.models.load(self.models.offer(wish.model, "video", "image")), wish)

    def run(self, wish: Wish, user: str) -> Iterator[Progress | Result]:
        """Run a wish in a thread of its own; yields where it is, and at last the result.

        A reader that stops reading cancels the run.

        Raises: TypeError, ValueError: as `Wish.check`, before anything runs; Busy; Cancelled; whatever the run raises.
        """
        wish.check(self.settings)
        self.models.offer(wish.model, "video", "image")
        news: queue.SimpleQueue[Progress | Result | BaseException] = queue.SimpleQueue()
        with self.turns.admit(user) as ticket:

            def work() -> None:
                try:
                    news.put(self._run(wish, ticket, news.put))
                except BaseException as error:  # raised again by the one who reads
                    news.put(error)

            thread = threading.Thread(target=work, name="mmeff-demo-run", daemon=True)
            thread.start()
            try:
                while True:
                    found = news.get()
                    if isinstance(found, BaseException):
                        raise found
                    yield found
                    if isinstance(found, Result):
                        return
            finally:
                ticket.cancel()
                thread.join()

    def frames(self, run: str, variant: str, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame `frame` (H, W, 3) of the dense video and of a variant.

        Raises: ValueError for a run that is not kept any more, a variant or a frame that it does not have.
        """
        dense, other = self._pair(run, variant)
        if type(frame) is not int or not 0 <= frame < len(dense):
            raise ValueError(f"frame must be in [0, {len(dense) - 1}], got {frame!r}")
        return np.asarray(dense[frame]), np.asarray(other[frame])

    def difference(self, run: str, variant: str, frame: int) -> Image:
        """The heat map of one frame, on the scale of the whole video; raises as `frames`."""
        from mmeff.evaluation.run_pictures import difference_map

        self.frames(run, variant, frame)
        dense, other = self._pair(run, variant)
        where = f", frame {frame}" if len(dense) > 1 else ""
        return difference_map(dense, other, frame=frame, title=f"{variant} against dense{where}")

    def schedule(self, run: str, variant: str) -> Image:
        """Density by layer and step of a variant; raises as `frames`."""
        from mmeff.evaluation.run_pictures import schedule_map

        self._pair(run, variant)
        return schedule_map(self.runs.get(run).data["reports"][variant], title=f"{variant}: density by layer and step")

    def _pair(self, run: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
        found = self.runs.get(run).data.get("frames", {})
        if variant not in found or variant == "dense":
            raise ValueError(
                f"variant must be one of {', '.join(name for name in found if name != 'dense')}, got {variant!r}"
            )
        return found["dense"], found[variant]

    # ---------------------------------------------------------------- one run, in its thread

    def _run(self, wish: Wish, ticket: Ticket, tell: Tell) -> Result:
        began = time.perf_counter()

        def now(**where: Any) -> None:
            tell(Progress(**where, seconds=time.perf_counter() - began))

        now(stage="waiting")
        with self.models.use(
            wish.model, ticket, waiting=lambda before: now(stage="waiting", before=before),
            loading=lambda: now(stage="loading"),
        ) as generator:  # fmt: skip
            now(stage="planning")
            plans = self._plans(generator, wish)
            for name, plan in plans.items():
                if plan.density is None:
                    reasons = "; ".join(plan.fallbacks) or "the plan finds nothing for it to do"
                    raise ValueError(f"{name} would accelerate nothing here: {reasons}")
            names = list(plans)
            made: dict[str, Clip] = {}
            kept = self._dense.get(_key(wish))
            for number, (name, method) in enumerate(zip(["dense", *names], [None, *wish.methods], strict=True)):
                if name == "dense" and kept is not None:
                    made[name] = kept.clip
                    continue
                generator.use(method)
                where = {"variant": name, "number": number + 1, "variants": len(names) + 1}
                self._warm_up(generator, wish, method, partial(now, stage="warming up", **where), ticket)
                report = partial(now, stage="running", **where)
                made[name] = generator.generate(
                    wish.prompt, seed=wish.seed, image=wish.image, cancel=ticket.cancelled,
                    progress=lambda _, step, steps, report=report: report(step=step, steps=steps), **wish.sizes,
                )  # fmt: skip
                if name == "dense":
                    self._dense.put(_key(wish), made[name])
            now(stage="measuring", variants=len(names) + 1)
            return self._result(wish, generator, made, plans, None if kept is None else time.time() - kept.made)

    def _warm_up(
        self, generator: VideoGenerator, wish: Wish, method: MethodConfig | None, tell: Callable[..., None], ticket: Ticket
    ) -> None:  # fmt: skip
        """Two steps, untimed, the first time that a model meets a method at a size: kernels are built and chosen there."""
        sizes = {name: value for name, value in wish.sizes.items() if name != "num_inference_steps"}
        key = (wish.model, method, tuple(sorted(sizes.items())))
        if key in self._warm:
            return
        tell()
        every_step = getattr(method, "at_every_step", None)
        generator.use(every_step() if every_step is not None else method)
        generator.generate(wish.prompt, seed=wish.seed, image=wish.image, cancel=ticket.cancelled,
                           **{**wish.sizes, "num_inference_steps": 2})  # fmt: skip
        generator.use(method)
        if len(self._warm) > 1000:
            self._warm.clear()
        self._warm.add(key)

    def _plans(self, generator: VideoGenerator, wish: Wish) -> dict[str, Plan]:
        import mmeff

        names = variant_names(wish.methods)
        own = {name: value for name, value in self.defaults(wish.model).items() if name in SIZES and type(value) is int}
        sizes = {name: value for name, value in {**own, **wish.sizes}.items() if name != "guidance_scale"}
        if generator.makes_pictures and "max_sequence_length" in generator.defaults:
            sizes["text_tokens"] = generator.defaults["max_sequence_length"]  # the text is part of the attention
        return {
            name: mmeff.plan(generator.pipe, method, **sizes) for name, method in zip(names, wish.methods, strict=True)
        }

    def _result(
        self,
        wish: Wish,
        generator: VideoGenerator,
        made: dict[str, Clip],
        plans: dict[str, Plan],
        earlier: float | None,
    ) -> Result:
        kind = self.models.offer(wish.model).kind
        run = self.runs.new()
        try:
            variants = [
                self._variant(run, kind, name, clip, made["dense"], plans.get(name)) for name, clip in made.items()
            ]
            dense = made["dense"]
            run.data["frames"] = {name: _stored(run, name, clip) for name, clip in made.items()}
            reports: dict[str, Report] = {name: clip.reports[0] for name, clip in made.items() if clip.reports}
            run.data["reports"] = reports
            self.runs.settle(run)
        except BaseException:
            self.runs.drop(run)
            raise
        frames, height, width, _ = dense.frames.shape
        return Result(
            run=run, model=wish.model, kind=kind, note=dense.recipe.note, prompt=wish.prompt, seed=wish.seed,
            settings=dict(dense.recipe.settings), variants=(replace(variants[0], earlier=earlier), *variants[1:]),
            plans=plans, reports=reports, frames=frames, size=(width, height), fps=dense.fps, environment=environment(),
        )  # fmt: skip

    def _variant(self, run: Run, kind: str, name: str, clip: Clip, dense: Clip, plan: Plan | None) -> Variant:
        """The figures of one clip against the dense one, and its files."""
        steps = int(clip.recipe.settings.get("num_inference_steps", 0))
        files = self._files(run, kind, name, clip)
        if plan is None:
            return Variant(name=name, seconds=clip.seconds, steps=steps, dense_steps=steps, files=files)
        from mmeff.evaluation.metrics import background_corrected_psnr, background_shift, psnr, ssim

        report, pair = clip.reports[0], (clip.frames, dense.frames)
        close = psnr(*pair)
        identical = close.identical == len(clip.frames)
        return Variant(
            name=name, seconds=clip.seconds, steps=steps,
            dense_steps=sum(not (counts.get("sparse") or counts.get("full")) for counts in report.steps.values()),
            speedup=dense.seconds / clip.seconds, predicted=plan.predicted_speedup, density=report.density,
            psnr=None if identical else close.mean,
            corrected_psnr=None if identical else background_corrected_psnr(*pair).mean, ssim=ssim(*pair).mean,
            background_shift=background_shift(*pair), identical=identical,
            files=files | self._comparison_files(run, kind, name, clip, dense),
            remarks=(*report.remarks, *(f"{count} calls ran dense: {why}" for why, count in report.fallbacks.items())),
            report=str(report),
        )  # fmt: skip

    def _files(self, run: Run, kind: str, name: str, clip: Clip) -> dict[str, str]:
        """Write what was made: the video or the picture, its recipe, and the method's config."""
        import yaml

        clip = replace(clip, recipe=replace(clip.recipe, model=self._shown(clip.recipe.model)))
        media = clip.save(
            run.folder / f"{slug(name)}.{'png' if kind == 'image' else 'mp4'}"
        )  # and the recipe beside it
        files = {"media": media, "recipe": media.with_suffix(".yaml")}
        if clip.image is not None:  # which the recipe starts from, and names
            files["image"] = run.folder / str(yaml.safe_load(files["recipe"].read_text("utf-8"))["image"])
        for config in clip.recipe.methods:
            files["config"] = run.folder / f"{slug(name)}-config.yaml"
            files["config"].write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
        return {what: run.publish(path) for what, path in files.items()}

    def _comparison_files(self, run: Run, kind: str, name: str, clip: Clip, dense: Clip) -> dict[str, str]:
        """Write where a clip differs from the dense one; of a video also both beside each other."""
        from PIL import Image

        from mmeff.evaluation.pictures import side_by_side
        from mmeff.evaluation.run_pictures import difference_video
        from mmeff.video_io import write

        apart = difference_video(dense.frames, clip.frames)
        if kind == "image":
            path = run.folder / f"{slug(name)}-difference.png"
            Image.fromarray(apart[0]).save(path)
            return {"difference": run.publish(path)}
        pair = side_by_side(dense.frames, clip.frames, ("dense", name))
        files = {
            "difference": write(run.folder / f"{slug(name)}-difference.mp4", apart, fps=clip.fps),
            "pair": write(run.folder / f"dense-and-{slug(name)}.mp4", pair, fps=clip.fps),
        }
        return {what: run.publish(path) for what, path in files.items()}

    def _shown(self, source: str) -> str:
        """A model's name in a file that visitors download: the demo's, never the server's folder."""
        for offer in self.models.offers.values():
            if source in (offer.source, str(Path(offer.source).resolve())):
                return offer.name
        return Path(source).name


def _stored(run: Run, name: str, clip: Clip) -> np.ndarray:
    """The exact frames on disk, of which a later look reads one."""
    path = run.folder / f"{slug(name)}.npy"
    np.save(path, clip.frames)
    return np.load(path, mmap_mode="r")


def _key(wish: Wish) -> tuple[Any, ...]:
    """What decides the dense run of a wish."""
    image = None if wish.image is None else hashlib.sha256(wish.image.tobytes()).hexdigest()
    return (wish.model, wish.prompt, wish.seed, tuple(sorted(wish.sizes.items())), image)
