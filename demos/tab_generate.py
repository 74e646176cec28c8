"""The tabs Generate and Images: a prompt, dense and with methods, from the same noise, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from . import presets, views
from .app import EXPECTED, Page, public
from .fields import Form, methods_of
from .models import Kind
from .uploads import Uploads
from .wishes import Result, Wish

STAGE = "diffusion_attn"
SIZES = {  # of the pipeline call: label, what it is
    "num_inference_steps": ("steps", "denoising steps"),
    "guidance_scale": ("guidance", "how strongly the prompt steers"),
    "height": ("height (pixels)", "most models need a multiple of 16"),
    "width": ("width (pixels)", "most models need a multiple of 16"),
    "num_frames": ("frames", "most models need a multiple of 4, plus 1"),
}
MODEL = 2  # where the model's name is among a run's inputs
HTML: dict[str, Any] = {"padding": False, "elem_classes": "mm-html"}
LOOK_HEIGHT = 320  # pixels that a smaller frame is enlarged to, by a whole factor, for the slider


def build(service: Any, page: Page, kind: Kind = "video") -> None:
    """Draw the tab inside the block that is open.

    Args: kind: "video", or "image" for the tab Images, which has no frames to slide through.
    """
    names = service.models.names(kind)
    if not names:
        gr.HTML(views.hint(
            "No model that makes pictures is offered. Start the demo with one: mmeff demo --model black-forest-labs/FLUX.1-schnell"
            if kind == "image" else
            "No model that makes videos is offered. Start the demo with one: mmeff demo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        ))  # fmt: skip
        return
    panel = Panel(service, page, kind, names)
    panel.draw()
    panel.wire()


class Panel:
    """One tab: its components, and what they do."""

    def __init__(self, service: Any, page: Page, kind: Kind, names: list[str]) -> None:
        self.service, self.page, self.kind, self.names = service, page, kind, names
        self.uploads = Uploads(page.settings)
        self.methods = methods_of(STAGE)
        self.sizes = [name for name in SIZES if kind == "video" or name != "num_frames"]

    # ---------------------------------------------------------------- what is on the page

    def draw(self) -> None:
        first = self.names[0]
        sizes = presets.SIZES.get(first, {})
        self.run_name = gr.State("")
        with gr.Row(elem_classes="mm-panes"):
            with gr.Column(scale=5, min_width=320, elem_classes="mm-left"):
                self.prompt = gr.Textbox(
                    label="Prompt", value=presets.PROMPTS[self.kind][0], lines=2, max_lines=6,
                    max_length=self.page.settings.max_text, elem_id=f"{self.kind}-prompt",
                )  # fmt: skip
                gr.Examples([[text] for text in presets.PROMPTS[self.kind]], [self.prompt], label="Prompts to try")
                self.model = gr.Dropdown(self.names, value=first, label="Model", interactive=len(self.names) > 1)
                self.image = gr.Image(
                    label="First frame, for models that make videos from an image", type="filepath", height=180,
                    sources=["upload", "clipboard"], visible=self.kind == "video" and first not in presets.SIZES,
                )  # fmt: skip
                self.chosen = gr.CheckboxGroup(
                    choices=[(cls.__name__, name) for name, cls in self.methods.items()], value=[presets.FIRST[self.kind]],
                    label="Methods", info=f"each is compared with dense; at most {self.page.settings.max_variants} at a time",
                )  # fmt: skip
                self.forms = [
                    Form(cls, presets.preset(first, name), visible=name == presets.FIRST[self.kind])
                    for name, cls in self.methods.items()
                ]
                with gr.Accordion("Run settings", open=False, elem_classes="mm-form"), gr.Row(elem_classes="mm-fields"):
                    self.seed = gr.Number(0, label="seed", info="of the noise, the same for every variant", precision=0,
                                          minimum=0, min_width=150)  # fmt: skip
                    self.size_fields = [
                        gr.Number(sizes.get(name), label=SIZES[name][0], info=SIZES[name][1] + "; empty: the model's own",
                                  precision=None if name == "guidance_scale" else 0, min_width=150)
                        for name in self.sizes
                    ]  # fmt: skip
                with gr.Row(elem_classes="mm-actions"):
                    self.go = gr.Button(
                        "Generate", variant="primary", elem_id=f"{self.kind}-go", scale=3, min_width=140
                    )
                    self.stop = gr.Button(
                        "Cancel", interactive=False, elem_id=f"{self.kind}-cancel", scale=1, min_width=90
                    )
            with gr.Column(scale=7, min_width=320, elem_classes="mm-right"):
                self.banner = gr.HTML(views.banner(self._note(first)), elem_id=f"{self.kind}-banner", **HTML)
                self.progress = gr.HTML(elem_id=f"{self.kind}-progress", **HTML)
                with gr.Accordion(
                    "The plan, before anything runs", open=True, elem_classes="mm-planned"
                ) as self.planned:
                    self.plan = gr.HTML(
                        views.hint("The plan appears as soon as the model is loaded."),
                        elem_id=f"{self.kind}-plan",
                        **HTML,
                    )
                self.empty = gr.HTML(views.empty(self.kind), **HTML)
                with gr.Column(visible=False, elem_id=f"{self.kind}-result") as self.result:
                    self.player = gr.HTML(**HTML)
                    self.table = gr.HTML(**HTML)
                    self._draw_look()

    def _draw_look(self) -> None:
        chart: dict[str, Any] = {
            "interactive": False, "format": "png", "buttons": ["fullscreen", "download"], "show_label": False,
            "elem_classes": "mm-chart",
        }  # fmt: skip
        what = "Frame by frame" if self.kind == "video" else "Pixel by pixel"
        gr.Markdown(
            f"### {what}\nDrag the handle of the first picture: dense is left of it, the method right. Beside it, where the two differ.",
            elem_classes="mm-heading",
        )
        with gr.Row():
            self.variant = gr.Radio([], label="Dense against", elem_id=f"{self.kind}-variant", min_width=160)
            self.frame = gr.Slider(0, 1, value=0, step=1, label="Frame", visible=self.kind == "video", min_width=200,
                                   elem_id=f"{self.kind}-frame", buttons=[])  # fmt: skip
        with gr.Row():
            self.slider = gr.ImageSlider(label="Dense left of the handle, accelerated right", interactive=False, type="numpy",
                                         show_label=False, format="png", buttons=["fullscreen"], elem_id=f"{self.kind}-slider", min_width=260)  # fmt: skip
            self.heat = gr.Image(
                **chart, elem_id=f"{self.kind}-heat", min_width=260, alt_text="Where the frames differ"
            )
        self.schedule = gr.Image(**chart, elem_id=f"{self.kind}-schedule", alt_text="Density by layer and step")

    def _note(self, model: str) -> str:
        if model not in presets.SIZES:
            return ""
        from mmeff.tiny import NOTE

        return NOTE

    # ---------------------------------------------------------------- what happens

    def wire(self) -> None:
        page = self.page
        fields = [component for form in self.forms for component in form.components]
        inputs = [self.prompt, self.image, self.model, self.chosen, self.seed, *self.size_fields, *fields]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.chosen.change(self.pick, self.chosen, [form.group for form in self.forms], **hidden, queue=False)
        changed = [component.change for component in (self.chosen, *self.size_fields, *fields)]
        gr.on(
            changed,
            page.run(self.look_ahead),
            inputs,
            [self.plan, self.planned, self.banner],
            trigger_mode="always_last",
            **hidden,
            **page.quick,
        )
        self.model.change(
            self.switch, self.model, [self.banner, self.image, *self.size_fields, *fields], **hidden, queue=False
        ).then(page.run(self.look_ahead), inputs, [self.plan, self.planned, self.banner], **hidden, **page.quick)
        root = gr.context.Context.root_block
        root.load(page.run(self.look_ahead), inputs, [self.plan, self.planned, self.banner], **hidden, **page.quick)

        outputs = [self.go, self.stop, self.progress, self.run_name, self.result, self.player, self.table, self.variant, self.frame,
                   self.planned, self.empty, self.slider, self.heat, self.schedule]  # fmt: skip
        runs: dict[str, Any] = {**hidden, **page.concurrency}
        gr.on(
            [self.go.click, self.prompt.submit], page.run(self.generate), inputs, outputs, trigger_mode="once", **runs
        )
        self.stop.click(self.cancel, None, None, queue=False, **hidden)

        # `input` is the visitor's hand alone; what a new result shows comes with it, so that nothing old is drawn over it
        seen = [self.run_name, self.variant, self.frame]
        gr.on([self.variant.input, self.frame.input], page.run(self.compare), seen, [self.slider, self.heat],
              trigger_mode="always_last", **hidden, **page.quick)  # fmt: skip
        self.variant.input(
            page.run(self.map), seen[:2], self.schedule, trigger_mode="always_last", **hidden, **page.quick
        )

    def pick(self, chosen: list[str]) -> list[Any]:
        """Show the settings of the methods that are ticked."""
        return [gr.update(visible=form.method.name() in chosen) for form in self.forms]

    def switch(self, model: str) -> list[Any]:
        """Another model: its banner, its sizes, and fields that suit it."""
        embedded = model in presets.SIZES
        sizes = presets.SIZES.get(model, {})
        values = [value for form in self.forms for value in form.values(presets.preset(model, form.method.name()))]
        shown = gr.update(visible=self.kind == "video" and not embedded, value=None)
        return [views.banner(self._note(model)), shown, *(sizes.get(name) for name in self.sizes), *values]

    def wish(self, prompt: str, image: Any, model: str, chosen: Sequence[str], seed: Any, *rest: Any) -> Wish:
        """What the components ask for.

        Raises: TypeError, ValueError: a field is out of range, or the image cannot be read.
        """
        sizes = {name: value for name, value in zip(self.sizes, rest, strict=False) if value is not None}
        values, methods = list(rest[len(self.sizes) :]), []
        for form in self.forms:
            mine, values = values[: len(form.names)], values[len(form.names) :]
            if form.method.name() in (chosen or []):
                methods.append(form.read(mine))
        picture = self.uploads.image(image, "the first frame") if self.kind == "video" else None
        return Wish(model=model, prompt=prompt, methods=tuple(methods), seed=seed, sizes=sizes, image=picture)

    def look_ahead(self, *values: Any) -> tuple[str, Any, str]:
        """The plan of what the components ask for, or what keeps it from running; and what must be known of the model."""
        note = self._note(values[MODEL])
        try:
            note = self.service.generating.defaults(values[MODEL])["note"]
            wish = self.wish(*values)
            if not wish.methods:
                found = views.hint("Tick a method, and its plan appears here.")
            else:
                found = views.plans(self.service.generating.plan(wish))
        except EXPECTED as error:
            found = views.error_box(public(str(error)))
        return found, gr.update(open=True), views.banner(note)

    def generate(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Run it: a progress card while it runs, then the result; the buttons are ready again however it ends."""
        from mmeff.pipelines import Cancelled

        yield {self.go: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        ready = {self.go: gr.update(interactive=True), self.stop: gr.update(interactive=False), self.progress: ""}
        try:
            for news in self.service.generating.run(self.wish(*values), self.page.user(request)):
                if isinstance(news, Result):
                    yield {**ready, **self.shown(news)}
                else:
                    yield {self.progress: views.progress(news)}
        except Cancelled as error:
            yield {**ready, self.progress: views.stopped(f"Stopped: {error}.")}
        except Exception:
            yield ready
            raise

    def shown(self, result: Result) -> dict[Any, Any]:
        """A result on the page."""
        others, middle = [variant.name for variant in result.variants[1:]], result.frames // 2
        pair, heat = self.compare(result.run.name, others[0], middle)
        return {
            self.run_name: result.run.name,
            self.result: gr.update(visible=True),
            self.planned: gr.update(open=False),
            self.empty: gr.update(visible=False),
            self.player: views.player(result),
            self.table: views.table(result),
            self.variant: gr.update(choices=others, value=others[0]),
            self.frame: gr.update(maximum=max(result.frames - 1, 1), value=middle),
            self.slider: pair,
            self.heat: heat,
            self.schedule: self.map(result.run.name, others[0]),
        }

    def cancel(self, request: gr.Request) -> None:
        """Stop this visitor's runs before their next step."""
        self.service.cancel(self.page.user(request))

    def compare(self, run: str, variant: str, frame: float) -> tuple[tuple[np.ndarray, np.ndarray], Any]:
        """One frame of dense and of a variant, and where they differ."""
        at = int(frame) if self.kind == "video" else 0
        dense, other = self.service.generating.frames(run, variant, at)
        return (enlarged(dense), enlarged(other)), self.service.generating.difference(run, variant, at)

    def map(self, run: str, variant: str) -> Any:
        """Density by layer and step of a variant."""
        return self.service.generating.schedule(run, variant)


def enlarged(frame: np.ndarray) -> np.ndarray:
    """A small frame (H, W, 3) by a whole factor, so that its pixels stay pixels."""
    factor = max(1, -(-LOOK_HEIGHT // frame.shape[0]))
    return frame.repeat(factor, 0).repeat(factor, 1)
