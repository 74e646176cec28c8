"""The tab Backbones: two vision backbones look at one picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mmeff import tiny
from mmeff.tiny import digit_backbones

from . import views, views_backbones
from .app import Page
from .backbones import SUGGESTED
from .looks import COLOURED, DIRECTIONS, HOW, MOST_BATCH, OURS, PIXELS, STOCK, Look, Sight
from .tab_ask import sample
from .uploads import Uploads

SWIN, MAXVIT = "swin_tiny_patch4_window7_224", "maxvit_tiny_rw_224"
PAIRS = {  # first model and how it runs, second model and how it runs
    "digits, BiFormer against DiNAT": ("digits-biformer", STOCK, "digits-dinat_s", STOCK),
    "NAT against Swin": ("nat_mini", STOCK, SWIN, STOCK),
    "BiFormer against DiNAT": ("biformer_tiny", STOCK, "dinat_mini", STOCK),
    "MaxViT, timm against ours": (MAXVIT, STOCK, MAXVIT, OURS),
    "Swin, timm against ours": (SWIN, STOCK, SWIN, OURS),
}
PICTURES = ("scene-2.png", "scene-1.jpg", "scene-3.png")
DIGITS = ("digit-3.png", "digit-5.png", "digit-8.png")  # handwritten, of those that the embedded models never saw


def shown() -> list[str]:
    """Pictures to try, digits first."""
    folder = tiny.data_folder() / digit_backbones.FOLDER
    return [str(folder / name) for name in DIGITS] + [sample(name) for name in PICTURES]


def build(service: Any, page: Page) -> None:
    """Draw the tab inside the block that is open, and register its endpoints."""
    panel = Panel(service, page)
    panel.draw()
    panel.wire()
    _endpoints(service, page)


class Panel:
    """The tab: its components, and what they do."""

    def __init__(self, service: Any, page: Page) -> None:
        self.service, self.page = service, page
        self.uploads = Uploads(page.settings)

    # ---------------------------------------------------------------- what is on the page

    def draw(self) -> None:
        first = next(iter(PAIRS.values()))
        with gr.Row(elem_classes="mm-panes"):
            with gr.Column(scale=5, min_width=320, elem_classes="mm-left"):
                self.image = gr.Image(shown()[0], label="Picture", type="filepath", height=230,
                                      sources=["upload", "clipboard"], elem_id="backbones-image")  # fmt: skip
                gr.Examples(
                    [[path] for path in shown()],
                    [self.image],
                    label="Pictures to try",
                    elem_id="backbones-pictures",
                )
                self.models, self.hows = [], []
                for which, name, how in (("First", *first[:2]), ("Second", *first[2:])):
                    with gr.Group():
                        self.models.append(gr.Dropdown(
                            list(SUGGESTED), value=name, label=f"{which} model", allow_custom_value=True,
                            info="digits- read digits; any name of timm may be typed; ours are nat, dinat, biformer, focalnet..._iso",
                            elem_id=f"backbones-{which.lower()}",
                        ))  # fmt: skip
                        self.hows.append(
                            gr.Radio(
                                list(HOW),
                                value=how,
                                label=f"{which} model runs",
                                elem_id=f"backbones-{which.lower()}-how",
                            )
                        )
                gr.Examples([list(pair) for pair in PAIRS.values()], [self.models[0], self.hows[0], self.models[1], self.hows[1]],
                            label="Pairs to try", elem_id="backbones-pairs", example_labels=list(PAIRS))  # fmt: skip
                with gr.Accordion("Run settings", open=False, elem_classes="mm-form"), gr.Row(elem_classes="mm-fields"):
                    self.size = gr.Number(0, label="pixels of a side", info=f"{PIXELS[0]} to {PIXELS[1]}; 0: what each model is made for",
                                          precision=0, minimum=0, maximum=PIXELS[1], min_width=150)  # fmt: skip
                    self.batch = gr.Number(1, label="pictures at once", info=f"for the times, at most {MOST_BATCH}; 0 takes none", precision=0,
                                           minimum=0, maximum=MOST_BATCH, min_width=150)  # fmt: skip
                    self.coloured = gr.Dropdown(list(COLOURED), value=DIRECTIONS, label="maps are drawn by", min_width=150,
                                                info="principal components as red, green, blue; or the norm over channels")  # fmt: skip
                with gr.Row(elem_classes="mm-actions"):
                    self.go = gr.Button("Look", variant="primary", elem_id="backbones-go", scale=3, min_width=140)
                    self.stop = gr.Button(
                        "Cancel", interactive=False, elem_id="backbones-cancel", scale=1, min_width=90
                    )
                self.progress = gr.HTML(elem_id="backbones-progress", padding=False, elem_classes="mm-html")
            with gr.Column(scale=7, min_width=320, elem_classes="mm-right"):
                note = self.service.backbones.note((first[0], first[2]))
                self.banner = gr.HTML(
                    views_backbones.banner(note), elem_id="backbones-banner", padding=False, elem_classes="mm-html"
                )
                self.result = gr.HTML(views.hint("Press Look: both models see the picture, then run in turn for the times."),
                                      elem_id="backbones-result", padding=False, elem_classes="mm-html")  # fmt: skip

    # ---------------------------------------------------------------- what happens

    def wire(self) -> None:
        page = self.page
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [model.change for model in self.models],
            page.run(self.warn),
            self.models,
            self.banner,
            queue=False,
            **hidden,
        )
        inputs = [self.image, *self.models, *self.hows, self.size, self.batch, self.coloured]
        outputs = [self.go, self.stop, self.progress, self.result]
        # Files are opened by `Uploads`, which says what is wrong with them.
        self.go.click(
            page.run(self.look), inputs, outputs, trigger_mode="once", preprocess=False, **hidden, **page.concurrency
        )
        self.stop.click(self.cancel, None, None, queue=False, **hidden)

    def warn(self, first: str, second: str) -> str:
        """Whether weights are random."""
        return views_backbones.banner(self.service.backbones.note((str(first), str(second))))

    def look(
        self, request: gr.Request, image: Any, first: str, second: str, how: str, other: str, size: Any, batch: Any, coloured: str
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Let both look: where that is, then both side by side."""
        from mmeff.pipelines import Cancelled

        asked = Look(
            image=self.uploads.image(image, "the picture"), models=(first, second), how=(how, other), size=size, batch=batch,
            coloured=coloured,
        )  # fmt: skip
        asked.check()
        ready = {self.go: gr.update(interactive=True), self.stop: gr.update(interactive=False), self.progress: ""}
        # In every update: of two that come close together, the page may show the later one alone.
        busy = {self.go: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
        yield busy
        try:
            for news in self.service.backbones.run(asked, self.page.user(request)):
                if isinstance(news, Sight):
                    yield {**ready, self.result: views_backbones.sight(news, asked)}
                else:
                    yield {**busy, self.progress: views_backbones.progress(news)}
        except Cancelled as error:
            yield {**ready, self.progress: views.stopped(f"Stopped: {error}.")}
        except Exception:
            yield ready
            raise

    def cancel(self, request: gr.Request) -> None:
        """Stop this visitor's runs before their next forward pass."""
        self.service.cancel(self.page.user(request))


def _endpoints(service: Any, page: Page) -> None:
    """The same for programs."""
    uploads = Uploads(page.settings)

    def backbones(
        request: gr.Request, image: dict[str, Any], first: str = "nat_mini", second: str = "swin_tiny_patch4_window7_224",
        first_how: str = STOCK, second_how: str = STOCK, size: int = 0, batch: int = 1,
    ) -> dict[str, Any]:  # fmt: skip
        """Let two vision backbones look at a picture, and time them in turn.

        Args:
            image: the picture; pass gradio_client.handle_file(path).
            first: a name of timm, or of mmeff.vision_backbones.
            second: the other one.
            first_how: "as timm runs it", or "window attention by mmeff" for MaxViT, Swin, DaViT and GC ViT.
            second_how: the same for the second.
            size: pixels of a side; 0 is what each model is made for.
            batch: pictures at once for the times; 0 takes none.
        Returns:
            for both models parameters, multiply-adds, classes (none where weights are random), shapes of the feature maps, and
            milliseconds as median, 20th and 80th percentile.
        """
        asked = Look(
            image=uploads.image(image, "the picture"), models=(first, second), how=(first_how, second_how), size=size, batch=batch
        )  # fmt: skip
        last: Any = None
        for news in service.backbones.run(asked, page.user(request)):
            last = news
        assert isinstance(last, Sight)  # a run ends with one, or raises
        return last.to_dict()

    def backbone_names() -> list[str]:
        """List every model that /backbones takes, those of mmeff.vision_backbones first."""
        return list(service.backbones.names())

    gr.api(page.run(backbones), api_name="backbones", **page.concurrency)
    gr.api(page.run(backbone_names), api_name="backbone_names", **page.quick)
