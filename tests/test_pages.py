"""The built pages as a reader opens them: by double click, offline, in both colour modes, on a phone."""

import shutil

import pages
import pytest
import yaml
from browser import find_browser, launch
from bs4 import BeautifulSoup
from notebooks import ROOT
from pages import HTML, built_pages

PAGES = built_pages()
if not PAGES:
    pytest.fail("there is no page in _build/html: run `make book`", pytrace=False)
AXE = (ROOT / "book" / "axe" / "axe.min.js").read_text(encoding="utf-8")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
OPENED = [p for p in PAGES if p != HTML / "index.html"]  # that one only leads on to the first page
VIEWS = {"light, 1280 px": ("light", DESKTOP), "dark, 390 px": ("dark", PHONE)}


def names(path):
    return path.relative_to(HTML).with_suffix("").as_posix()


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_page_is_complete(path):
    page = pages.soup(path)
    assert not pages.remote_loads(page)
    assert not pages.dead_links(path)
    assert not pages.undescribed_images(page)
    assert not pages.raw_math(page)


def test_style_sheets_ask_no_other_host():
    for sheet in HTML.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8", errors="ignore")
        assert "url(http" not in text.replace('"', "").replace("'", "").replace("url(//", "url(http"), sheet.name


# --------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        pytest.skip("pages are not opened: no Chromium or Chrome here; to install one: make browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()


class View:
    """A page opened from the file system in a fresh profile, with what went wrong while it loaded."""

    def __init__(self, browser, address, scheme="light", size=DESKTOP):
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.problems: list[str] = []
        self.context.route("**/*", self._only_files)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda e: self.problems.append(f"script error: {e}"))
        self.page.on("requestfailed", lambda r: self.problems.append(f"not loaded: {r.url}"))
        self.page.goto(address, wait_until="load")
        self.page.wait_for_function("() => !window.MathJax || !!(window.MathJax.startup || {}).promise", timeout=20_000)
        self.page.evaluate("() => ((window.MathJax || {}).startup || {}).promise")

    def _only_files(self, route):
        address = route.request.url
        if address.startswith(("file:", "data:", "blob:", "about:")):
            route.continue_()
        else:
            self.problems.append(f"remote request: {address}")
            route.abort()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def inspect(self) -> list[str]:
        """Everything that is wrong with the page as it stands."""
        found, page = list(self.problems), self.page
        math = page.evaluate("""() => [document.querySelectorAll('.math').length,
          document.querySelectorAll('mjx-container').length,
          [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent).slice(0, 5)]""")
        if math[1] < math[0]:
            found.append(f"{math[0] - math[1]} of {math[0]} formulas are not typeset")
        if math[2]:
            found.append(f"formulas with errors: {math[2]}")
        wide, width = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
        if wide > width:
            found.append(f"scrolls sideways: {wide} px wide in {width} px")
        broken = page.evaluate(
            "() => [...document.images].filter(i => !i.naturalWidth && i.offsetParent).map(i => i.src)"
        )
        found += [f"image not shown: {source}" for source in broken]
        page.evaluate(AXE)
        report = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        for violation in report["violations"]:
            if violation["impact"] in ("serious", "critical"):
                where = "; ".join(str(n["target"]) + " " + n["html"][:100] for n in violation["nodes"][:3])
                found.append(f"axe {violation['impact']} {violation['id']} ({len(violation['nodes'])}): {where}")
        return found


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("path", OPENED, ids=names)
def test_page_in_a_browser(browser, path, view):
    scheme, size = VIEWS[view]
    with View(browser, path.as_uri(), scheme, size) as opened:
        shown = opened.page.evaluate("() => document.documentElement.dataset.theme")
        assert shown == scheme
        assert not opened.inspect()


def test_the_front_door_opens_the_first_page(browser):
    first = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["root"]
    page = browser.new_page()
    page.goto((HTML / "index.html").as_uri())
    page.wait_for_url(f"**/{first}.html")
    page.close()


def test_search_finds_a_word_from_the_file_system(browser):
    for word, finds in (("policy", True), ("qqxyzzy", False)):
        with View(browser, f"{(HTML / 'search.html').as_uri()}?q={word}") as opened:
            opened.page.wait_for_function(
                "() => /finished|did not match|found/i.test((document.querySelector('#search-results p.search-summary')"
                " || {}).textContent || '')",
                timeout=20_000,
            )
            results = opened.page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
            assert any("chapters/" in address for address in results) is finds
            assert not opened.problems


# ------------------------------------------------------------------- the checks themselves, on pages made to fail

GOOD = """<!DOCTYPE html><html lang="en" data-theme="light"><head><title>t</title></head><body><main><article>
<h1 id="top">Title</h1><a href="#top">up</a><a href="https://example.org">out</a>%s</article></main></body></html>"""
BAD = {
    "<script src='https://cdn.example.org/a.js'></script>": "remote_loads",
    "<link rel='stylesheet' href='//cdn.example.org/a.css'>": "remote_loads",
    "<script type='module'>import('https://cdn.example.org/a.mjs')</script>": "remote_loads",
    "<img src='a.png'>": "undescribed_images",
    "<img src='a.png' alt=''>": "undescribed_images",
    "<p>so $$ a = b $$ holds</p>": "raw_math",
    "<a href='#gone'>x</a>": "dead_links",
    "<a href='gone.html'>x</a>": "dead_links",
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_are_found_without_a_browser(tmp_path, fault):
    def found(text):
        path = tmp_path / f"{abs(hash(text))}.html"
        path.write_text(text)
        page = BeautifulSoup(text, "html.parser")
        checks = ("remote_loads", "undescribed_images", "raw_math")
        return {c for c in checks if getattr(pages, c)(page)} | (
            {"dead_links"} if pages.dead_links(path, tmp_path) else set()
        )

    assert found(GOOD % "") == set()
    assert BAD[fault] in found(GOOD % fault)


@pytest.mark.parametrize(
    "fault, problem",
    [
        ("<script src='https://cdn.example.org/a.js'></script>", "remote request"),
        ("<script>fetch('https://cdn.example.org/a.json').catch(() => 0)</script>", "remote request"),
        ("<script>throw new Error('broken')</script>", "script error"),
        ("<script>console.error('broken')</script>", "console"),
        ("<div style='width: 2000px'>wide</div>", "sideways"),
        ("<span class='math'>\\(a\\)</span>", "not typeset"),
        ("<span class='math'>\\(\\nosuchmacro\\)</span>"
         "<script>window.MathJax = {tex: {packages: {'[-]': ['noundefined']}}}</script>"
         "<script src='mathjax.js'></script>", "formulas with errors"),
        ("<img src='gone.png' alt='a picture'>", "not loaded"),
        ("<p style='color: #ccc; background: #fff'>pale</p>", "color-contrast"),
        ("<input type='text'>", "axe critical label"),
    ],
)  # fmt: skip
def test_faults_are_found_in_a_browser(browser, tmp_path, fault, problem):
    shutil.copy(ROOT / "book" / "mathjax" / "tex-svg-full.js", tmp_path / "mathjax.js")
    for name, text in (("good", ""), ("bad", fault)):
        (tmp_path / f"{name}.html").write_text(GOOD % text)
    with View(browser, (tmp_path / "good.html").as_uri()) as opened:
        assert opened.inspect() == []
    with View(browser, (tmp_path / "bad.html").as_uri()) as opened:
        assert any(problem in found for found in opened.inspect()), opened.inspect()
