import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("statsmodels")
pytest.importorskip("jinja2")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
if shutil.which("chromium") is None:
    pytest.skip("needs chromium", allow_module_level=True)

from lightning_faast.evaluation.page import page as render  # noqa: E402
from lightning_faast.evaluation.records import Record  # noqa: E402
from lightning_faast.evaluation.summary import Comparison  # noqa: E402

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"&{{ 7 * 7 }}"
POINTS = ".point"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser) -> Iterator:
    """Opens a file; at the end, there was no request but for the file, no error and no word on the console."""
    contexts, complaints, requests = [], [], []

    def visit(path: Path, width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


@pytest.fixture
def html(reported):
    return reported / "comparison.html"


@pytest.fixture
def hostile(tmp_path):
    records = [
        Record("faast", 4, 0, "done", test_rows=100, accuracy=0.5, seconds_encode=1.0, seconds_fit=1, seconds_solve=1),
        Record(HOSTILE, 4, 0, "done", test_rows=100, accuracy=0.6, bytes_to_update=9, loss=float("inf")),
        Record("lora", 4, 0, "failed", f"it said {HOSTILE}", command=f"run {HOSTILE}"),
    ]
    comparison = Comparison(records, [None] * 3, "faast", {"title": HOSTILE, "data": HOSTILE, "command": HOSTILE})
    drawings = {f"accuracy_memory{theme}": b"<svg xmlns='http://www.w3.org/2000/svg'/>" for theme in ("", "_dark")}
    path = tmp_path / "page.html"
    path.write_text(render(comparison, drawings), encoding="utf-8")
    return path


def column(tab, index, shots=0):
    """What a column of the table says, top to bottom."""
    return tab.locator(f"tbody[data-shots='{shots}'] tr.row").evaluate_all(
        "(rows, i) => rows.map(row => row.cells[i] ? row.cells[i].innerText.split('\\n')[0] : null)", index
    )


def test_one_file_without_references(html):
    text = html.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "url(" not in re.sub(r"data:[^\"]+", "", text)
    assert len(text) < 2_000_000


def test_shows_every_entry_and_reason(visit, html, compared):
    tab = visit(html)
    assert tab.locator(".figures tr.row").count() == len(compared.entries)
    failed = " ".join(tab.locator("tr.failed").inner_text().split())
    assert failed == "full_finetuning failed RuntimeError: out of memory (tried to allocate 2.1 GB)"
    assert tab.get_by_text("refused: zero_shot reads no examples").is_visible()
    assert tab.locator(".lead").inner_text() == "faast has the highest accuracy at 2 of 4 numbers of shots, 16 and all."
    assert tab.locator(".matrix td.behind").all_inner_texts() == ["▴+4.0"]


def test_marks_stand_for_the_entries(visit, html, compared):
    tab = visit(html)
    done = [entry for entry in compared.entries if entry.accuracy]
    for chart in ("accuracy_time", "accuracy_shots", "accuracy_memory"):
        assert tab.locator(f"[data-chart={chart}] {POINTS}").count() == len(done)
    assert tab.locator(f"[data-chart=regularization_path] {POINTS}").count() == 4
    names = tab.locator(POINTS).evaluate_all("points => points.map(p => p.getAttribute('aria-label'))")
    assert "zero_shot, 4 shots: Accuracy 59.0 [55.5, 62.5] %, Difference +4.0 [+1.8, +6.2] points, " in "\n".join(names)
    assert all(re.search(r"\d", name) for name in names)


def test_sorts_by_keyboard(visit, html):
    tab = visit(html)
    head = tab.get_by_role("columnheader", name="Loss")
    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(text) for text in column(tab, 3, shots=1)]
    assert values == sorted(values)
    tab.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(text) for text in column(tab, 3, shots=1)]
    assert values == sorted(values, reverse=True)
    assert column(tab, 0, shots=2)[-1] == "zero_shot"  # it was refused: last in either order
    assert tab.get_by_role("status").inner_text() == "Sorted by Loss, descending"
    tab.get_by_role("columnheader", name="Accuracy").get_by_role("button").click()
    assert tab.locator(".figures [aria-sort]").count() == 1


def test_shots_filter_table_and_charts(visit, html):
    tab = visit(html)
    tab.get_by_role("radio", name="Every").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.get_by_role("radio", name="16").is_checked()
    assert tab.locator(".figures tbody:visible").count() == 1
    assert tab.locator(f"[data-chart=accuracy_time] {POINTS}").count() == 6
    assert tab.locator(f"[data-chart=accuracy_shots] {POINTS}").count() == 22
    assert tab.locator("[data-chart=reliability] h3").inner_text() == "Reliability, 16 shots"


def test_points_by_keyboard(visit, html):
    tab = visit(html)
    for chart in tab.locator("figure.chart").all():
        assert chart.locator(f"{POINTS}[tabindex='0']").count() == 1  # one stop of the Tab key
        count = chart.locator(POINTS).count()
        chart.locator(f"{POINTS}[tabindex='0']").focus()
        tab.keyboard.press("Home")
        reached = set()
        for _ in range(count):
            name, index = tab.evaluate(
                "[document.activeElement.ariaLabel, [...document.querySelectorAll('.point')]"
                ".indexOf(document.activeElement)]"
            )
            assert name
            reached.add(index)
            assert chart.locator(".tip").is_visible()
            assert name.startswith(chart.locator(".tip strong").inner_text())
            tab.keyboard.press("ArrowRight")
        assert len(reached) == count
        tab.keyboard.press("Escape")
        assert not chart.locator(".tip").is_visible()


def test_picking_a_method(visit, html):
    tab = visit(html)
    chart = tab.locator("[data-chart=accuracy_time]")
    chart.locator(f"{POINTS}[aria-label^='knn, 16']").focus()
    tab.keyboard.press("Enter")
    chip = tab.locator(".chip", has_text="knn")
    assert chip.get_attribute("aria-pressed") == "true"
    assert tab.evaluate("document.activeElement.ariaLabel").startswith("knn, 16")
    faded = tab.locator("[data-chart=accuracy_shots] .series:not(.on, .strong)").first
    tab.wait_for_function("node => getComputedStyle(node).opacity < 0.2", arg=faded.element_handle())
    tab.get_by_role("button", name="Show all alike").click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert not tab.get_by_role("button", name="Show all alike").is_visible()
    chart.locator(f"{POINTS}[aria-label^='linear_probe, 64']").click(force=True)
    assert tab.locator(".chip", has_text="linear_probe").get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme(visit, html, scheme):
    tab = visit(html, color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 20, 23)"}
    other = "dark" if scheme == "light" else "light"
    assert tab.evaluate(ground) == grounds[scheme]
    tab.get_by_role("button", name=f"{other.capitalize()} theme").click()
    assert tab.evaluate(ground) == grounds[other]
    tab.get_by_role("button", name=f"{scheme.capitalize()} theme").click()
    assert tab.evaluate(ground) == grounds[scheme]


@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_nothing_reaches_over_the_edge(visit, html, hostile, width):
    for path in (html, hostile):
        tab = visit(path, width)
        tab.wait_for_selector(POINTS)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        if path is html:
            drawn = tab.locator(".canvas svg").evaluate_all("all => all.map(s => s.getBoundingClientRect().width)")
            assert all(0 < number <= width for number in drawn)


def test_charts_follow_the_width(visit, html):
    tab = visit(html, 1280)
    tab.wait_for_selector(POINTS)
    tab.set_viewport_size({"width": 400, "height": 900})
    tab.wait_for_function("document.querySelector('.canvas svg').viewBox.baseVal.width < 400")


def test_structure_for_screen_readers(visit, html):
    tab = visit(html)
    assert tab.locator("h1").count() == 1
    levels = tab.locator("h1, h2, h3").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert tab.get_by_role("main").count() == tab.get_by_role("banner").count() == 1
    assert tab.locator("table caption").count() == tab.locator("table").count() == 2
    assert tab.locator("table.figures tbody tr.row > th[scope=row]").count() == 24
    ids = tab.locator("[id]").evaluate_all("all => all.map(node => node.id)")
    assert len(ids) == len(set(ids))
    for referred in tab.locator("[aria-labelledby]").evaluate_all(
        "all => all.map(n => n.getAttribute('aria-labelledby'))"
    ):
        assert referred in ids
    names = tab.locator("button, input").evaluate_all(
        "all => all.map(n => n.getAttribute('aria-label') || n.textContent || n.labels[0].textContent)"
    )
    assert all(name.strip() for name in names)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"


def test_without_scripts(visit, html):
    tab = visit(html, java_script_enabled=False)
    assert tab.locator("noscript img").count() == 5
    assert all(image.get_attribute("alt") for image in tab.locator("noscript img").all())
    assert tab.locator(".figures tr.row").count() == 24
    assert not tab.locator(".controls").is_visible()
    assert not tab.locator("#theme").is_visible()
    assert tab.locator(".figures button").count() == 0
    assert tab.locator("noscript img").first.bounding_box()["height"] > 100


def test_hostile_text_is_only_text(visit, hostile):
    tab = visit(hostile)
    tab.wait_for_selector(POINTS)
    assert tab.evaluate("window.hacked") is None
    assert tab.title() == HOSTILE
    assert tab.locator("h1").inner_text() == HOSTILE
    assert tab.locator("img").count() == 0
    assert tab.locator(".chip").nth(1).inner_text() == HOSTILE
    tab.locator(POINTS).first.focus()
    assert tab.locator(".tip:visible strong").inner_text().startswith(HOSTILE)
    assert HOSTILE in tab.locator("td.reason").inner_text()
    assert json.loads(tab.locator("#data").text_content())["methods"][1]["name"] == HOSTILE
    tab.locator("summary").click()
    assert tab.locator(".commands code").inner_text() == f"run {HOSTILE}"


def test_no_other_script_may_run(browser, html, tmp_path):
    """The content security policy, were something to slip through."""
    text = html.read_text(encoding="utf-8")
    path = tmp_path / "page.html"
    path.write_text(text.replace("<main", "<script>window.hacked = 1</script><main", 1), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    context = browser.new_context()
    tab = context.new_page()
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(path.as_uri())
    tab.wait_for_selector(POINTS)
    assert tab.evaluate("window.hacked") is None
    assert "Content Security Policy" in complaints[0]
    context.close()


def test_prints(visit, html):
    tab = visit(html)
    tab.emulate_media(media="print", color_scheme="dark")
    assert not tab.locator(".controls").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_reduced_motion(visit, html):
    tab = visit(html, reduced_motion="reduce")
    tab.wait_for_selector(POINTS)
    assert tab.evaluate("getComputedStyle(document.querySelector('.series')).transitionDuration") == "0s"
