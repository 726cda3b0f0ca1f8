"""The site: built strictly, whole without a network, and a browser finds everything on it."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import nusam

from .site import CHROMIUM, walked

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every page that is written by hand, the front page first."""
    written = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    return ["index.html", *sorted(written - {"index.html", "404.html"})]


class _Loads(HTMLParser):
    """What a page has the browser fetch by itself."""

    def __init__(self, text):
        super().__init__()
        self.urls, self.identifiers, self.links = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.identifiers.update(filter(None, (given.get("id"), given.get("name"))))
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.urls.append(given["href"])
        if tag in ("script", "img", "iframe", "source", "object", "embed", "audio", "video"):
            self.urls += [value for name in ("src", "srcset", "data") if (value := given.get(name))]
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


def test_pages_load_nothing_from_elsewhere(site, pages):
    for page in pages:
        for url in _Loads((site / page).read_text("utf-8")).urls:
            assert not url.startswith(("http:", "https:", "//")), f"{page} loads {url}"
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text("utf-8"), style


def test_links_between_pages_lead_somewhere(site, pages):
    seen = {(site / page).resolve(): _Loads((site / page).read_text("utf-8")) for page in pages}
    checked = 0
    for page, loads in seen.items():
        for link in loads.links:
            path, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            if anchor and target in seen:
                assert anchor in seen[target].identifiers, f"{page.name} links to {link}"
                checked += 1
    assert checked > 100


def test_equations_need_no_script(site):
    text = (site / "algorithm.html").read_text("utf-8")
    assert text.count('<div class="equation"><math') >= 7
    words = "".join(_Text(text).words)
    assert "ε=argmax‖ε‖≤ρ⟨ε,∇f(x)⟩=lmo(−∇f(x))(5)" in words
    assert not any(word in text.lower() for word in ("mathjax", "katex", "\\("))


def test_every_equation_is_set(site):
    """None is left as it was typed, with dollars and backslashes."""
    written = [page for page in (ROOT / "docs").glob("*.md") if "$$" in page.read_text("utf-8")]
    assert {page.stem for page in written} >= {"algorithm", "matrix-free", "theory"}
    for page in written:
        html = (site / f"{page.stem}.html").read_text("utf-8")
        assert 2 * html.count('<div class="equation"><math') == page.read_text("utf-8").count("\n$$\n")
        words = "".join(_Text(html, code=False).words)
        assert "$" not in words, page
        assert "\\" not in words, page


def test_each_page_says_first_what_its_reader_can_do_after_it():
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name not in ("index.md", "api.md")]
    assert len(pages) > 15
    for page in pages:
        assert page.read_text("utf-8").splitlines()[2].startswith("After this page "), page.name


def test_code_on_the_pages_is_the_packages_own(site):
    """By a line of each function that no docstring has."""
    text = "".join(_Text((site / "algorithm.html").read_text("utf-8")).words)
    for line in (
        "v = v / (torch.linalg.vector_norm(v) + tau)",
        "torch._foreach_addcmul_(self._written, self._columns, self._rows, value=-1)",
        "vs = [A.rmatvec(u) for A, u in zip(operators, current, strict=True)]",
        "shares, _ = unit([together])",
    ):
        assert line in text, line


def test_the_reference_has_every_public_name(site):
    entries = set()
    for page in ("api.html", "api-lmo.html"):
        entries |= {name.rpartition(".")[2] for name in _Loads((site / page).read_text("utf-8")).identifiers}
    public = {*nusam.__all__, *nusam.lmo.__all__} - {"__version__", "lmo", "memory", "matrix_shape", "Epsilon"}
    assert public <= entries, public - entries


def test_roles_of_docstrings_became_links(site, pages):
    for page in pages:
        if not page.startswith("repository/"):
            text = "".join(_Text((site / page).read_text("utf-8"), code=False).words)
            for role in (":class:", ":meth:", ":func:", ":mod:"):
                assert role not in text, page


class _Text(HTMLParser):
    def __init__(self, text, code=True):
        super().__init__()
        self.words, self.code, self.depth = [], code, 0
        self.feed(text)

    def handle_starttag(self, tag, _):
        self.depth += tag == "pre"

    def handle_endtag(self, tag):
        self.depth -= tag == "pre"

    def handle_data(self, data):
        if self.code or not self.depth:
            self.words.append(data)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_shows_every_page(site, pages, tmp_path):
    by_hand = [page for page in pages if not page.startswith("repository/")]
    found = walked(site, by_hand, "nuclear", tmp_path / "profile")
    assert found["missing"] == []
    assert found["troubles"] == []
    for page, seen in found["pages"].items():
        assert seen["troubles"] == [], page
        assert seen["broken"] == [], page
        assert seen["navigation"] >= 15, page
        assert seen["wide"] <= 0, page
        assert seen["wide_on_a_phone"] <= 0, page
        assert "nusam" in seen["title"], page
    assert found["pages"]["/matrix-free.html"]["images"] == 1
    assert found["pages"]["/choosing-rho.html"]["images"] >= 2
    assert any("algorithm" in link for link in found["results"])
    assert not any("repository/" in link for link in found["results"])  # the README would answer everything twice


def test_the_drawing_is_readable_on_any_ground():
    """It brings its own ground, and every colour of its text stands out from it and from the boxes."""
    drawing = ROOT / "docs" / "assets" / "matrix-free.svg"
    root = ElementTree.parse(drawing).getroot()
    ground = next(element for element in root.iter() if element.get("id") == "ground")
    assert [ground.get("width"), ground.get("height")] == root.get("viewBox").split()[2:]
    style = next(element.text for element in root.iter() if element.tag.endswith("style"))
    rules = {rule.partition("{")[0].strip(): rule.partition("{")[2] for rule in style.split("}") if "{" in rule}
    colour = {name: rule.partition("fill: ")[2][:7] for name, rule in rules.items() if "fill: #" in rule}
    for text in ("text", ".note"):
        for behind in (ground.get("fill"), *(colour[box] for box in (".x", ".d", ".g"))):
            assert _contrast(colour[text], behind) >= 4.5, (text, behind)


def _contrast(one, other):
    """By the definition of WCAG 2."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
