"""The tab Benchmarks: the committed result rows, filtered and drawn; the machine always stands beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from . import charts, views
from .app import Page
from .results import COLUMNS, Figure, Results, as_csv, table

WIDTHS = [150, 75, 80, 80, 80, 190, 300, 95, 210, 210, 100]  # pixels of the columns, in their order


def build(service: Any, page: Page) -> None:
    """Draw the tab inside the block that is open, and register its endpoints."""
    panel = Panel(service, page)
    panel.draw()
    panel.wire()
    _endpoints(service, page)


class Panel:
    """The tab: its components, and what they do. Rows are read when the tab is first looked at."""

    def __init__(self, service: Any, page: Page) -> None:
        self.service, self.page = service, page

    def draw(self) -> None:
        self.note = gr.HTML(elem_id="benchmarks-note", padding=False, elem_classes="mm-html")
        with gr.Row(elem_classes="mm-panes"):
            with gr.Column(scale=3, min_width=300, elem_classes="mm-left"):
                self.topic = gr.Dropdown([], label="Benchmark", elem_id="benchmarks-topic")
                self.metric = gr.Dropdown([], label="Metric", elem_id="benchmarks-metric")
                self.kind = gr.Radio([], label="Figures that were", elem_id="benchmarks-kind",
                                     info="predictions are a model's estimate; the two are never drawn together")  # fmt: skip
                self.hardware = gr.Dropdown([], label="Machine", elem_id="benchmarks-hardware",
                                            info="one at a time: times of machines do not mix")  # fmt: skip
                self.cases = gr.Dropdown(
                    [], label="Cases and shapes", multiselect=True, elem_id="benchmarks-cases", info="none: all"
                )
                self.methods = gr.Dropdown(
                    [], label="Methods", multiselect=True, elem_id="benchmarks-methods", info="none: all"
                )
                self.download = gr.DownloadButton("Download these rows as CSV", elem_id="benchmarks-csv", size="md")
            with gr.Column(scale=9, min_width=320, elem_classes="mm-right"):
                self.plot = gr.HTML(
                    views.hint("Reading the rows."), elem_id="benchmarks-plot", padding=False, elem_classes="mm-html"
                )
                self.rows = gr.Dataframe(headers=list(COLUMNS), label="Rows", interactive=False, wrap=False, max_height=420,
                                         elem_id="benchmarks-rows", buttons=["fullscreen", "copy"], column_widths=WIDTHS)  # fmt: skip
                self.skipped = gr.HTML(elem_id="benchmarks-skipped", padding=False, elem_classes="mm-html")

    def wire(self) -> None:
        page = self.page
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        chosen = [self.topic, self.kind, self.metric, self.hardware]
        picked = [self.cases, self.methods]
        shown = [self.plot, self.rows, self.download, self.skipped]
        root = gr.context.Context.root_block
        root.load(page.run(self.open), None, [self.note, self.topic], **hidden, **page.quick).then(
            page.run(self.narrow), chosen, [*chosen[1:], *picked], **hidden, **page.quick
        ).then(page.run(self.show), [*chosen, *picked], shown, **hidden, **page.quick)
        for component in chosen:
            component.input(page.run(self.narrow), chosen, [*chosen[1:], *picked], **hidden, **page.quick).then(
                page.run(self.show), [*chosen, *picked], shown, **hidden, **page.quick
            )
        gr.on(
            [component.input for component in picked],
            page.run(self.show),
            [*chosen, *picked],
            shown,
            **hidden,
            **page.quick,
        )

    def open(self) -> tuple[str, Any]:
        """The benchmarks that there are rows of, and what is wrong where there are none."""
        results: Results = self.service.results()
        topics = results.topics
        note = views.error_box(results.note) if results.note else ""
        return note, gr.update(choices=topics, value=topics[0][1] if topics else None)

    def narrow(self, topic: str | None, kind: str | None, metric: str | None, hardware: str | None) -> list[Any]:
        """What can still be chosen, after what is chosen; a choice that is no more is replaced by the first."""
        results: Results = self.service.results()
        if not topic:
            return [gr.update(choices=[], value=None)] * 3 + [gr.update(choices=[], value=[])] * 2
        found: dict[str, str] = {"topic": topic}
        updates = []
        for field, value in (("kind", kind), ("metric", metric), ("hardware", hardware)):
            choices = results.choices(field, **found)
            found[field] = value if value in choices else choices[0]
            updates.append(gr.update(choices=choices, value=found[field]))
        cases = results.choices("case", **found)
        updates.append(gr.update(choices=cases, value=cases[:1] if len(cases) > 1 else []))
        methods = results.choices("method", **found)
        return [*updates, gr.update(choices=methods, value=[])]

    def show(
        self, topic: str | None, kind: str, metric: str, hardware: str, cases: list[str], methods: list[str]
    ) -> list[Any]:
        """The figures as a chart, a table and a file; and what could not be measured."""
        results: Results = self.service.results()
        if not topic:
            return [views.hint("There is nothing to draw."), [], None, ""]
        figures = results.select(
            topic=topic, kind=kind, metric=metric, hardware=hardware, cases=cases or (), methods=methods or ()
        )
        file = self.write(figures, topic)
        return [charts.of_figures(figures, heading=metric), table(figures), file, _skipped(results, topic)]

    def write(self, figures: list[Figure], topic: str) -> str:
        """The figures as a CSV file among those that the page may fetch."""
        from tempfile import mkdtemp

        from .uploads import upload_folder

        Path(upload_folder()).mkdir(parents=True, exist_ok=True)
        path = Path(mkdtemp(dir=upload_folder())) / f"{topic}.csv"
        path.write_text(as_csv(figures), "utf-8")
        return str(path)


def _skipped(results: Results, topic: str) -> str:
    """The rows that say why something could not be measured."""
    found = results.skipped_of(topic)
    if not found:
        return ""
    rows = "".join(f"<tr><th scope='row'>{views.text(s.what)}</th><td>{views.text(s.reason)}</td></tr>" for s in found)
    return f'<div class="mm-result mm-skipped"><details><summary>{len(found)} not measured, and why</summary><table>{rows}</table></details></div>'


def _endpoints(service: Any, page: Page) -> None:
    """The same for programs."""

    def benchmark_rows(
        topic: str = "", kind: str = "", metric: str = "", hardware: str = "", cases: list[str] | None = None,
        methods: list[str] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return committed benchmark figures, each with its machine, spread and date. What is left empty filters nothing.

        Args:
            topic: the name of a results file, such as cpu or pruning-tiny-vlm.
            kind: measured or predicted.
            metric: such as "speedup over sdpa".
            hardware: the machine.
            cases: what was computed.
            methods: with what.
        """
        from dataclasses import asdict

        chosen = {"topic": topic, "kind": kind, "metric": metric, "hardware": hardware}
        found = service.results().select(
            cases=cases or (), methods=methods or (), **{name: value for name, value in chosen.items() if value}
        )
        return [{**asdict(figure), "loss": figure.loss} for figure in found]

    gr.api(page.run(benchmark_rows), api_name="benchmark_rows", **page.quick)
