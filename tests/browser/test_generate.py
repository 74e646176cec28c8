"""The tabs Generate and Images in a real browser, end to end on the embedded models."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import yaml
from browsing import PHONE, field, fits, planned, positions, run, settle, shown, table
from playwright.sync_api import expect

from mmeff.pipelines.video_generator import FPS
from mmeff.registry import build
from mmeff.tiny import clips
from mmeff.video_io import read

LONG = 900  # steps, minutes of work: a run that ends before it is stopped shows nothing


def files(page, server, tmp_path, kind="video"):
    """Every file that the result offers, by its name, as the browser fetches it."""
    found = {}
    for link in page.locator(f"#{kind}-result .mm-files a").all():
        answer = page.request.get(server.url + link.get_attribute("href"))
        assert answer.ok
        name = link.get_attribute("href").rsplit("/", 1)[1]
        found[name] = tmp_path / name
        found[name].write_bytes(answer.body())
    return found


def test_a_comparison_from_the_prompt_to_the_files(open_page, server, tmp_path, screenshot):
    page = open_page()
    assert planned(page).count() == 1
    page.get_by_label("GNA", exact=True).first.check()
    expect(page.locator("#video-plan .mm-plan")).to_have_count(2)
    assert "48.3%" in page.locator("#video-plan").inner_text()
    expect(page.locator("#video-banner")).to_contain_text("Tiny model.")
    run(page)

    rows = table(page)
    assert list(rows) == ["dense", "gna", "radial"]
    time, speedup, predicted, density, psnr, _, ssim, dense_steps = rows["radial"]
    assert float(time.split()[0]) > 0 and float(speedup[:-1]) > 0 and float(predicted[:-1]) > 1 and density == "48.3%"
    assert 25 < float(psnr) < 45 and 0.9 < float(ssim) <= 1 and dense_steps == "5 of 20"

    made = files(page, server, tmp_path)
    assert {"dense.mp4", "radial.mp4", "dense-and-gna.mp4", "radial.yaml", "gna-config.yaml"} <= made.keys()
    dense, radial = read(made["dense.mp4"]).frames, read(made["radial.mp4"]).frames
    assert dense.shape == radial.shape == (17, 48, 48, 3) and not np.array_equal(dense, radial)
    assert build(made["gna-config.yaml"]).window == (5, 4, 4)
    recipe = yaml.safe_load(made["radial.yaml"].read_text())
    assert recipe["model"] == "tiny-video" and recipe["methods"][0]["method"] == "radial"
    screenshot(page, "generate", full_page=True)
    screenshot(page, "top", clip={"x": 0, "y": 0, "width": 1280, "height": 980}, full_page=True)

    # another frame, another variant
    slider, heat = page.locator("#video-slider img").first, page.locator("#video-heat img")
    before, old = slider.get_attribute("src"), heat.get_attribute("src")
    number = page.locator("#video-frame input[type=number]")
    number.fill("2")
    number.blur()
    expect(slider).not_to_have_attribute("src", before)
    expect(heat).not_to_have_attribute("src", old)
    map_before = page.locator("#video-schedule img").get_attribute("src")
    page.locator("#video-variant").get_by_label("radial").check()
    expect(page.locator("#video-schedule img")).not_to_have_attribute("src", map_before)


def test_videos_play_in_step_under_one_control(open_page):
    page = open_page()
    planned(page)
    settle(page, steps=6)
    run(page)
    player = page.locator("#video-result mm-player")
    expect(player.get_by_role("button", name="Pause")).to_be_visible()
    seen = set()
    for _ in range(12):
        page.wait_for_timeout(150)
        at = positions(page)
        assert len(at) == 2 and abs(at[0] - at[1]) < 2 / FPS, at
        seen.add(round(at[0], 2))
    assert len(seen) > 6  # they do play

    player.get_by_role("button", name="Pause").press("Enter")
    scrub = player.get_by_label("Frame of all videos")
    for key, frame in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", 16), ("ArrowLeft", 15)):
        scrub.press(key)
        expect(player.locator("output")).to_have_text(f"{frame + 1} / 17")
        page.wait_for_timeout(50)
        assert positions(page) == pytest.approx([(frame + 0.5) / FPS] * 2, abs=1e-3)
    page.wait_for_timeout(300)
    assert positions(page) == pytest.approx([15.5 / FPS] * 2, abs=1e-3)  # paused is paused

    second = player.locator("video").nth(1)
    plain = second.get_attribute("src")
    player.get_by_label("difference to dense").check()
    expect(second).to_have_attribute("src", re.compile(r"radial-difference\.mp4$"))
    player.get_by_label("difference to dense").uncheck()
    expect(second).to_have_attribute("src", plain)


def test_images(open_page, server, tmp_path, screenshot):
    if not server.service.models.names("image"):
        pytest.skip("this checkout holds no data/tiny-image; `mmeff train tiny-image` makes it")
    page = open_page("Images")
    planned(page, "image")
    run(page, "image")
    rows = table(page, "image")
    assert list(rows) == ["dense", "gna"] and rows["gna"][-1] == "5 of 20"
    made = files(page, server, tmp_path, "image")
    assert {"dense.png", "gna.png", "gna.yaml", "gna-config.yaml"} <= made.keys()
    assert page.locator("#image-result mm-player img").count() == 2
    page.locator("#image-schedule img").wait_for()
    screenshot(page, "images", full_page=True)


def test_cancel_stops_between_steps_and_the_next_run_works(open_page, server):
    page = open_page()
    planned(page)
    settle(page, steps=LONG)
    page.locator("#video-go").click()
    progress = page.locator("#video-progress")
    expect(progress).to_contain_text(re.compile(rf"step [1-9]\d* of {LONG}"))
    page.locator("#video-cancel").click()
    expect(progress).to_contain_text("Stopped: cancelled after step")
    done = int(re.search(rf"after step (\d+) of {LONG}", progress.inner_text()).group(1))
    assert done < LONG and server.service.turns.waiting == 0
    assert server.service.models.load(server.service.models.offers["tiny-video"]).handle is None
    expect(page.locator("#video-cancel")).to_be_disabled()
    page.locator("label", has_text="steps").locator("visible=true").locator("input").first.fill("6")
    run(page)
    assert table(page)["dense"][-1] == "6 of 6"


def test_a_visitor_who_leaves_leaves_no_run(open_page, server):
    page = open_page()
    planned(page)
    settle(page, steps=LONG)
    page.locator("#video-go").click()
    expect(page.locator("#video-progress")).to_contain_text(re.compile(rf"step [1-9]\d* of {LONG}"))
    assert server.service.turns.waiting == 1
    page.close()
    stop = time.monotonic() + 60
    while server.service.turns.waiting and time.monotonic() < stop:
        time.sleep(0.1)
    assert server.service.turns.waiting == 0
    finished = [dict(sizes)["num_inference_steps"] for _, _, _, sizes, _ in server.service.generating._dense._clips]
    assert LONG not in finished  # it was stopped, and did not come to its end meanwhile


def test_errors_are_messages_and_the_page_stays_usable(open_page):
    page = open_page()
    planned(page)
    toast = page.get_by_test_id("toast-text")

    def refused(text):
        page.locator("#video-go").click()
        expect(toast).to_contain_text(text)
        assert "Traceback" not in page.content() and "site-packages" not in page.content()
        page.get_by_test_id("toast-close").click()
        expect(toast).to_have_count(0)
        expect(page.locator("#video-go")).to_be_enabled()

    prompt = page.locator("#video-prompt textarea")
    prompt.fill("")
    refused("the prompt is empty")
    prompt.fill("a red square moving left")
    settle(page, height=50)
    refused("divisible by 16")
    field(page, "Radial").uncheck()
    refused("no method is chosen")
    for name in ("GNA", "Radial", "SlidingTile", "VMoBA"):
        field(page, name).check()
    refused("at most 3 methods")
    for name in ("GNA", "SlidingTile", "VMoBA"):
        field(page, name).uncheck()
    page.get_by_role("button", name="Radial settings").click()
    block = page.locator("label", has_text="block (tokens)").locator("visible=true").locator("input")
    block.fill("0")
    expect(page.locator("#video-plan .mm-error")).to_contain_text("Radial.block must be")
    refused("Radial.block must be")


def test_text_of_a_visitor_is_never_markup(open_page):
    page = open_page()
    planned(page)
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>\" onload='alert(3)"
    page.locator("#video-prompt textarea").fill(nasty)
    settle(page, steps=6)
    run(page)
    assert nasty in page.locator("#video-result .mm-where").inner_text()
    assert page.locator("#video-result img[src=x]").count() == 0
    assert page.locator("#video-result video").count() == 2  # a dialog would fail the test when the page closes


def test_two_visitors_at_once_do_not_meet(open_page, server, tmp_path):
    one, two = open_page(), open_page()
    for page, prompt, method, seed in (
        (one, "a red square moving left", "Radial", 1),
        (two, "a blue ring moving up", "GNA", 2),
    ):
        planned(page)
        page.locator("#video-prompt textarea").fill(prompt)
        for name in ("Radial", "GNA"):
            field(page, name).set_checked(name == method)
        settle(page, seed=seed, steps=12)
    one.locator("#video-go").click()
    two.locator("#video-go").click()
    expect(two.locator("#video-progress")).to_contain_text("1 run is before yours")
    for page, prompt, method, seed in ((one, "red square", "radial", 1), (two, "blue ring", "gna", 2)):
        page.wait_for_function("document.querySelector('#video-result mm-player') !== null")
        assert list(table(page)) == ["dense", method]
        assert prompt in shown(page) and f"seed {seed}" in page.locator("#video-result .mm-where").inner_text()
    for page, colour, name in ((one, "red", "radial"), (two, "blue", "gna")):
        folder = tmp_path / colour
        folder.mkdir()
        made = files(page, server, folder)
        for video in ("dense.mp4", f"{name}.mp4"):
            found = clips.detect(read(made[video]).frames[None] / np.float32(255))
            assert list(clips.COLOURS)[int(found.colour[0])] == colour


def test_phone(open_page, screenshot):
    page = open_page(**PHONE)
    planned(page)
    assert fits(page)
    settle(page, steps=6)
    assert fits(page)
    run(page)
    page.locator("#video-schedule img").wait_for()
    assert fits(page)
    page.wait_for_function(
        "Math.abs(document.querySelector('#video-result mm-player').getBoundingClientRect().top) < 40"
    )
    screenshot(page, "phone")


def test_dark(open_page, screenshot):
    page = open_page(color_scheme="dark")
    planned(page)
    page.get_by_role("button", name="a blue square moving up").click()
    expect(page.locator("#video-prompt textarea")).to_have_value("a blue square moving up")
    run(page)

    def luminance(selector, what):
        red, green, blue = map(
            int, re.findall(r"\d+", page.eval_on_selector(selector, f"e => getComputedStyle(e).{what}"))[:3]
        )
        return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255

    assert luminance("body", "backgroundColor") < 0.1 < 0.7 < luminance(".mm-header h1", "color")
    for selector in ("mm-player", ".mm-scroll", ".mm-speed"):
        assert luminance(selector, "backgroundColor") < 0.2, selector
    page.wait_for_timeout(500)
    screenshot(page, "dark", full_page=True)
