"""The page of all results: what it says, what it refuses, and that a browser shows it."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from nusam.experiments.commands.report import Report
from nusam.experiments.errors import Refused
from nusam.experiments.pages.page import page
from nusam.experiments.pages.result import Curve, Result, as_certain, read_all

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _curve(panel, label, **changes):
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    y = [0.5, 0.6, None, 0.7, 0.8]
    curve = Curve(panel, label, x, y, "epoch", "test accuracy", error=[0.1, 0.7, 0.1, 0.1, 0.05])
    return replace(curve, **changes)


_WIDE = "\n".join(("|a" * 60, "|-" * 60, "|1" * 60))
RESULTS = [
    Result(
        name="table10",
        title="Table 10: the last one",
        scale="smoke",
        data="",
        columns=["method"],
        rows=[{"method": "SAM"}],
    ),
    Result(
        name="table2",
        title=f"Table 2: accuracy {HOSTILE}",
        scale="cpu",
        data="CIFAR-10, 2,000 images",
        columns=["method", "paper", "ours", *(f"a wide column {number}" for number in range(12)), HOSTILE],
        rows=[
            {"method": "AdamW", "paper": 81.25, "ours": "80.1 ± 0.3", "a wide column 3": "x" * 40},
            {"method": "νSAM", "paper": None, "ours": math.nan, HOSTILE: HOSTILE},
        ],
        findings=f"# Agrees\n\nWith **the paper** ![seen](https://example.org/x.png).\n\n{_WIDE}\n\n{HOSTILE}",
        notes=["ρ is ours.", HOSTILE],
        circumstances={"device": HOSTILE, "versions": {"torch": "2.6", "python": "3.10"}, "seconds": 1234.5678},
    ),
    Result(
        name="figure1",
        title="Figure 1: learning curves",
        scale="full",
        data="ImageNet",
        columns=[],
        rows=[],
        curves=[
            *(_curve("ViT", label) for label in ("AdamW", "SAM", "νSAM", "another method with a long label")),
            _curve("Mixer", "SAM", log_x=True, log_y=True),
            _curve(f"Panel {HOSTILE}", HOSTILE, error=None, x_title=HOSTILE),
            _curve(
                "Many", "AdamW", x=[float(n) for n in range(60)], y=[math.sin(n / 9) for n in range(60)], error=None
            ),
        ],
    ),
]
PANELS = 4


@pytest.fixture(scope="module")
def html():
    return page(RESULTS)


class _Elements(HTMLParser):
    """Start tags with their attributes, and the text of each script and style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.raw, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem:
            self.raw.append((self.cdata_elem, data))
        else:
            self.text += data


def _figures(html):
    return json.loads(re.search(r'<script id="figures"[^>]*>(.*?)</script>', html, re.DOTALL)[1])


def test_every_panel_yields_one_plot(html):
    plots = [attributes for tag, attributes in _Elements(html).tags if attributes.get("class") == "plot"]
    figures = _figures(html)
    assert [int(plot["data-figure"]) for plot in plots] == list(range(PANELS))
    assert len(figures) == PANELS
    vit, mixer, *_ = figures
    assert [trace["name"] for trace in vit["data"] if trace["showlegend"]] == [
        "AdamW",
        "SAM",
        "νSAM",
        "another method with a long label",
    ]
    assert vit["layout"]["xaxis"]["type"] == vit["layout"]["yaxis"]["type"] == "linear"
    assert mixer["layout"]["xaxis"]["type"] == mixer["layout"]["yaxis"]["type"] == "log"


def test_a_band_follows_the_error_and_leaves_out_the_gap(html):
    linear, logarithmic = (figure["data"][0] for figure in _figures(html)[:2])
    assert linear["fill"] == "toself"
    assert linear["x"] == [1, 2, 2, 1, 1, None, 4, 5, 5, 4, 4, None]
    first = [0.6, 1.3, -0.1, 0.4, 0.6]
    assert linear["y"][:5] == pytest.approx(first)
    assert logarithmic["y"][:5] == pytest.approx([0.6, 1.3, 0.2, 0.4, 0.6])  # half of the lowest edge above zero


def test_lines_differ_without_colour_and_a_method_keeps_its_look():
    labels = ["νSAM", *(f"label {number}" for number in range(9))]
    alone = Result("a", "a", "cpu", "", [], [], [_curve("p", "νSAM", error=None)])
    among = replace(alone, curves=[_curve("p", label, error=None) for label in reversed(labels)])
    (first,) = _figures(page([alone]))[0]["data"]
    lines = _figures(page([among]))[0]["data"]
    assert lines[-1]["line"] == first["line"]
    assert lines[-1]["marker"] == first["marker"]
    assert len({(line["line"]["color"], line["line"]["dash"], line["marker"]["symbol"]) for line in lines}) == 10


def test_hostile_text_stays_text(html):
    elements = _Elements(html)
    assert [tag for tag, _ in elements.tags if tag == "script"] == ["script"] * 3
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.tags)
    assert elements.text.count(HOSTILE) >= 6  # title, column, cell, findings, note, circumstance
    hostile = next(figure for figure in _figures(html) if "script" in figure["data"][0]["name"])
    assert "<" not in hostile["data"][0]["name"] + hostile["layout"]["xaxis"]["title"]["text"]


def test_nothing_is_loaded_from_elsewhere(html):
    elements = _Elements(html)
    for tag, attributes in elements.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "srcset", "data", "poster", "action"):
            assert name not in attributes, (tag, name)
    (style,) = (text for tag, text in elements.raw if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_tables_show_the_papers_numbers_beside_ours(html):
    cells = [unescape(cell) for cell in re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", html)]
    assert {"paper", "ours", "81.25", "80.1 ± 0.3", "–"} <= set(cells)
    assert cells[cells.index("AdamW") + 1 :][:2] == ["81.25", "80.1 ± 0.3"]
    assert '<th scope="col" class="number">paper</th>' in html
    assert "<h4>Agrees</h4>" in html
    assert "<strong>the paper</strong>" in html
    assert "torch 2.6, python 3.10" in html


@pytest.mark.parametrize(
    ("exact", "shown"),
    [
        ("90.04 ± 0.31", "90.04 ± 0.31"),
        ("-2.57 ± 2.04 points", "-2.6 ± 2.0 points"),
        ("76.65 ± 1.28", "76.7 ± 1.3"),
        ("νSAM = +3.47 ± 22.4", "νSAM = +3 ± 22"),
        ("98.85 ± 0.00", "98.85 ± 0.00"),
        ("97.72 ± 0.05", "97.72 ± 0.05"),
        ("−1.36 ± 12.93, 1.5", "−1 ± 13, 1.5"),
        ("99.96%", "99.96%"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(exact, shown):
    assert as_certain(exact) == shown
    result = replace(RESULTS[1], columns=["cell"], rows=[{"cell": exact}], findings=exact, notes=[])
    html = unescape(page([result]))
    assert html.count(shown) >= 2
    assert shown == exact or exact not in html


def cells(**row):
    html = page([replace(RESULTS[1], columns=list(row), rows=[row], findings="")])
    return [unescape(cell) for cell in re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", html)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-12.3456789, "-12.35"), (0.000123456, "0.0001235"), (81.25, "81.25"), (1234.5678, "1,235"), (math.nan, "–")],
)
def test_a_number_without_an_error_has_four_digits(value, shown):
    assert shown in cells(slope=value)


def test_an_error_in_the_next_column_rounds_a_number():
    shown = cells(**{"slope": -12.3456789, "s.e.": 1.0345, "other": -1.9912345, "its s.e.": 0.0123456, "last": 3.25})
    assert shown[-5:] == ["-12.3", "1.0", "-1.991", "0.012", "3.25"]
    assert cells(**{"slope": -1.0, "s.e.": None})[-2:] == ["-1", "–"]


def test_results_come_in_reading_order(html):
    anchors = re.findall(r'<section id="([^"]+)"', html)
    assert anchors == ["figure1-full-imagenet", "table2-cpu-cifar-10-2-000-images", "table10-smoke"]
    assert re.findall(r'<li data-for="([^"]+)"', html) == anchors
    assert re.findall(r'name="scale" value="(\w+)"', html) == ["smoke", "cpu", "full"]


STUDY = Result("study", "A study", "desk", "cifar10", ["method"], [{"method": "SAM"}])
DEMO = Result("demo", "A demo", "", "digits", ["method"], [{"method": "SAM"}])


@pytest.mark.parametrize("scale", ["smoke", "desk", "full"])
def test_the_study_comes_first(tmp_path, scale):
    """On the page, whatever else there is and in whatever order it is given."""
    study = replace(STUDY, scale=scale)
    for results in ([*RESULTS, DEMO, study], [study, DEMO, *RESULTS]):
        html = page(results)
        anchors = re.findall(r'<section id="([^"]+)"', html)
        assert anchors[0] == f"study-{scale}-cifar10"
        assert re.findall(r'<li data-for="([^"]+)"', html) == anchors
        assert len(anchors) == 5
    for result in results:
        result.write(tmp_path)
    assert read_all(tmp_path)[0] == study
    assert re.findall(r'name="scale" value="(\w+)"', page([*RESULTS, STUDY])) == ["smoke", "cpu", "desk", "full"]


def test_every_checkbox_has_a_label_and_no_scale_is_not_named():
    html = page([*RESULTS, STUDY, DEMO])
    labels = re.findall(r"<label>.*?>(.*?)</label>", html)
    assert [label.strip() for label in labels] == ["smoke", "cpu", "desk", "full", "without a scale"]
    assert '<p class="quiet">demo, data digits</p>' in html
    assert '<span class="quiet">digits</span>' in html


@pytest.mark.parametrize("error", [0.0, 1e-7, 3e-9])
@pytest.mark.parametrize("value", [-1.0, 0.5, 12345.678])
def test_a_number_whose_error_is_tiny_has_no_tail_of_zeros(value, error):
    shown = cells(**{"slope": value, "s.e.": error})[-2:]
    if error:
        assert float(shown[0]) == pytest.approx(value, abs=1e-9)
        assert float(shown[1]) == pytest.approx(error, rel=0.05)
    else:
        assert shown == cells(slope=value, other=0.0)[-2:]


def test_the_command_looks_where_results_are_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match="must be a folder of saved results, got docs/results"):
        Report()()
    STUDY.write(tmp_path / "runs" / "results")
    assert Report()() == 0
    assert capsys.readouterr().out == "1 result in runs/report.html.\n"
    for result in RESULTS:
        result.write(tmp_path / "docs" / "results")
    Report()()
    assert "3 results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda saved: saved.pop("curves") and saved.pop("title"), "it lacks title"),
        (lambda saved: saved.pop("scale"), "it lacks scale"),
        (lambda saved: saved.update(extra=1), "it has extra, which is unknown"),
        (lambda saved: saved["curves"][0].pop("label"), "a curve lacks label"),
        (lambda saved: saved["curves"][0].update(z=1), "a curve has z, which is unknown"),
        (lambda saved: saved.update(curves=["a"]), "a curve is no JSON object"),
        (lambda saved: saved.update(curves=3), "curves is no list"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path, change, sentence):
    path = RESULTS[2].write(tmp_path)
    saved = json.loads(path.read_text("utf-8"))
    change(saved)
    path.write_text(json.dumps(saved))
    said = _refusal(tmp_path, tmp_path / "report.html")
    assert f"{path} is no saved result ({sentence}); repair or remove it" in said


def test_the_command_reads_a_folder_and_writes_a_page(tmp_path, capsys):
    for result in RESULTS:
        result.write(tmp_path / "results")
    out = tmp_path / "deep" / "report.html"
    assert Report(tmp_path / "results", out)() == 0
    assert capsys.readouterr().out == f"3 results in {out}.\n"
    assert out.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def _refusal(folder, out):
    with pytest.raises(Refused) as refused:
        Report(folder, out)()
    assert not out.is_file()
    assert not list(out.parent.glob("*.partial"))
    sentence = str(refused.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_no_results_are_refused(tmp_path):
    out = tmp_path / "report.html"
    assert "must be a folder" in _refusal(tmp_path / "missing", out)
    assert "no saved results" in _refusal(tmp_path, out)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        json.dumps({"name": "a", "curves": []}).encode(),
        json.dumps({**vars(RESULTS[0]), "rows": None}).encode(),
        json.dumps({**vars(RESULTS[0]), "rows": ["x"]}).encode(),
        json.dumps({**vars(RESULTS[0]), "curves": [vars(_curve("p", "l", error=[0.1]))]}).encode(),
        json.dumps({**vars(RESULTS[0]), "curves": [vars(_curve("p", "l", x=None))]}).encode(),
        json.dumps({**vars(RESULTS[0]), "curves": [vars(_curve("p", "l", x=3))]}).encode(),
        json.dumps({**vars(RESULTS[0]), "curves": [vars(_curve("p", "l", y=["a"] * 5))]}).encode(),
        json.dumps({**vars(RESULTS[0]), "curves": [vars(_curve("p", "l", error=0.5))]}).encode(),
        json.dumps({**vars(RESULTS[0]), "curves": [vars(_curve("p", None))]}).encode(),
        json.dumps({**vars(RESULTS[0]), "columns": [["method"]]}).encode(),
    ],
    ids=[
        "cut",
        "list",
        "empty",
        "not text",
        "fields missing",
        "no rows",
        "odd row",
        "lengths",
        *("x is null", "x is a number", "y is text", "error", "label", "column"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content):
    (tmp_path / "table10-smoke.json").write_bytes(content)
    assert str(tmp_path) in _refusal(tmp_path, tmp_path / "report.html")


def test_a_folder_by_the_name_of_a_result_is_refused(tmp_path):
    (tmp_path / "table10-smoke.json").mkdir()
    assert "can't be read (Is a directory)" in _refusal(tmp_path, tmp_path / "report.html")


def test_a_place_that_cant_be_written_is_refused(tmp_path):
    RESULTS[0].write(tmp_path)
    (tmp_path / "file").write_text("")
    assert "can't be written" in _refusal(tmp_path, tmp_path / "file" / "report.html")
    (tmp_path / "folder").mkdir()
    assert "can't be written" in _refusal(tmp_path, tmp_path / "folder")


# Reports to the page around it, as a frame's width is exact where a window's has a minimum.
_WATCH = """<script>
window.troubles = [];
window.addEventListener("error", (event) => troubles.push(`${event.message}`));
window.addEventListener("unhandledrejection", (event) => troubles.push(`${event.reason}`));
document.addEventListener("securitypolicyviolation", (event) => troubles.push(`blocked ${event.blockedURI}`));
for (const name of ["error", "warn"]) console[name] = (...words) => troubles.push(words.join(" "));
</script>"""
_PROBE = """<script>
const visible = () => [...document.querySelectorAll("main section")].filter((s) => s.offsetHeight).map((s) => s.id);
const status = () => document.getElementById("count").textContent;
const type = (text) => {
  document.getElementById("words").value = text;
  document.getElementById("words").dispatchEvent(new Event("input", { bubbles: true }));
  return { visible: visible(), status: status() };
};
window.addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const found = {
    drawn: plots.map((plot) => plot.querySelectorAll("svg.main-svg .scatterlayer path").length),
    plotWidths: plots.map((plot) => [plot.clientWidth, plot.querySelector(".main-svg").clientWidth]),
    width: root.clientWidth,
    scrollWidth: Math.max(root.scrollWidth, document.body.scrollWidth),
    scrolling: [...document.querySelectorAll(".box")].filter((box) => box.scrollWidth > box.clientWidth).length,
    open: document.getElementById("contents").open,
    all: visible(),
    curves: type("LEARNING curves"),
    nothing: type("no such words"),
    again: type(""),
  };
  document.querySelector("input[value=smoke]").click();
  found.withoutSmoke = visible();
  found.entries = [...document.querySelectorAll("li[data-for]:not([hidden])")].map((entry) => entry.dataset.for);
  found.pwned = window.pwned ?? null;
  found.troubles = troubles;
  parent.postMessage(JSON.stringify(found), "*");
}, 500));
</script>"""


def _in_chromium(tmp_path, html, width):
    """What the probe found in a frame of that width."""
    probed = html.replace("<head>", f"<head>{_WATCH}", 1)
    (tmp_path / "page.html").write_text(probed.removesuffix("</html>") + _PROBE, "utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width: {width}px; height: 844px; border: 0"></iframe><pre>nothing</pre>'
        '<script>window.addEventListener("message", (e) => { '
        'document.querySelector("pre").textContent = e.data; });</script>',
        "utf-8",
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}/user"]
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
    )
    reported = re.search(r"<pre>(\{.*\})</pre>", done.stdout, re.DOTALL)
    assert reported, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(reported[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(tmp_path, html, width):
    found = _in_chromium(tmp_path, html, width)
    assert found["troubles"] == []
    assert found["pwned"] is None
    assert len(found["drawn"]) == PANELS
    assert all(paths > 0 for paths in found["drawn"])
    assert all(drawn == given > 0 for given, drawn in found["plotWidths"])
    assert found["width"] <= width
    assert found["scrollWidth"] <= found["width"]
    assert found["scrolling"] == 2  # the wide tables do, each in its own box
    assert found["open"] == (width > 960)
    figure, table2, table10 = found["all"]
    assert found["curves"] == {"visible": [figure], "status": "1 of 3 results shown"}
    assert found["nothing"] == {"visible": [], "status": "0 of 3 results shown"}
    assert found["again"] == {"visible": [figure, table2, table10], "status": "3 of 3 results shown"}
    assert found["withoutSmoke"] == found["entries"] == [figure, table2]
