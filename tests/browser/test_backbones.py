"""The tab Backbones in a real browser: small models with random weights, which the page says."""

from __future__ import annotations

from browsing import PHONE, SLOW
from playwright.sync_api import expect

from demos.tab_ask import sample

expect.set_options(timeout=SLOW)


def choose(page, which, name):
    field = page.locator(f"#backbones-{which} input")
    field.fill(name)
    field.press("Enter")
    field.blur()


def look(page, pixels=64):
    if page.get_by_label("pixels of a side").locator("visible=true").count() == 0:
        page.get_by_role("button", name="Run settings").locator("visible=true").click()
    page.locator("label", has_text="pixels of a side").locator("visible=true").locator("input").first.fill(str(pixels))
    page.locator("#backbones-go").click()
    page.locator("#backbones-result .mm-sight").wait_for()
    expect(page.locator("#backbones-go")).to_be_enabled()


def test_two_models_read_a_digit(open_page, screenshot):
    """The page as it opens: one press, and both embedded models say which digit it is."""
    page = open_page("Backbones")
    expect(page.locator("#backbones-banner")).to_contain_text("Tiny models: digits-biformer, digits-dinat_s")
    page.locator("#backbones-go").click()
    cards = page.locator("#backbones-result section")
    expect(cards).to_have_count(2)
    for i in (0, 1):
        expect(cards.nth(i).locator(".mm-classes li").first).to_contain_text("class 3")
    expect(page.locator("#backbones-go")).to_be_enabled()
    page.wait_for_timeout(500)
    screenshot(page, "backbones", full_page=True)


def test_two_models_look_at_a_picture(open_page):
    page = open_page("Backbones")
    choose(page, "first", "nat_mini")
    expect(page.locator("#backbones-banner")).to_contain_text("Random weights: nat_mini")
    choose(page, "second", "resnet18")
    expect(page.locator("#backbones-banner")).to_contain_text("resnet18")
    look(page, 224)
    cards = page.locator("#backbones-result section")
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("19.98 M")
    expect(cards.nth(0)).to_contain_text("No classes: the weights are random")
    assert cards.nth(0).locator(".mm-strip img").count() == 4 and cards.nth(1).locator(".mm-strip img").count() == 5
    expect(page.locator("#backbones-result .mm-where")).to_contain_text("rounds in which both ran in turn, on")


def test_timm_against_ours_on_a_phone(open_page):
    page = open_page("Backbones", **PHONE, color_scheme="dark")
    for which in ("first", "second"):
        choose(page, which, "maxvit_pico_rw_256")
    page.locator("#backbones-second-how").get_by_label("window attention by mmeff").check()
    look(page)
    expect(page.locator("#backbones-result section").nth(1)).to_contain_text("window attentions by mmeff")
    expect(page.locator("#backbones-result .mm-where")).to_contain_text("of their norm apart")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_unknown_models_are_messages_and_the_page_stays(open_page):
    page = open_page("Backbones")
    choose(page, "first", "nat_minni")
    page.locator("#backbones-go").click()
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("nat_mini")
    expect(page.locator("#backbones-go")).to_be_enabled()
    choose(page, "first", "resnet18")
    choose(page, "second", "resnet10t")
    look(page)


def test_cancelling_leaves_the_page_usable(open_page, server):
    page = open_page("Backbones")
    turns = server.service.turns
    with turns.admit("somebody else") as ticket, turns.turn(ticket):
        page.locator("#backbones-go").click()
        expect(page.locator("#backbones-progress")).to_contain_text("1 run is before yours")
        page.locator("#backbones-cancel").click()
        expect(page.locator("#backbones-progress")).to_contain_text("Stopped")
    expect(page.locator("#backbones-go")).to_be_enabled()


def test_the_same_through_the_api(server):
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False)
    found = client.predict(handle_file(sample("scene-1.jpg")), "resnet18", "resnet10t", size=64, api_name="/backbones")
    assert [one["name"] for one in found["models"]] == ["resnet18", "resnet10t"] and found["rounds"] >= 3
    assert "nat_mini" in client.predict(api_name="/backbone_names")
    rows = client.predict(topic="roofline", kind="predicted", api_name="/benchmark_rows")
    assert rows and all("EPYC" in row["hardware"] and row["kind"] == "predicted" for row in rows)
