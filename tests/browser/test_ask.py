"""The tab Ask in a real browser, on the embedded models."""

from __future__ import annotations

import re

import pytest
from browsing import PHONE, SLOW
from playwright.sync_api import expect

from demos.tab_ask import sample

expect.set_options(timeout=SLOW)


def planned(page):
    page.locator("#ask-plan .mm-plan").first.wait_for()
    return page


def ask(page):
    page.locator("#ask-go").click()
    page.locator("#ask-table tbody tr").nth(1).wait_for()
    expect(page.locator("#ask-go")).to_be_enabled()


def said(page):
    return {
        card.locator("h4").inner_text(): card.locator("p").inner_text()
        for card in page.locator("#ask-answers .mm-answer").all()
    }


def slide(page, name, value):
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_a_picture_is_asked_dense_and_pruned(open_page, screenshot):
    page = planned(open_page("Ask"))
    expect(page.locator("#ask-banner")).to_contain_text("tiny model trained in this project")
    expect(page.locator("#ask-plan")).to_contain_text("36 from layer 2 on")
    ask(page)
    assert said(page) == {"dense": "white", "fastv": "white"}
    rows = [
        [cell.inner_text() for cell in row.locator("th, td").all()] for row in page.locator("#ask-table tbody tr").all()
    ]
    assert [row[:3] for row in rows] == [["dense", "144", "144"], ["fastv", "36", "72"]]
    expect(page.locator("#ask-table")).to_contain_text(re.compile(r"cores.*torch", re.DOTALL))

    words = page.locator("#ask-words")
    expect(words).to_contain_text("36 of 144 tokens")
    slide(page, "ask-layer", 1)
    expect(words).to_contain_text("144 of 144 tokens")
    slide(page, "ask-layer", 4)
    expect(words).to_contain_text("36 of 144 tokens")
    expect(page.locator("#ask-slider img").first).to_be_visible()
    expect(page.locator("#ask-curve svg").locator("visible=true")).to_contain_text("this run: 72 tokens")
    page.wait_for_timeout(500)
    screenshot(page, "ask", full_page=True)


def test_a_clip_is_asked_on_a_phone_in_the_dark(open_page):
    page = open_page("Ask", **PHONE, color_scheme="dark")
    page.get_by_label("a clip").check()
    expect(page.locator("#ask-question textarea")).to_have_value("which way does the yellow square move ?")
    expect(page.locator("#ask-plan")).to_contain_text("72 from layer 2 on")
    ask(page)
    assert said(page) == {"dense": "up", "fastv": "up"}
    figures = page.locator("#ask-strip figure")
    expect(figures).to_have_count(8)
    before = page.locator("#ask-words").inner_text()
    slide(page, "ask-frame", 5)
    expect(page.locator("#ask-words")).not_to_have_text(before)
    expect(page.locator("#ask-words")).to_contain_text("frame 5")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_methods_fields_and_an_example(open_page):
    page = planned(open_page("Ask"))
    page.locator("#ask-pictures").get_by_text("where is the yellow circle ?").click()
    expect(page.locator("#ask-question textarea")).to_have_value("where is the yellow circle ?")
    page.get_by_label("DivPrune", exact=True).check()
    page.get_by_role("button", name="FastV settings").click()
    page.locator("label", has_text="keep (fraction").locator("visible=true").locator("input, textarea").first.fill("12")
    expect(page.locator("#ask-plan")).to_contain_text("12 from layer 2 on")
    ask(page)
    assert list(said(page)) == ["dense", "divprune", "fastv"] and said(page)["dense"] == "top right"
    page.locator("#ask-variant").get_by_label("fastv").check()
    expect(page.locator("#ask-words")).to_contain_text("12 of 144 tokens")


def test_html_in_a_question_is_text_and_unknown_words_are_named(open_page):
    page = planned(open_page("Ask"))
    page.locator("#ask-question textarea").fill('what color is the <img src=x onerror="alert(1)"> cross ?')
    ask(page)
    expect(page.locator("#ask-answers .mm-hint")).to_contain_text("<img")
    assert page.locator("#ask-table img, #ask-answers img").count() == 0


def test_what_cannot_run_is_said_before_and_after_asking(open_page, tmp_path):
    page = planned(open_page("Ask"))
    page.locator("#ask-question textarea").fill("")
    expect(page.locator("#ask-plan .mm-error")).to_contain_text("the question is empty")
    page.locator("#ask-go").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("the question is empty")
    expect(page.locator("#ask-go")).to_be_enabled()
    page.locator("#ask-question textarea").fill("what color is the cross ?")
    ask(page)


@pytest.mark.parametrize(("content", "message"), [(b"no picture at all", "picture"), (b"", "empty")])
def test_a_file_that_is_no_picture_is_a_message(open_page, tmp_path, content, message):
    page = planned(open_page("Ask"))
    file = tmp_path / "fake.png"
    file.write_bytes(content)
    page.locator("#ask-image").get_by_label("Remove Image").click()
    page.locator("#ask-image input[type=file]").set_input_files(file)
    expect(page.locator("#ask-plan .mm-error")).to_contain_text(message)
    assert str(tmp_path) not in page.locator("#ask-plan").inner_text()


def test_cancelling_leaves_the_page_usable(open_page, server):
    page = planned(open_page("Ask"))
    turns = server.service.turns
    with turns.admit("somebody else") as ticket, turns.turn(ticket):
        page.locator("#ask-go").click()
        expect(page.locator("#ask-progress")).to_contain_text("1 run is before yours")
        page.locator("#ask-cancel").click()
        expect(page.locator("#ask-progress")).to_contain_text("Stopped")
    expect(page.locator("#ask-go")).to_be_enabled()
    ask(page)
    assert said(page)["dense"] == "white"


def test_the_same_through_the_api(server, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False, download_files=str(tmp_path))
    found = client.predict("what color is the cross ?", image=handle_file(sample("scene-1.jpg")),
                           methods=[{"method": "fastv", "keep": 0.25}], api_name="/ask")  # fmt: skip
    assert [one["text"] for one in found["answers"]] == ["white", "white"] and found["answers"][1]["last"] == 36
    kept = client.predict(found["run"], "fastv", layer=2, api_name="/kept_tokens")
    assert kept["words"] == "36 of 144 tokens"
    plan = client.predict("which way ?", video=handle_file(sample("clip-1.mp4")), api_name="/plan_answer")
    assert dict(plan["fastv"]["rows"])["visual tokens"] == "288 (8 x 36)"
    documented = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {"/ask", "/plan_answer", "/kept_tokens"} <= documented.keys()
