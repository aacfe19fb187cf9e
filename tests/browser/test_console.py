"""The console in a real Chromium: readable by everybody, from nowhere but the server, and by the keyboard alone."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from serving.api.keys import KeyFile
from tests.browser.conftest import PARTITIONS, SHOTS, Site, serving

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
PAGES = ("", "/models", "/rollouts", "/rollouts/friday", "/ids", "/ids?item=", "/encoder", "/upgrades", "/concepts",
         "/skew", "/aggregates?user=u1&item=",
         "/letters", "/forgotten", "/health")  # fmt: skip
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def address(site: Site, path: str) -> str:
    """A page by its short name: experiments by their id, items by one that there is."""
    if path.startswith("/rollouts/"):
        listed = httpx.get(f"{site.url}/console/rollouts").text
        (found,) = set(re.findall(r"/console(/rollouts/" + path.rpartition("/")[2] + r"%40\d+)", listed))
        path = found
    return f"{site.url}/console{path}{site.item if path.endswith('item=') else ''}"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport=WIDE) as context:
        yield context.new_page()


def opened(page: Page, site: Site, path: str) -> None:
    """Goes to a page, and waits where it is made behind the scenes."""
    page.goto(address(site, path))
    expect(page.locator("[data-again]")).to_have_count(0, timeout=60_000)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole_from_here_alone_and_has_no_serious_fault(
    browser: Browser, site: Site, axe: str, path: str, size: dict[str, int], theme: str
) -> None:
    with browser.new_context(viewport=size, color_scheme=theme, bypass_csp=True) as context:  # type: ignore[arg-type]
        page = context.new_page()
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        opened(page, site, path)
        assert page.locator("h1").count() == 1
        assert all(url.startswith((site.url, "data:")) for url in asked), asked
        assert said == []
        # Nothing is wider than the window, so nothing has to be looked for sideways.
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        page.evaluate(axe)
        found = page.evaluate("axe.run()")["violations"]
        serious = [
            (one["id"], [node["target"] for node in one["nodes"]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []
        SHOTS.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", path.strip("/")).strip("-") or "overview"
        page.screenshot(path=SHOTS / f"{name}-{theme}-{size['width']}.png", full_page=True)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_no_word_of_the_audit_is_broken(page: Page, site: Site, size: dict[str, int]) -> None:
    page.set_viewport_size(size)  # type: ignore[arg-type]
    opened(page, site, "/forgotten")
    assert page.locator("tbody td:nth-child(2)").all_inner_texts() == ["removed", "requested"]
    lines = """cells => cells.map(cell => {
        const text = document.createRange()
        text.selectNodeContents(cell)
        return new Set([...text.getClientRects()].map(one => Math.round(one.top))).size
    })"""
    assert page.locator("tbody td:nth-child(2)").evaluate_all(lines) == [1, 1]
    if size == WIDE:
        assert page.locator("tbody td:nth-child(3)").evaluate_all(lines) == [1, 1]


def test_pages_keep_their_policy(page: Page, site: Site) -> None:
    answer = page.goto(f"{site.url}/console")
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(f"{site.url}/console/letters")
    assert refused == []


def test_what_came_in_with_a_message_is_text(page: Page, site: Site) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"{site.url}/console/letters")
    for summary in page.locator("summary").all():
        summary.click()
    shown = "".join(page.locator("pre").all_inner_texts())
    assert "<script>alert(1)</script>" in shown
    # A character that would turn the text around is written out.
    assert "\\u202e" in shown
    assert "\\xff\\xfe" in shown
    assert dialogs == []


def test_the_keyboard_alone_reaches_everything(page: Page, site: Site) -> None:
    opened(page, site, "/ids")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("To the content")
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type(site.item)
    page.keyboard.press("Enter")
    page.get_by_role("link", name=re.compile(".")).filter(has_text=re.compile("")).first.wait_for()
    first = page.locator(".found a").first
    first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#item")).to_contain_text(f"{site.item}, Semantic ID")
    expect(page.locator("#item tbody tr").first).to_be_visible()
    # The tree is unfolded along the item's codes; folding a node folds it.
    expanded = page.locator(".node[aria-expanded=true]")
    before = expanded.count()
    assert 1 <= before <= len(site.world.bundle.items["semantic_codes"][0])
    expanded.last.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".node[aria-expanded=true]")).to_have_count(before - 1)


def test_every_code_of_the_tree_leads_to_items_that_have_it(page: Page, site: Site) -> None:
    opened(page, site, "/ids")
    codes = site.world.bundle.items.drop_nulls("semantic_codes")["semantic_codes"].to_list()
    for depth in (1, 2, 3):
        node = (
            page.locator(".node[aria-expanded=false]").first
            if depth == 1
            else page.locator(".nodes .nodes .node").first
        )
        if depth == 3:
            node = page.locator(".nodes .nodes .nodes .node").first
        code = node.locator("b").inner_text()
        size = int(node.locator("small").inner_text().replace(",", ""))
        assert size == sum(".".join(map(str, one[:depth])) == code for one in codes)
        node.click()
        if page.locator(".items").count():
            break
    assert page.locator(".items a").count() >= 1


def test_live_figures_renew_themselves(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/console")
    page.evaluate("window.stays = true")
    ranges = page.get_by_role("region", name="Row ranges of the stream").locator("tbody tr")
    assert ranges.count() == PARTITIONS
    assert [row.split()[-1] for row in ranges.all_inner_texts()] == ["0"] * PARTITIONS
    before = page.locator("[data-live]").inner_text()
    for number in range(200):
        body = {"user": f"late-{number}", "candidates": [site.item], "k": 1}
        assert httpx.post(f"{site.url}/v1/rank", json=body).status_code == 200
    page.wait_for_function("before => document.querySelector('[data-live]').innerText !== before", arg=before)
    assert page.evaluate("window.stays")


def test_pages_stand_without_a_script(browser: Browser, site: Site) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{site.url}/console")
        expect(page.locator(".tile").first).to_be_visible()
        page.goto(f"{site.url}/console/ids?q=guide")
        expect(page.locator(".found li").first).to_be_visible()


def test_an_experiment_shows_its_arms_bounds_and_end(page: Page, site: Site) -> None:
    opened(page, site, "/rollouts/friday")
    expect(page.locator("svg polygon.band")).to_have_count(1)
    rows = page.locator("tbody tr")
    assert [rows.nth(number).locator("th").inner_text() for number in range(2)] == ["control", "challenger"]
    counted = [int(rows.nth(number).locator("td").first.inner_text().replace(",", "")) for number in range(2)]
    assert sum(counted) == 400
    opened(page, site, "/rollouts")
    expect(page.get_by_text("rolled back: p99: 80.0 ms against 20.0")).to_be_visible()
    opened(page, site, "/models")
    expect(page.locator("#version-2")).to_contain_text("version 1")


def test_a_letter_is_put_back_once(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/console/letters")
    first = page.locator(".letter").last
    number = re.search(r"number (\d+)", first.inner_text())
    assert number is not None
    first.get_by_role("button").click()
    expect(page.get_by_role("status")).to_have_text("1 message was put back.")
    again = page.locator(".letter", has_text=f"number {number[1]}:")
    expect(again).to_contain_text("It was put back.")
    expect(again.get_by_role("button")).to_have_count(0)


def test_another_sites_form_does_nothing(site: Site) -> None:
    for origin in ("http://elsewhere.example", "null", None):
        headers = {} if origin is None else {"origin": origin}
        answer = httpx.post(f"{site.url}/console/letters", data={"number": "0"}, headers=headers)
        assert answer.status_code == 403
        assert "not sent by a page of the console" in answer.text


def test_what_is_not_there_is_said_and_has_a_way_back(page: Page, site: Site) -> None:
    for path, said in (("/rollouts/none", "There is no experiment"), ("/ids?item=none", "No item")):
        answer = page.goto(f"{site.url}/console{path}")
        assert answer is not None
        assert answer.status == 404
        expect(page.get_by_role("alert")).to_contain_text(said)
        page.get_by_role("link", name="Back").click()
        expect(page.locator("h1")).to_be_visible()
    for path in ("9999.x.-1", "²", "٣", ".", "1" * 200):
        assert httpx.get(f"{site.url}/console/ids", params={"path": path}).status_code == 200
    headers = {"origin": site.url}
    refused = httpx.post(f"{site.url}/console/letters", data={"number": "99999"}, headers=headers)
    assert refused.status_code == 409
    assert "letter 99999: no such letter" in refused.text


def test_keys_say_who_sees_and_who_acts(browser: Browser, site: Site, tmp_path: Path) -> None:
    keys = KeyFile(site.home / "keys.json")
    reader, writer = keys.add("reader", ["console"]), keys.add("writer", ["console", "write"])
    caller = keys.add("caller", ["read", "write"])
    try:
        with serving(site.home, tmp_path / "serve.log") as url:
            assert httpx.get(f"{url}/console").status_code == 401
            assert httpx.get(f"{url}/console/letters", auth=("", caller)).status_code == 403
            for secret, buttons in ((reader, 0), (writer, 1)):
                with browser.new_context(http_credentials={"username": "", "password": secret}) as context:
                    page = context.new_page()
                    page.goto(f"{url}/console/letters")
                    assert min(page.get_by_role("button").count(), 1) == buttons
            form = {"number": "1"}
            refused = httpx.post(f"{url}/console/letters", data=form, auth=("", reader), headers={"origin": url})
            assert refused.status_code == 403
            done = httpx.post(f"{url}/console/letters", data=form, auth=("", writer), headers={"origin": url})
            assert done.status_code == 303
    finally:
        keys.path.unlink()
