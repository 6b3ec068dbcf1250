"""The page in a real browser: light and dark, desktop and phone, with and without scripts."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, finished):
    contexts = []

    def opener(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.problems, page.requests = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(finished[2].as_uri())
        return page

    yield opener
    for context in contexts:
        context.close()


SIZE = "() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
COLORS = """() => {
    const style = getComputedStyle(document.body);
    return [style.backgroundColor, style.color].map(color => color.match(/\\d+/g).slice(0, 3).map(Number));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "highest"), [(1280, 12_000), (390, 20_000)])
def test_it_looks_right(open_page, tmp_path, scheme, width, highest):
    page = open_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found_width, height = page.evaluate(SIZE)
    assert found_width == width, "the page scrolls sideways"
    assert 3_000 < height < highest
    background, ink = page.evaluate(COLORS)
    assert (sum(background) > sum(ink)) == (scheme == "light")
    assert abs(sum(background) - sum(ink)) > 500, "text is hard to read"
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000
    assert page.problems == []
    assert len(page.requests) == 1 and page.requests[0].startswith("file://")


def test_plots_take_the_colours_of_the_page(open_page):
    shades = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        line = page.locator("svg.plot path[style*='--first']").first
        shades[scheme] = line.evaluate("line => getComputedStyle(line).stroke")
    assert shades["light"] == "rgb(63, 91, 216)"
    assert shades["dark"] == "rgb(142, 162, 255)"


def test_no_text_of_a_plot_lies_outside_of_it(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    outside = page.evaluate("""() => [...document.querySelectorAll('svg.plot')].flatMap(plot => {
        const box = plot.getBoundingClientRect();
        return [...plot.querySelectorAll('text')].filter(text => {
            const own = text.getBoundingClientRect();
            const across = own.left < box.left - 2 || own.right > box.right + 2;
            return across || own.top < box.top - 2 || own.bottom > box.bottom + 2;
        }).map(text => text.textContent);
    })""")
    assert outside == []


def test_filters_search_and_keys_browse_the_examples(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    kinds = "() => [...document.querySelectorAll('.example')].filter(e => e.offsetParent).map(e => e.classList[1])"
    everything = page.evaluate(kinds)
    assert set(everything) == {"won", "lost", "failed", "kept"}
    page.locator("label[for=show-lost]").click()
    assert set(page.evaluate(kinds)) == {"lost"}
    page.locator("label[for=show-all]").click()
    page.locator("#example-search").fill("flight to Oslo")
    assert 0 < len(page.evaluate(kinds)) < len(everything)
    page.locator("#example-search").fill("")
    page.locator("body").click(position={"x": 5, "y": 5})
    page.keyboard.press("j")
    opened = page.evaluate("() => [...document.querySelectorAll('.example[open]')].map(e => e.id)")
    assert opened == ["example-2"]
    assert page.problems == []


def test_it_reads_and_filters_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("h1").inner_text().startswith("Success on 96 held-out tasks rose")
    assert not page.locator("#example-search").is_visible()
    page.locator("label[for=show-won]").click()
    assert not page.locator(".example.lost").first.is_visible()
    page.locator(".example.won summary").nth(1).click()
    assert page.locator(".example.won .sides").nth(1).is_visible()


def test_it_prints(open_page):
    page = open_page()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.pdf().startswith(b"%PDF")
