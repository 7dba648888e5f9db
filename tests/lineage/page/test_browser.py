"""The page in a real browser: nothing it complains about, a graph to zoom and click, a search, print, narrow and dark.

The screenshots stay in $FOREBAY_ARTIFACTS if that is set, else in the folder of the test run.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.lineage.page.document import build
from tests.lineage.page.browser import Page, browser, chromium
from tests.lineage.page.world import audit

pytestmark = [
    pytest.mark.skipif(
        chromium() is None,
        reason="no Chromium: put chromium or google-chrome on the PATH, or set FOREBAY_CHROMIUM",
    ),
    pytest.mark.timeout(120),
]
NODE = "document.querySelector('[data-node=\"{}\"]')"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return Path(os.environ.get("FOREBAY_ARTIFACTS") or tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def found(told):
    return audit(told)


@pytest.fixture(scope="module")
def file(found, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "audit of agent 3.html"
    path.write_text(build(found))
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(running: Page, file: Path) -> Page:
    """The page, loaded anew."""
    running.events.clear()
    running.open(file)
    return running


@pytest.fixture(autouse=True)
def quiet(request) -> Iterator[None]:
    """Whatever a test does: no error, no warning, no violation of the content policy, no request but the page itself."""
    yield
    page = request.getfixturevalue("running")
    assert page.complaints == []
    assert {url.partition(":")[0] for url in page.requests} <= {"file"}
    assert len(page.requests) <= 1 or len(set(page.requests)) == 1


def transform(page: Page) -> tuple[float, float, float]:
    x, y, k = map(
        float,
        re.findall(
            r"-?[\d.]+(?:e-?\d+)?", page.ask("document.querySelector('#scene').getAttribute('transform')")
        ),
    )
    return x, y, k


def shown(page: Page) -> str:
    return page.ask("document.querySelector('#panel').innerText")


def test_the_whole_graph_is_drawn(page: Page, found, pictures: Path):
    from tasks.lineage.picture import layout

    drawn = layout(found.lineage)
    assert page.ask("document.querySelectorAll('#scene [data-node]').length") == len(drawn.boxes)
    assert page.ask("document.querySelectorAll('#scene [data-from]').length") == len(drawn.lines)
    sizes = page.ask(
        "[...document.querySelectorAll('#scene [data-node]')].map(n => n.getBoundingClientRect().width)"
    )
    assert min(sizes) > 50
    assert (
        page.ask("document.querySelector('[data-node=\"0\"]').getAttribute('aria-label')")
        == "agent/3, champion"
    )
    assert page.ask("document.querySelectorAll('[data-card]').length") == len(found.lineage.nodes)
    assert page.screenshot(pictures / "audit.png").stat().st_size > 30_000
    page.look(1280, 1000, dark=True)
    page.screenshot(pictures / "audit-dark.png")


def test_a_click_on_a_box_shows_its_facts_and_marks_its_paths(page: Page, found):
    numbers = {ref: at for at, ref in enumerate(found.lineage.nodes)}
    dataset = numbers[("dataset", "main/v1")]
    page.click("[data-do=fit]")
    page.click(f"[data-node='{dataset}']")
    text = shown(page)
    node = found.lineage.nodes[("dataset", "main/v1")]
    assert node.digest in text
    assert "main/v1" in text
    before = page.ask("[...document.querySelectorAll('.node.before')].map(n => n.dataset.node)")
    after = page.ask("[...document.querySelectorAll('.node.after')].map(n => n.dataset.node)")
    assert str(numbers[("agent", "agent/1")]) in before  # sampled from it
    assert {"0", str(numbers[("agent", "agent/2")])} <= set(after)  # made of it
    assert not set(before) & set(after)
    assert page.ask("document.querySelector('.node.picked').dataset.node") == str(dataset)
    page.click("#panel a[href^='#n']")  # a tie leads on
    assert node.digest not in shown(page).split("\n")[1]
    assert page.ask("location.hash") == ""


def test_every_box_answers(page: Page, found):
    """Not by the mouse, for some are out of sight: as a link that is followed."""
    for at, node in enumerate(found.lineage.nodes.values()):
        if page.ask(f"Boolean({NODE.format(at)})"):
            page.ask(
                f"{NODE.format(at)}.dispatchEvent(new MouseEvent('click', {{bubbles: true, cancelable: true}})), true"
            )
            assert page.ask("document.querySelector('#panel').dataset.shows") == str(at)
            assert (node.digest or "") in shown(page)


def test_zoom_by_button_wheel_and_key(page: Page):
    start = transform(page)
    page.click("[data-do=in]")
    assert transform(page)[2] > start[2]
    page.click("[data-do=fit]")
    assert transform(page) == (0, 0, 1)
    x, y = page.middle_of("#picture")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    assert transform(page) == (0, 0, 1)  # nobody has touched the picture: the wheel is the page's
    x, y = page.middle_of("#picture")
    page.click("[data-node='0']")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    page.ask("new Promise(requestAnimationFrame).then(() => true)")
    assert transform(page)[2] > 1
    zoomed = transform(page)
    page.press("-", "-")
    assert transform(page)[2] < zoomed[2]
    before = transform(page)
    page.press("ArrowLeft")
    assert transform(page)[0] > before[0]
    page.press("0", "0")
    assert transform(page) == (0, 0, 1)


def test_drag_moves_and_is_no_click(page: Page):
    page.click("[data-do=in]")
    before, panel = transform(page), shown(page)
    x, y = page.middle_of("#picture")
    page.mouse("mousePressed", x, y, button="left", clickCount=1)
    for step in range(1, 6):
        page.mouse("mouseMoved", x + 20 * step, y + 10 * step, button="left", buttons=1)
    page.mouse("mouseReleased", x + 100, y + 50, button="left", clickCount=1)
    after = transform(page)
    scale = page.ask("document.querySelector('#picture').getScreenCTM().a")
    assert after[0] - before[0] == pytest.approx(100 / scale, abs=2 / scale)
    assert after[1] - before[1] == pytest.approx(50 / scale, abs=2 / scale)
    assert after[2] == before[2]
    assert shown(page) == panel


def test_keys_reach_every_box(page: Page):
    page.ask("document.querySelector('#picture').focus({focusVisible: true})")
    page.press("Tab")
    first = page.ask("document.activeElement.dataset.node")
    assert first is not None
    assert page.ask("document.querySelector('#panel').dataset.shows") == first
    page.press("Tab")
    second = page.ask("document.activeElement.dataset.node")
    assert second not in (None, first)
    page.press("Enter", "\r")
    assert page.ask("document.querySelector('#panel').dataset.shows") == second
    assert page.ask("location.hash") == ""


def test_search_finds_names_digests_and_files(page: Page, found):
    agent = found.lineage.nodes[("agent", "agent/1")]
    for query, expected in (
        ("agent/1", "agent/1"),
        (agent.digest[:16], "agent/1"),
        (agent.files[0].path, "agent/1"),
    ):
        page.click("#find")
        page.ask("document.querySelector('#find').select()")
        page.type(query)
        assert re.fullmatch(r"[1-9]\d* found", page.ask("document.querySelector('#found').textContent"))
        page.press("Enter", "\r")
        assert expected in shown(page)
        assert page.ask("document.querySelector('#found').textContent").startswith("1 of ")
    page.ask("document.querySelector('#find').select()")
    page.type("no such thing")
    assert page.ask("document.querySelector('#found').textContent") == "0 found"
    page.press("Escape")
    assert page.ask("document.querySelector('#found').textContent") == ""
    assert page.ask("document.querySelectorAll('.hit').length") == 0


def test_what_attackers_wrote_stays_text(page: Page):
    assert page.ask("document.images.length") == 0
    assert page.ask("document.scripts.length") == 1
    page.ask("document.body.insertAdjacentHTML('beforeend', '<p id=late></p>'), true")
    assert "<img src=x onerror=alert(1)>" in page.ask("document.body.innerText")


def test_another_script_would_not_run(running: Page, file: Path, tmp_path: Path):
    """Should an escape ever be missing: the content policy stops it, and the browser says so."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        file.read_text().replace(
            "<h1>", "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'><h1>"
        )
    )
    running.events.clear()
    running.open(spoilt)
    assert running.ask("window.owned === undefined")
    assert len([e for e in running.complaints if "Content Security Policy" in str(e)]) >= 2
    running.events.clear()


def test_print_has_the_graph_whole_and_everything_open(page: Page):
    page.ask("document.querySelector('[data-do=in]').click()")
    data = page.pdf()
    assert data.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert pages > 3
    page.call("Emulation.setEmulatedMedia", media="print")
    page.ask("dispatchEvent(new Event('beforeprint')), true")
    assert page.ask("getComputedStyle(document.querySelector('#scene')).transform") == "none"
    assert page.ask("getComputedStyle(document.querySelector('#panel')).display") == "none"
    assert page.ask("[...document.querySelectorAll('details.open-in-print')].every(d => d.open)")
    height, width = page.ask(
        "(r => [r.height, r.width])(document.querySelector('#picture').getBoundingClientRect())"
    )
    assert 0 < height <= 17 * 38
    assert width > 0
    page.ask("dispatchEvent(new Event('afterprint')), true")
    assert not page.ask("document.querySelector('#list').open")
    page.call("Emulation.setEmulatedMedia", media="")


def test_a_narrow_window_needs_no_sideways_scrolling(page: Page, pictures: Path):
    page.look(390, 844)
    assert page.ask("document.documentElement.scrollWidth") <= 390
    page.screenshot(pictures / "audit-narrow.png")
    panel, picture = (
        page.ask(f"document.querySelector('{name}').getBoundingClientRect().top")
        for name in ("#panel", "#picture")
    )
    assert panel > picture  # below it, not beside it


def test_without_scripts_boxes_lead_to_cards(running: Page, file: Path):
    running.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        running.events.clear()
        running.open(file)
        running.click("[data-node='1']")
        assert running.ask("location.hash") == "#n1"
        assert running.ask("document.querySelector('#n1').checkVisibility()")
        assert not running.ask("document.querySelector('#tools').checkVisibility()")
    finally:
        running.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_browser_is_gone_afterwards(tmp_path: Path):
    with browser(tmp_path) as page:
        number = int((tmp_path / "SingletonLock").readlink().name.rpartition("-")[2])
        assert page.ask("1 + 1") == 2
    with pytest.raises(ProcessLookupError):
        os.kill(number, signal.SIG_DFL)
