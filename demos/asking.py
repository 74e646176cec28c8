"""Questions about a picture or a clip, answered dense and with visual tokens dropped: what the tab Ask shows.

The answers come piece by piece, one variant after the other on one model. Short ones are then repeated in turn, so that the
times in the table are medians and not the noise of a single run; which tokens stayed is kept for as long as the run is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mmeff.config import MethodConfig
from mmeff.evaluation.comparison import variant_names
from mmeff.report import Plan, Report, TokenPlaces

from .queries import Asked, Query, Reply, Step
from .results import Figure, Results
from .runs import Runs
from .settings import Settings
from .turns import Turns
from .working import working

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmeff.pipelines import Answer, VisionLanguageModel
    from mmeff.pipelines._question import Question

    from .models import Models
    from .turns import Ticket

FRAMES = 8  # of a clip, unless the visitor asks for another number
ROUNDS, BUDGET = 7, 2.0  # repetitions at most, and the seconds that they may take together
MOST_SHOWN = 640  # pixels of a picture that is kept to draw on
ALL_KINDS = "all kinds of question"


class Asking:
    """Answers queries. `plan` and `kept` answer at once; `run` takes its turn."""

    def __init__(
        self, settings: Settings, models: Models, turns: Turns, runs: Runs, results: Callable[[], Results]
    ) -> None:
        self.settings, self.models, self.turns, self.runs, self._results = settings, models, turns, runs, results
        self._warm: set[tuple[Any, ...]] = set()

    def note(self, model: str) -> str:
        """What must be known about a model: that it is tiny, or has random weights. Loads no model."""
        from mmeff import tiny

        return tiny.NOTE if self.models.offer(model, "vlm").embedded else ""

    def plan(self, query: Query) -> dict[str, Plan]:
        """What each method would do, by variant; loads the model.

        Raises: TypeError, ValueError, UnsupportedModel: as `Query.check` and `mmeff.plan`.
        """
        query.check(self.settings)
        vlm = self.models.load(self.models.offer(query.model, "vlm"))
        return self._plans(vlm, query, vlm.question(query.question, **query.media))

    def run(self, query: Query, user: str) -> Iterator[Step | Asked]:
        """Answer a query in a thread of its own; yields how far the answers are, and at last the result.

        A reader that stops reading cancels the run.

        Raises: TypeError, ValueError: as `Query.check`, before anything runs; Busy; Cancelled; whatever the run raises.
        """
        query.check(self.settings)
        self.models.offer(query.model, "vlm")
        yield from working(self.turns, user, lambda ticket, tell: self._run(query, ticket, tell))

    # ---------------------------------------------------------------- one run, in its thread

    def _run(self, query: Query, ticket: Ticket, tell: Callable[[Step], None]) -> Asked:
        with self.models.use(
            query.model, ticket, waiting=lambda before: tell(Step(stage="waiting", before=before)),
            loading=lambda: tell(Step(stage="loading")),
        ) as vlm:  # fmt: skip
            question = vlm.question(query.question, **query.media)
            plans = self._plans(vlm, query, question)
            variants = dict(zip(["dense", *plans], [None, *query.methods], strict=True))
            said: dict[str, str] = {}
            answers: dict[str, Answer] = {}
            for name, method in variants.items():
                vlm.use(method)
                self._warm_up(vlm, query, question, method, lambda name=name: tell(Step(stage="warming up", variant=name, texts=dict(said))))  # type: ignore[misc]  # fmt: skip
                said[name] = ""
                tell(Step(stage="answering", variant=name, texts=dict(said)))
                answers[name] = self._streamed(vlm, query, question, ticket, said, name, tell)
            tell(Step(stage="measuring", texts=dict(said)))
            times = self._measured(vlm, query, question, variants, answers, ticket)
            return self._result(vlm, query, question, variants, answers, times, plans)

    def _streamed(
        self, vlm: VisionLanguageModel, query: Query, question: Question, ticket: Ticket, said: dict[str, str], name: str,
        tell: Callable[[Step], None],
    ) -> Answer:  # fmt: skip
        """One answer, told as it grows. Raises Cancelled where the ticket says so."""
        from mmeff.pipelines import Cancelled

        with vlm.stream(question, new_tokens=query.new_tokens) as stream:
            for piece in stream:
                said[name] += piece
                tell(Step(stage="answering", variant=name, texts=dict(said)))
                if ticket.cancelled():
                    raise Cancelled(f"cancelled while {name} was answering")
            answer = stream.result()
        if ticket.cancelled():
            raise Cancelled(f"cancelled after {name} had answered")
        said[name] = answer.text
        return answer

    def _warm_up(self, vlm: Any, query: Query, question: Question, method: Any, tell: Callable[[], None]) -> None:
        """One token, untimed, the first time that a model meets a method and a number of pictures: kernels are built there."""
        shapes = tuple(p.size for p in question.pictures) or tuple(v.frames.shape for v in question.videos)
        key = (query.model, method, shapes)
        if key in self._warm:
            return
        tell()
        vlm.ask(question, new_tokens=1)
        if len(self._warm) > 1000:
            self._warm.clear()
        self._warm.add(key)

    def _measured(
        self, vlm: Any, query: Query, question: Question, variants: Mapping[str, Any], answers: Mapping[str, Answer],
        ticket: Ticket,
    ) -> dict[str, list[dict[str, float]]]:  # fmt: skip
        """The phases of every round: those of the streamed answers where repeating them would take long, else of alternating
        runs, as many as the time allows."""
        if sum(answer.seconds["total"] for answer in answers.values()) > BUDGET / 2:
            return {name: [_phases(answer)] for name, answer in answers.items()}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        began = time.perf_counter()
        for turn in range(ROUNDS):
            for name in list(variants)[:: -1 if turn % 2 else 1]:
                vlm.use(variants[name])
                answer = vlm.ask(question, new_tokens=query.new_tokens, cancel=ticket.cancelled)
                found[name].append(_phases(answer))
            if time.perf_counter() - began > BUDGET:
                break
        return found

    def _plans(self, vlm: Any, query: Query, question: Question) -> dict[str, Plan]:
        import mmeff

        sizes: dict[str, Any] = {"text_tokens": max(1, len(vlm.processor.tokenizer(question.text)["input_ids"]))}
        if question.videos:
            frames = question.videos[0].frames
            sizes |= {"frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]}
        else:
            width, height = question.pictures[0].size
            sizes |= {"images": len(question.pictures), "height": height, "width": width}
        names = variant_names(query.methods)
        return {
            name: mmeff.plan(vlm.model, method, new_tokens=query.new_tokens, **sizes)
            for name, method in zip(names, query.methods, strict=True)
        }

    def _result(
        self, vlm: Any, query: Query, question: Question, variants: Mapping[str, Any], answers: Mapping[str, Answer],
        times: Mapping[str, list[dict[str, float]]], plans: dict[str, Plan],
    ) -> Asked:  # fmt: skip
        reports = {name: answer.reports[0] for name, answer in answers.items() if answer.reports}
        replies = tuple(_reply(name, answer, times, reports, plans.get(name)) for name, answer in answers.items())
        seen = _seen(question, vlm.model)
        run = self.runs.new()
        run.data["kept"] = {name: _Kept.of(report) for name, report in reports.items()}
        run.data["seen"] = seen
        run.data["methods"] = dict(variants)
        run.data["replies"] = {reply.name: reply for reply in replies}
        run.data["model"] = query.model
        self.runs.settle(run)
        moments = query.video.timestamps if query.video is not None else ()
        return Asked(
            run=run, model=query.model, note=str(getattr(vlm.model, "mmeff_note", "")), question=query.question, replies=replies,
            plans=plans, layers=int(vlm.model.config.get_text_config().num_hidden_layers), pictures=len(seen),
            stages={name: tuple(report.kept) for name, report in reports.items()}, rounds=len(times["dense"]),
            unknown=_unknown(vlm.processor.tokenizer, question.text), frames=tuple(f"{t:.1f} s" for t in moments),
        )  # fmt: skip

    # ---------------------------------------------------------------- looking at a result

    def kept(self, run: str, variant: str, layer: int, picture: int) -> tuple[Image, Image, str]:
        """What the model saw of one picture, the same with the tokens that are gone at a layer darkened, and words.

        Raises: ValueError for a run that is not kept, or a variant, layer or picture that it does not have.
        """
        seen, kept = self._looked(run, variant, layer)
        if not 0 <= picture < len(seen):
            raise ValueError(f"picture must be in [0, {len(seen) - 1}], got {picture}")
        overlay, words = kept.overlay(seen, picture, layer)
        return seen[picture], overlay, words

    def strip(self, run: str, variant: str, layer: int) -> list[tuple[Image, str]]:
        """Every picture of a run with what is left of it at a layer, and words; as `kept`."""
        seen, kept = self._looked(run, variant, layer)
        return [kept.overlay(seen, picture, layer) for picture in range(len(seen))]

    def _looked(self, run: str, variant: str, layer: int) -> tuple[list[Image], _Kept]:
        data = self.runs.get(run).data
        kept = data.get("kept", {}).get(variant)
        if kept is None:
            raise ValueError(
                f"variant must be one of {', '.join(data.get('kept', {})) or 'none'}, got {str(variant)[:80]!r}"
            )
        if type(layer) is not int or layer < 0:
            raise ValueError(f"layer must be a whole number from 0 on, got {layer!r}")
        return data["seen"], kept

    def curve(self, run: str, variant: str) -> tuple[list[Figure], str, float | None]:
        """What is known of a model's accuracy against tokens: the figures, the name of the method's curve among them, and the
        mean over layers that this run kept. No figures where nothing was measured."""
        data = self.runs.get(run).data
        reply: Reply | None = data.get("replies", {}).get(variant)
        if reply is None:
            raise ValueError(f"variant must be one of {', '.join(data.get('replies', {}))}, got {str(variant)[:80]!r}")
        figures: list[Figure] = []
        if self.models.offer(data["model"]).embedded:
            figures = self._results().select(
                topic=f"pruning-{data['model']}", metric="exact match, %", cases=[ALL_KINDS]
            )
        return figures, curve_name(data["methods"][variant]), reply.mean


# ---------------------------------------------------------------- parts


class _Kept:
    """Which tokens of one prompt stay from each stage on, and where all of them lie."""

    def __init__(self, stages: Mapping[int, np.ndarray], places: TokenPlaces | None) -> None:
        self.stages = dict(sorted(stages.items()))
        self.places = places

    @classmethod
    def of(cls, report: Report) -> _Kept:
        places = report.places
        if places is not None:
            places = TokenPlaces(*(np.asarray(x[0].cpu()) for x in (places.picture, places.box, places.tile)))
        return cls({layer: np.asarray(kept[0].cpu()) for layer, kept in report.kept.items()}, places)

    def overlay(self, seen: list[Image], number: int, layer: int) -> tuple[Image, str]:
        """A picture with what is dropped at a layer darkened, and how many of its tokens are left there.

        Raises: ValueError where no token's place is known.
        """
        from mmeff.evaluation.pictures import kept_overlay

        if self.places is None or not np.isfinite(self.places.box).all(-1).any():
            raise ValueError("where this model's tokens lie in the picture cannot be told, so there is nothing to draw")
        pictures = int(self.places.picture.max()) + 1
        mine = self.places.picture == number * pictures // len(seen)
        if (mine & self.places.tile).any():
            mine &= self.places.tile  # of a picture that is also seen whole, what its finer tokens keep
        stays = np.ones(len(mine), bool)
        for stage, kept in self.stages.items():
            if stage <= layer:
                stays = np.isin(np.arange(len(mine)), kept)
        placed = mine & stays & np.isfinite(self.places.box).all(-1)
        words = f"{int((mine & stays).sum())} of {int(mine.sum())} tokens"
        return kept_overlay(seen[number], self.places.box[placed], min_height=192), words


def _seen(question: Question, model: Any) -> list[Image]:
    """The pictures, or the frames, as the model was shown them, none larger than a page needs."""
    from PIL import Image as Pictures

    from mmeff.evaluation.compare_vlm_page import as_seen

    frames = [Pictures.fromarray(frame) for video in question.videos for frame in video.frames]
    found = []
    for picture in [*question.pictures, *frames]:
        shown = as_seen(picture, model).convert("RGB").copy()
        shown.thumbnail((MOST_SHOWN, MOST_SHOWN))
        found.append(shown)
    return found


def _phases(answer: Answer) -> dict[str, float]:
    selection = answer.reports[0].seconds.get("selection", 0.0) if answer.reports else 0.0
    return {**answer.seconds, "selection": selection}


def _reply(
    name: str, answer: Answer, times: Mapping[str, list[dict[str, float]]], reports: Mapping[str, Report], plan: Plan | None
) -> Reply:  # fmt: skip
    def median(phase: str) -> float:
        return statistics.median(turn[phase] for turn in times[name])

    def speedup(phase: str) -> float:
        pairs = zip(times["dense"], times[name], strict=True)
        return statistics.median(dense[phase] / ours[phase] for dense, ours in pairs)

    shared: dict[str, Any] = {
        "name": name, "text": answer.text, "tokens": answer.tokens, "prefill": median("prefill"), "decode": median("decode"),
        "total": median("total"),
    }  # fmt: skip
    if plan is None:
        counted = next(iter(reports.values())).tokens if reports else {}
        visual = counted.get("visual tokens per prompt")
        return Reply(**shared, visual=visual, last=visual, mean=visual, operations=1.0,
                     cache_kib=counted.get("cache of the prompt, dense, KiB"))  # fmt: skip
    report = reports[name]
    counted = report.tokens
    return Reply(
        **shared, selection=median("selection"), visual=counted.get("visual tokens per prompt"), last=counted.get("kept at last"),
        mean=counted.get("mean over layers"), operations=counted.get("prefill operations, of dense"),
        cache_kib=counted.get("cache of the prompt, KiB"), prefill_speedup=speedup("prefill"), total_speedup=speedup("total"),
        predicted=plan.predicted_speedup, report=str(report),
        remarks=(*report.remarks, *(f"{count} calls ran dense: {reason}" for reason, count in report.fallbacks.items())),
    )  # fmt: skip


def _unknown(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The words that the tokenizer has no token for."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return ()
    words = dict.fromkeys(text.split())
    return tuple(w for w in words if unknown in tokenizer(w, add_special_tokens=False)["input_ids"])


def curve_name(method: MethodConfig | None) -> str:
    """The name of a method's curve in the rows of `python -m benchmarks pruning`."""
    if method is None:
        return "dense"
    fields, name = method.to_dict(), type(method).__name__
    if name == "RandomPruning":
        return "random" if not fields["layer"] else f"random, layer {fields['layer']}"
    if name == "Debiased":
        return f"Debiased {type(getattr(method, 'inner', None)).__name__}"
    return f"{name}+" if name == "SparseVLM" and fields["version"] == "v2" else name
