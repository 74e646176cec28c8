"""The tab Ask: a question about a picture or a clip, answered dense and with visual tokens dropped, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import charts, pictures, views, views_ask
from .app import EXPECTED, Page, public
from .fields import Form, config_from, methods_of
from .queries import Asked, Query, Step
from .uploads import Uploads

STAGE = "pruning"
FIRST = "fastv"  # the method that is ticked when the page opens
PRESETS: dict[str, dict[str, Any]] = {
    FIRST: {"keep": 0.25},
    "divprune": {"keep": 0.25},
    "randompruning": {"keep": 0.25},
}
PICTURE, CLIP = "a picture", "a clip"
MODELS = {PICTURE: "tiny-vlm", CLIP: "tiny-video-vlm"}  # that a picture and a clip are asked of first
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    PICTURE: (
        ("scene-1.jpg", "what color is the cross ?"), ("scene-2.png", "where is the yellow circle ?"),
        ("scene-3.png", "how many objects are there ?"), ("scene-1.jpg", "is there a white circle ?"),
    ),
    CLIP: (
        ("clip-1.mp4", "which way does the yellow square move ?"), ("clip-2.mp4", "where is the purple cross first ?"),
        ("clip-2.mp4", "what color is the cross ?"),
    ),
}  # fmt: skip
MOST_FRAMES = 32


def build(service: Any, page: Page) -> None:
    """Draw the tab inside the block that is open, and register its endpoints."""
    names = service.models.names("vlm")
    if not names:
        gr.HTML(views.hint(
            "No model that answers questions is offered. Start the demo with one: mmeff demo --model Qwen/Qwen2.5-VL-3B-Instruct"
        ))  # fmt: skip
        return
    _endpoints(service, page)  # first: the page's own functions must not take their names
    panel = Panel(service, page, names)
    panel.draw()
    panel.wire()


def sample(name: str) -> str:
    """A sample file that comes with the library."""
    from mmeff import tiny

    return str(tiny.data_folder() / "samples" / name)


class Panel:
    """The tab: its components, and what they do."""

    def __init__(self, service: Any, page: Page, names: list[str]) -> None:
        self.service, self.page, self.names = service, page, names
        self.uploads = Uploads(page.settings)
        # A method that needs trained weights names them by a path, which visitors may not.
        self.methods = {name: cls for name, cls in methods_of(STAGE).items() if not cls.needs_training}

    # ---------------------------------------------------------------- what is on the page

    def draw(self) -> None:
        first = MODELS[PICTURE] if MODELS[PICTURE] in self.names else self.names[0]
        file, question = EXAMPLES[PICTURE][0]
        self.asked = gr.State(None)  # what of the last result the sliders need
        with gr.Row(elem_classes="mm-panes"):
            with gr.Column(scale=5, min_width=320, elem_classes="mm-left"):
                self.kind = gr.Radio([PICTURE, CLIP], value=PICTURE, label="Ask about", elem_id="ask-kind")
                self.image = gr.Image(sample(file), label="Picture", type="filepath", height=230, sources=["upload", "clipboard"],
                                      elem_id="ask-image")  # fmt: skip
                self.video = gr.Video(sample(EXAMPLES[CLIP][0][0]), label="Clip", height=230, sources=["upload"], visible=False,
                                      loop=True, elem_id="ask-video")  # fmt: skip
                self.question = gr.Textbox(label="Question", value=question, lines=1, max_lines=6, elem_id="ask-question",
                                           max_length=self.page.settings.max_text)  # fmt: skip
                self.pictures = gr.Examples([[sample(f), q] for f, q in EXAMPLES[PICTURE]], [self.image, self.question],
                                            label="Pictures to try", elem_id="ask-pictures")  # fmt: skip
                self.clips = gr.Examples([[sample(f), q] for f, q in EXAMPLES[CLIP]], [self.video, self.question],
                                         label="Clips to try", visible=False, elem_id="ask-clips")  # fmt: skip
                self.model = gr.Dropdown(
                    self.names, value=first, label="Model", interactive=len(self.names) > 1, elem_id="ask-model"
                )
                self.chosen = gr.CheckboxGroup(
                    choices=[(cls.__name__, name) for name, cls in self.methods.items()], value=[FIRST], label="Methods",
                    info=f"each is compared with dense; at most {self.page.settings.max_variants} at a time", elem_id="ask-methods",
                )  # fmt: skip
                self.forms = [Form(cls, PRESETS.get(name), visible=name == FIRST) for name, cls in self.methods.items()]
                with gr.Accordion("Run settings", open=False, elem_classes="mm-form"), gr.Row(elem_classes="mm-fields"):
                    self.new_tokens = gr.Number(16, label="tokens of the answer", info="at most", precision=0, minimum=1,
                                                min_width=150)  # fmt: skip
                    self.frames = gr.Number(8, label="frames of a clip", info="spread over all of it", precision=0, minimum=1,
                                            maximum=MOST_FRAMES, min_width=150)  # fmt: skip
                with gr.Row(elem_classes="mm-actions"):
                    self.go = gr.Button("Ask", variant="primary", elem_id="ask-go", scale=3, min_width=140)
                    self.stop = gr.Button("Cancel", interactive=False, elem_id="ask-cancel", scale=1, min_width=90)
                self.progress = gr.HTML(elem_id="ask-progress", padding=False, elem_classes="mm-html")
            with gr.Column(scale=7, min_width=320, elem_classes="mm-right"):
                self.banner = gr.HTML(
                    views.banner(self.service.asking.note(first)),
                    elem_id="ask-banner",
                    padding=False,
                    elem_classes="mm-html",
                )
                with gr.Accordion("The plan, before anything runs", open=True, elem_classes="mm-planned"):
                    self.plan = gr.HTML(
                        views.hint("The plan appears when the model is loaded."),
                        elem_id="ask-plan",
                        padding=False,
                        elem_classes="mm-html",
                    )
                self.answers = gr.HTML(elem_id="ask-answers", padding=False, elem_classes="mm-html")
                with gr.Column(visible=False, elem_id="ask-result") as self.result:
                    self.table = gr.HTML(elem_id="ask-table", padding=False, elem_classes="mm-html")
                    self._draw_kept()
                    self.curve = gr.HTML(elem_id="ask-curve", padding=False, elem_classes="mm-html")

    def _draw_kept(self) -> None:
        gr.Markdown("### Which tokens stay", elem_classes="mm-heading")
        with gr.Row():
            self.variant = gr.Radio([], label="Of", elem_id="ask-variant", min_width=160)
            self.layer = gr.Slider(0, 1, value=0, step=1, label="Layer of the language model", buttons=[], elem_id="ask-layer",
                                   min_width=200)  # fmt: skip
            self.picture = gr.Slider(0, 1, value=0, step=1, label="Frame", visible=False, buttons=[], elem_id="ask-frame",
                                     min_width=200)  # fmt: skip
        self.words = gr.HTML(elem_id="ask-words", padding=False, elem_classes="mm-html")
        self.slider = gr.ImageSlider(label="Seen, and what is left of it", interactive=False,
                                     type="pil", format="png", buttons=["fullscreen"], elem_id="ask-slider", max_height=420)  # fmt: skip
        self.strip = gr.HTML(elem_id="ask-strip", padding=False, elem_classes="mm-html")

    # ---------------------------------------------------------------- what happens

    def wire(self) -> None:
        page = self.page
        fields = [component for form in self.forms for component in form.components]
        inputs = [
            self.kind,
            self.image,
            self.video,
            self.question,
            self.model,
            self.chosen,
            self.new_tokens,
            self.frames,
            *fields,
        ]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        shown = [self.image, self.video, self.pictures.dataset, self.clips.dataset, self.model, self.question]
        self.kind.input(self.swap, self.kind, shown, queue=False, **hidden)
        self.chosen.change(self.pick, self.chosen, [form.group for form in self.forms], queue=False, **hidden)
        self.model.change(
            lambda model: views.banner(self.service.asking.note(model)), self.model, self.banner, queue=False, **hidden
        )
        seen = (self.image, self.video, self.model, self.question, self.chosen, self.new_tokens, self.frames, *fields)
        unread: dict[str, Any] = {
            **hidden,
            "preprocess": False,
        }  # `Uploads` opens files, and says what is wrong with them
        gr.on([component.change for component in seen], page.run(self.look_ahead), inputs, self.plan, trigger_mode="always_last",
              **unread, **page.quick)  # fmt: skip
        root = gr.context.Context.root_block
        root.load(page.run(self.look_ahead), inputs, self.plan, **unread, **page.quick)

        outputs = [self.go, self.stop, self.progress, self.answers, self.asked, self.result, self.table, self.variant, self.layer,
                   self.picture]  # fmt: skip
        gr.on([self.go.click, self.question.submit], page.run(self.answer), inputs, outputs, trigger_mode="once",
              **unread, **page.concurrency)  # fmt: skip
        self.stop.click(self.cancel, None, None, queue=False, **hidden)

        look = [self.asked, self.variant, self.layer, self.picture]
        gr.on([self.asked.change, self.variant.change, self.layer.change, self.picture.change], page.run(self.kept), look,
              [self.slider, self.words], trigger_mode="always_last", **hidden, **page.quick)  # fmt: skip
        gr.on([self.asked.change, self.variant.change, self.layer.change], page.run(self.every), look[:3], self.strip,
              trigger_mode="always_last", **hidden, **page.quick)  # fmt: skip
        gr.on([self.asked.change, self.variant.change], page.run(self.known), look[:2], self.curve, trigger_mode="always_last",
              **hidden, **page.quick)  # fmt: skip

    def swap(self, kind: str) -> list[Any]:
        """Picture or clip: what is to be seen, the model that suits it, and a question that goes with it."""
        clip = kind == CLIP
        model = MODELS[kind] if MODELS[kind] in self.names else gr.skip()
        return [gr.update(visible=on) for on in (not clip, clip, not clip, clip)] + [model, EXAMPLES[kind][0][1]]

    def pick(self, chosen: list[str]) -> list[Any]:
        """Show the settings of the methods that are ticked."""
        return [gr.update(visible=form.method.name() in chosen) for form in self.forms]

    def query(
        self, kind: str, image: Any, video: Any, question: str, model: str, chosen: Sequence[str], new_tokens: Any, frames: Any,
        *fields: Any,
    ) -> Query:  # fmt: skip
        """What the components ask for.

        Raises: TypeError, ValueError: a field is out of range, or a file cannot be read.
        """
        values, methods = list(fields), []
        for form in self.forms:
            mine, values = values[: len(form.names)], values[len(form.names) :]
            if form.method.name() in (chosen or []):
                methods.append(form.read(mine))
        media = read_media(self.uploads, None if kind == CLIP else image, video if kind == CLIP else None, frames)
        return Query(model=model, question=question, methods=tuple(methods), new_tokens=new_tokens, **media)

    def look_ahead(self, *values: Any) -> str:
        """The plan of what the components ask for, or what keeps it from running."""
        try:
            query = self.query(*values)
            if not query.methods:
                return views.hint("Tick a method, and its plan appears here.")
            return views_ask.plans(self.service.asking.plan(query))
        except EXPECTED as error:
            return views.error_box(public(str(error)))

    def answer(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """The answers as they grow, one variant after the other, then the table; the buttons are ready again however it ends."""
        from mmeff.evaluation.comparison import variant_names
        from mmeff.pipelines import Cancelled

        query = self.query(*values)
        query.check(self.page.settings)
        names = ["dense", *variant_names(query.methods)]
        ready = {self.go: gr.update(interactive=True), self.stop: gr.update(interactive=False), self.progress: ""}
        # In every update: of two that come close together, the page may show the later one alone.
        busy = {
            self.go: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
            self.result: gr.update(visible=False),
        }
        yield {**busy, self.answers: views_ask.talking(names, Step(stage="waiting"))}
        try:
            for news in self.service.asking.run(query, self.page.user(request)):
                if isinstance(news, Asked):
                    yield {**ready, **self.shown(news)}
                else:
                    yield {
                        **busy,
                        self.progress: views_ask.progress(news),
                        self.answers: views_ask.talking(names, news),
                    }
        except Cancelled as error:
            yield {**ready, self.progress: views.stopped(f"Stopped: {error}.")}
        except Exception:
            yield {**ready, self.answers: ""}
            raise

    def shown(self, found: Asked) -> dict[Any, Any]:
        """A result on the page."""
        others = list(found.stages)
        clip = found.pictures > 1
        stages = [layer for layers in found.stages.values() for layer in layers]
        state = {"run": found.run.name, "layers": found.layers, "frames": found.frames}
        return {
            self.answers: views_ask.answers(found),
            self.asked: state,
            self.result: gr.update(visible=True),
            self.table: views_ask.table(found),
            self.variant: gr.update(choices=others, value=others[0]),
            self.layer: gr.update(maximum=found.layers - 1, value=max(stages, default=0)),
            self.picture: gr.update(maximum=max(found.pictures - 1, 1), value=0, visible=clip),
        }

    def cancel(self, request: gr.Request) -> None:
        """Stop this visitor's runs after the token that is being made."""
        self.service.cancel(self.page.user(request))

    def kept(self, asked: dict[str, Any] | None, variant: str, layer: float, picture: float) -> tuple[Any, str]:
        """One picture as the model saw it, and what is left of it at a layer."""
        if not asked or not variant:
            return None, ""
        frames = asked["frames"]
        at = int(picture) if len(frames) > 1 else 0
        seen, left, words = self.service.asking.kept(asked["run"], variant, int(layer), at)
        moment = f"frame {at}, {frames[at]}" if len(frames) > 1 else None
        return (seen.resize(left.size, 0), left), views_ask.kept_words(words, int(layer), asked["layers"], moment)

    def every(self, asked: dict[str, Any] | None, variant: str, layer: float) -> str:
        """All frames of a clip with what is left of them at a layer."""
        if not asked or not variant or len(asked["frames"]) < 2:
            return ""
        found = self.service.asking.strip(asked["run"], variant, int(layer))
        frames = zip(found, asked["frames"], strict=True)
        return pictures.strip(
            [(image, f"{moment}: {words}") for (image, words), moment in frames], "All frames at this layer"
        )

    def known(self, asked: dict[str, Any] | None, variant: str) -> str:
        """The accuracy curve of the model, where one was measured."""
        return curve(self.service, asked["run"], variant) if asked and variant else ""


def curve(service: Any, run: str, variant: str) -> str:
    """What is known of the model's accuracy against tokens, with the run marked; a sentence where nothing is."""
    figures, method, tokens = service.asking.curve(run, variant)
    if not figures:
        return views.hint("No accuracy curve is known for this model; `mmeff eval` measures one.")
    if not any(f.method == method for f in figures):
        return charts.answers(figures, method=method, tokens=tokens) + views.hint(
            f"{method} was not measured on this model."
        )
    return charts.answers(figures, method=method, tokens=tokens)


def read_media(uploads: Uploads, image: Any, video: Any, frames: Any) -> dict[str, Any]:
    """The picture and the clip that were given.

    Raises: ValueError: a number of frames out of range; MediaError for a file that cannot be taken.
    """
    if (
        isinstance(frames, bool)
        or not isinstance(frames, int | float)
        or int(frames) != frames
        or not 1 <= frames <= MOST_FRAMES
    ):
        raise ValueError(f"frames of a clip must be a whole number in [1, {MOST_FRAMES}], got {frames!r}")
    return {"image": uploads.image(image), "video": uploads.video(video, "the clip", num_frames=int(frames))}


def _endpoints(service: Any, page: Page) -> None:
    """The same for programs."""
    uploads = Uploads(page.settings)

    def query(
        question: str, image: Any, video: Any, model: str, methods: Any, new_tokens: int, frames: int
    ) -> Query:  # fmt: skip
        if not isinstance(methods, list | tuple):
            raise TypeError(f"methods must be a list of names or mappings, got {type(methods).__name__}")
        media = read_media(uploads, image, video, frames)
        name = model or MODELS[CLIP if media["video"] is not None else PICTURE]
        configs = tuple(config_from(method, STAGE) for method in methods)
        return Query(model=name, question=question, methods=configs, new_tokens=new_tokens, **media)

    def ask(
        request: gr.Request, question: str, image: dict[str, Any] | None = None, video: dict[str, Any] | None = None,
        model: str = "", methods: list[Any] = ["fastv"], new_tokens: int = 16, frames: int = 8,  # noqa: B006
    ) -> dict[str, Any]:  # fmt: skip
        """Ask a question about a picture or a clip, dense and with each method that drops visual tokens.

        Args:
            question: what to answer.
            image: the picture; pass gradio_client.handle_file(path). Or:
            video: the clip; pass gradio_client.handle_file(path).
            model: a name from /models, of kind vlm; empty is the embedded one that suits.
            methods: names, or mappings such as {"method": "fastv", "keep": 0.25}.
            new_tokens: generated at most.
            frames: of a clip, spread over all of it.
        Returns:
            answers with times, tokens, KV memory and operations, the plans, the machine, and run, by which /kept_tokens knows it.
        """
        last: Any = None
        asked = query(question, image, video, model, methods, new_tokens, frames)
        for news in service.asking.run(asked, page.user(request)):
            last = news
        assert isinstance(last, Asked)  # a run ends with one, or raises
        return last.to_dict()

    def plan_answer(
        question: str, image: dict[str, Any] | None = None, video: dict[str, Any] | None = None, model: str = "",
        methods: list[Any] = ["fastv"], new_tokens: int = 16, frames: int = 8,  # noqa: B006
    ) -> dict[str, Any]:  # fmt: skip
        """Say what each method would do to a question, before anything runs: tokens, operations, cache.

        Args:
            question: what to answer.
            image: the picture; pass gradio_client.handle_file(path). Or:
            video: the clip; pass gradio_client.handle_file(path).
            model: a name from /models, of kind vlm; empty is the embedded one that suits.
            methods: names, or mappings such as {"method": "fastv", "keep": 0.25}.
            new_tokens: generated at most.
            frames: of a clip, spread over all of it.
        """
        found = service.asking.plan(query(question, image, video, model, methods, new_tokens, frames))
        return {name: one.to_dict() for name, one in found.items()}

    def kept_tokens(run: str, variant: str, layer: int = 0, picture: int = 0) -> dict[str, Any]:
        """Draw which visual tokens of a picture are left at a layer of the language model.

        Args:
            run: what /ask called its run.
            variant: the name of one of its answers, dense apart.
            layer: of the language model, from 0.
            picture: which picture or frame, from 0.
        Returns:
            image, a PNG file with the tokens that are gone darkened, and words, how many are left.
        """
        _, left, words = service.asking.kept(run, variant, layer, picture)
        kept = service.runs.get(run)
        path = Path(kept.folder) / f"kept-{len(list(kept.folder.iterdir()))}.png"
        left.save(path)
        kept.publish(path)
        return {"image": dict(gr.FileData(path=str(path), orig_name=path.name).model_dump()), "words": words}

    gr.api(page.run(ask), api_name="ask", **page.concurrency)
    gr.api(page.run(plan_answer), api_name="plan_answer", **page.quick)
    gr.api(page.run(kept_tokens), api_name="kept_tokens", **page.quick)
