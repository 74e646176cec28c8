"""What tests do on the demo's page: wait for a plan, fill settings, run, read the table."""

from __future__ import annotations

from playwright.sync_api import expect

DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
SLOW = 60_000  # milliseconds: other tests share the cores
expect.set_options(timeout=SLOW)


def planned(page, kind="video"):
    """Wait for the plan, which needs the model; returns its cards."""
    cards = page.locator(f"#{kind}-plan .mm-plan")
    cards.first.wait_for()
    return cards


def field(page, label):
    """The component of the visible tab with this label."""
    return page.get_by_label(label, exact=True).locator("visible=true").first


def settle(page, **values):
    """Open the run settings of the visible tab and fill some."""
    page.get_by_role("button", name="Run settings").locator("visible=true").click()
    for label, value in values.items():
        found = page.locator("label", has_text=label).locator("visible=true").locator("input").first
        found.fill(str(value))
        found.blur()


def run(page, kind="video"):
    """Press Generate, and wait for a result."""
    before = shown(page, kind)
    page.locator(f"#{kind}-go").click()
    page.wait_for_function(
        "([kind, before]) => { const player = document.querySelector(`#${kind}-result mm-player`);"
        " return player && player.dataset.spec !== before; }",
        arg=[kind, before],
    )
    expect(page.locator(f"#{kind}-go")).to_be_enabled()


def shown(page, kind="video"):
    """What the player shows, None before the first result."""
    players = page.locator(f"#{kind}-result mm-player")
    return players.first.get_attribute("data-spec") if players.count() else None


def table(page, kind="video"):
    """The cells of the result's rows, by variant."""
    rows = page.locator(f"#{kind}-result .mm-table tbody tr").all()
    cells = [[cell.inner_text() for cell in row.locator("th, td").all()] for row in rows]
    return {row[0]: row[1:] for row in cells}


def positions(page, kind="video"):
    """Where each video of the player is, in seconds."""
    return page.evaluate(
        "kind => [...document.querySelectorAll(`#${kind}-result mm-player video`)].map(video => video.currentTime)",
        kind,
    )


def fits(page):
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
