"""The report page: complete in itself, well-formed, safe with any text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmeff import video_io
from mmeff.errors import MediaError
from mmeff.evaluation import metrics, pictures
from mmeff.evaluation.page import Figure, Listing, Section, Table, Videos, format_cell, is_numeric, write_page

VOID = {"meta", "img", "br", "hr", "link", "input", "source"}
HOSTILE = '</p><script>alert("x")</script> & \'quotes\' "onload=alert(1) `<b>code</b>`'


class Page(HTMLParser):
    """Elements, attributes and text of a page; complains about tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], {}
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def clips(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    return [video_io.write(tmp_path / f"{name}.mp4", frames) for name in ("dense", "fast")]


def write(tmp_path, **given):
    arguments = {"title": "A run", "environment": {"python": "3.11"}, "sections": [Section(heading="One")], **given}
    file = write_page(tmp_path / "report.html", **arguments)
    html = file.read_text("utf-8")
    return Page(html), html


def full(clips):
    return [
        Section(
            heading="Numbers",
            paragraphs=["Some `code` here."],
            notes=["A note."],
            tables=[Table(columns=["variant", "speedup"], rows=[["dense", 1], ["fast", 1.42]], caption="c", note="n")],
        ),
        Section(
            heading="Clips", videos=[Videos(paths=clips, labels=["dense", "fast"], caption="v"), Videos(paths=clips[0])]
        ),
        Section(
            heading="Numbers",
            figures=[
                Figure(image=Image.new("RGB", (30, 20)), alt="black", caption="f"),
                Figure(image=pictures.density_map(np.eye(4)), alt="a diagonal"),
            ],
            listings=[Listing(title="Config", text="a: 1\n  b: 2")],
        ),
    ]


def test_the_page_is_whole_and_fetches_nothing(tmp_path, clips):
    page, html = write(tmp_path, sections=full(clips), subtitle="s", notes=["tiny"], highlights=[("1.4x", "faster")])
    for tag, attrs in page.tags:
        for name in ("src", "href", "poster", "action", "srcset", "data"):
            value = attrs.get(name, "#")
            assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html).replace("// Videos", "")
    )
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert not page.all("link") and all("src" not in a for a in page.all("script"))


def test_media_are_embedded_byte_by_byte(tmp_path, clips):
    page, _ = write(tmp_path, sections=full(clips))
    videos = page.all("video")
    assert len(videos) == 3
    for attrs, file in zip(videos, [*clips, clips[0]], strict=True):
        kind, content = attrs["src"].split(";base64,")
        assert kind == "data:video/mp4" and base64.b64decode(content) == file.read_bytes()
        assert {"controls", "loop", "muted", "playsinline"} <= set(attrs) and "autoplay" not in attrs
        assert attrs["aria-label"]
    png = base64.b64decode(page.all("img")[0]["src"].split(",")[1])
    assert png.startswith(b"\x89PNG")


def test_only_paired_videos_play_together(tmp_path, clips):
    page, _ = write(tmp_path, sections=full(clips))
    groups = [a["class"] for a in page.all("div") if a.get("class", "").startswith("players")]
    assert groups == ["players together", "players one"]


def test_charts_are_shown_at_their_physical_size(tmp_path, clips):
    chart = pictures.density_map(np.eye(4))
    chart.save(tmp_path / "chart.png", dpi=chart.info["dpi"])
    figures = [Figure(image=chart, alt="a"), Figure(image=tmp_path / "chart.png", alt="a")]
    page, _ = write(tmp_path, sections=[Section(heading="h", figures=figures)])
    for attrs in page.all("img"):
        assert int(attrs["width"]) == pytest.approx(chart.width * 96 / pictures.DPI, abs=1)
    small = Page(write(tmp_path, sections=full(clips))[1]).all("img")[0]
    assert (small["width"], small["height"]) == ("30", "20")


def test_tables_are_accessible_and_numbers_stand_right(tmp_path):
    table = Table(
        columns=["variant", "speedup", "PSNR", "blocks", "nothing"],
        rows=[
            ["dense", 1, "identical", "8x8", None],
            ["fast", 1.4234, None, "4x4", None],
            ["slow", 0.93, None, "2x2", None],
        ],
    )
    assert table.numeric == [False, True, False, False, False]
    assert [row[1] for row in table.cells] == ["1.000", "1.423", "0.930"]
    page, _ = write(tmp_path, sections=[Section(heading="h", tables=[table])])
    heads = page.all("th")
    assert [a["scope"] for a in heads] == ["col"] * 5 + ["row"] * 3
    assert ["num" in a.get("class", "") for a in heads[:5]] == table.numeric
    assert len([a for a in page.all("td") if a.get("class") == "num"]) == 3
    region = next(a for a in page.all("div") if a.get("class") == "table")
    assert region["role"] == "region" and region["aria-label"] == "h" and region["tabindex"] == "0"


def test_metrics_go_into_cells(tmp_path):
    a, b = np.zeros((2, 16, 16, 3)), np.full((2, 16, 16, 3), 0.1)
    rows = [
        ["dense", metrics.psnr(a, a), metrics.latency([1.0, 1.1])],
        ["fast", metrics.psnr(a, b), metrics.latency([0.8, 0.9])],
    ]
    table = Table(columns=["variant", "PSNR", "latency"], rows=rows)
    assert table.numeric == [False, True, True]
    assert [r[1] for r in table.cells] == ["identical", "20.00 dB"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"), (float("nan"), "\u2013"), (float("inf"), "∞"), (True, "yes"), (np.False_, "no"),
        (1234567, "1\u202f234\u202f567"), (-3, "\u22123"), (0.123456, "0.1235"), (12345.6, "12\u202f346"), (0.0, "0"),
        (np.float32(0.5), "0.5"), (1.5e-7, "1.5e\u221207"), ("text", "text"),
    ],
)  # fmt: skip
def test_cells(value, text):
    assert format_cell(value) == text


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ([1.0, 0.9, 12], ["1.000", "0.900", "12.000"]),
        ([24.3, 31.25], ["24.3", "31.2"]),
        ([0.0, 0.05], ["0.0000", "0.0500"]),
        ([2, 30], ["2", "30"]),
        ([1.0, 1e-7], ["1", "1e\u221207"]),
        ([0.5, None, "n/a"], ["0.500", "\u2013", "n/a"]),
    ],
)
def test_numbers_of_a_column_share_their_decimals(column, text):
    assert [row[0] for row in Table(columns=["x"], rows=[[v] for v in column]).cells] == text


def test_what_counts_as_a_number():
    for text in (
        "12",
        "-3.5",
        "1.42x",
        "1.42\u00d7",
        "24.3 dB",
        "0.87 ± 0.02",
        "95 %",
        "95%",
        "1.2 GiB",
        "12 ms",
        "1\u202f234",
    ):
        assert is_numeric(text), text
    for text in ("", "8x8", "2 of 3", "dense", "12 layers", "-", "v1.2.3a", True):
        assert not is_numeric(text), text


def test_hostile_text_stays_text(tmp_path, clips):
    section = Section(
        heading=HOSTILE,
        paragraphs=[HOSTILE],
        notes=[HOSTILE],
        tables=[Table(columns=[HOSTILE], rows=[[HOSTILE]], caption=HOSTILE, note=HOSTILE)],
        videos=[Videos(paths=clips, labels=[HOSTILE] * 2, caption=HOSTILE)],
        figures=[Figure(image=Image.new("RGB", (9, 9)), alt=HOSTILE, caption=HOSTILE)],
        listings=[Listing(title=HOSTILE, text=HOSTILE)],
    )
    page, html = write(
        tmp_path, title=HOSTILE, subtitle=HOSTILE, notes=[HOSTILE], highlights=[(HOSTILE, HOSTILE)],
        environment={HOSTILE: HOSTILE}, sections=[section] * 3,
    )  # fmt: skip
    assert len(page.all("script")) == 1 and html.count("<script") == 1
    assert all(not any(name.startswith("on") for name in attrs) for _, attrs in page.tags)
    assert page.all("img")[0]["alt"] == HOSTILE
    assert html.count("alert(&#34;x&#34;)") > 20
    plain, _ = write(tmp_path)
    assert {tag for tag, _ in page.tags} - {"code"} >= {tag for tag, _ in plain.tags}
    assert page.text["code"][0] == "<b>code</b>"  # backticks still work, on escaped text


def test_anchors_are_distinct_and_the_contents_lead_to_them(tmp_path, clips):
    page, _ = write(tmp_path, sections=full(clips))
    ids = [a["id"] for a in page.all("section")]
    assert ids == ["s-numbers", "s-clips", "s-numbers-2"]
    links = [a["href"] for a in page.all("a")]
    assert [f"#{i}" for i in ids] == links[1:] and links[0] == "#content"
    all_ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(all_ids) == len(set(all_ids))
    assert not write(tmp_path, sections=full(clips)[:2])[0].all("nav")


def test_language_title_and_small_screens(tmp_path):
    page, html = write(tmp_path)
    assert page.all("html")[0]["lang"] == "en" and page.text["title"] == ["A run"]
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    assert "prefers-color-scheme: dark" in html
    assert len(page.all("h1")) == 1 and len(page.all("main")) == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"figures": [Figure(image="none.png", alt="a")]}, "the image none.png of the page does not exist"),
        ({"videos": [Videos(paths="none.mp4")]}, "the video none.mp4 of the page does not exist"),
        ({"videos": [Videos(paths="clip.avi")]}, "a page can play .*got clip.avi; write it with mmeff.video_io.write"),
    ],
)
def test_missing_media_leave_no_page(tmp_path, section, message):
    with pytest.raises(MediaError, match=message):
        write_page(tmp_path / "r.html", title="t", environment={}, sections=[Section(heading="h", **section)])
    assert list(tmp_path.iterdir()) == []


def test_images_of_the_wrong_kind(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.bmp")
    for name, message in (
        ("a.png", "a.png cannot be read as an image"),
        ("b.bmp", "png, jpeg, webp and gif, got image/bmp"),
    ):
        with pytest.raises(MediaError, match=message):
            write(tmp_path, sections=[Section(heading="h", figures=[Figure(image=tmp_path / name, alt="a")])])


def test_wrong_descriptions():
    with pytest.raises(ValueError, match=r"must have 2 cells \['a', 'b'\], got \[1\]"):
        Table(columns=["a", "b"], rows=[[1]])
    with pytest.raises(ValueError, match="alt must say what the figure shows"):
        Figure(image="x.png", alt=" ")
    with pytest.raises(ValueError, match="got 2 paths and 1 labels"):
        Videos(paths=["a.mp4", "b.mp4"], labels=["a"])
    with pytest.raises(ValueError, match="got 0 paths"):
        Videos(paths=[])


def test_an_unwritable_place_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write .*r\.html: .*nowhere does not exist"):
        write_page(tmp_path / "nowhere" / "r.html", title="t", environment={}, sections=[])
