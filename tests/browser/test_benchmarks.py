"""The tab Benchmarks in a real browser: filters, charts with their machine, the table, the file."""

from __future__ import annotations

import csv

from browsing import PHONE, SLOW
from playwright.sync_api import expect

expect.set_options(timeout=SLOW)


def opened(open_page, **options):
    page = open_page("Benchmarks", **options)
    page.locator("#benchmarks-plot svg").locator("visible=true").wait_for()
    return page


def choose(page, name, text):
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=text, exact=True).click()


def test_filters_lead_from_the_benchmarks_to_a_chart_with_its_machine(open_page, screenshot):
    page = opened(open_page)
    caption = page.locator("#benchmarks-plot figcaption")
    expect(caption).to_contain_text("EPYC")
    expect(caption).to_contain_text("measured")
    expect(page.locator("#benchmarks-rows")).to_contain_text("native")
    page.wait_for_timeout(500)
    screenshot(page, "benchmarks", full_page=True)

    choose(page, "benchmarks-topic", "Video transformers: speed of attention")
    choose(page, "benchmarks-metric", "speedup of attention")
    expect(caption).to_contain_text("speedup of attention")
    page.locator("#benchmarks-kind").get_by_label("predicted").check()
    expect(caption).to_contain_text("predicted")
    expect(caption).not_to_contain_text("measured")

    with page.expect_download() as fetched:
        page.locator("#benchmarks-csv").click()
    rows = list(csv.DictReader(fetched.value.path().read_text().splitlines()))
    assert {row["kind"] for row in rows} == {"predicted"} and {row["method"] for row in rows} == {
        "radial",
        "gna",
        "rectified",
    }
    assert all("EPYC" in row["hardware"] for row in rows)


def test_what_could_not_run_and_losses_are_shown(open_page):
    page = opened(open_page)
    choose(page, "benchmarks-topic", "Answers about pictures, tokens dropped")
    skipped = page.locator("#benchmarks-skipped")
    skipped.get_by_text("not measured, and why").click()
    expect(skipped).to_contain_text("prunes first before layer 1")
    expect(page.locator("#benchmarks-plot figcaption")).to_contain_text("machine not recorded")


def test_phone_and_dark(open_page):
    page = opened(open_page, **PHONE, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert (
        page.locator("#benchmarks-plot .mm-narrow").is_visible()
        and not page.locator("#benchmarks-plot .mm-wide").is_visible()
    )
    ink = page.locator("#benchmarks-plot .mm-narrow svg text").first.evaluate("node => getComputedStyle(node).fill")
    assert min(int(part) for part in ink.removeprefix("rgb(").rstrip(")").split(",")) > 120, (
        "light letters on a dark ground"
    )
