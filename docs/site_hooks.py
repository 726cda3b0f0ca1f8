"""Hooks for mkdocs: what pages link to outside docs/ joins the site, so that it is whole without a network."""

import re
from pathlib import Path
from posixpath import relpath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
MATH = re.compile(  # but for code: an equation by itself, one in a line
    r"^(?P<fence>```+).*?^(?P=fence)$|`[^`\n]+`"
    r"|^\$\$\n(?P<alone>.+?)(?:\\tag\{(?P<number>.+?)\})?\n\$\$$|\$(?P<inline>[^$\s][^$\n]*)\$",
    re.MULTILINE | re.DOTALL,
)
ADDED: dict[str, Path] = {}  # what is on the site under repository/
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and those that these link to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            uri = _uri(target)
            if DOCS in target.parents or uri in files.src_uris or not target.is_file():
                continue  # what is missing is mkdocs' own to report
            files.append(_added(target, uri, config))
            if target.suffix == ".md" and not _is_shown_as_code(target):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links where the files are on the site, and set equations, which browsers show without a script."""
    uri = page.file.src_uri
    source = ADDED.get(uri, DOCS / uri)
    folder = uri.rpartition("/")[0]

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        return relpath(_uri(target), folder or ".") if target.is_file() else match[1]

    return MATH.sub(_set, LINK.sub(moved, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Where code stands beside equations, show it unfolded."""
    return html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')


def _set(match: re.Match[str]) -> str:
    if match["inline"]:
        return convert(match["inline"])
    if not match["alone"]:
        return match[0]
    number = f'<span class="number">({match["number"]})</span>' if match["number"] else ""
    return f'<div class="equation">{convert(match["alone"], display="block")}{number}</div>'


def _targets(page: Path) -> list[Path]:
    return [(page.parent / link).resolve() for link in LINK.findall(page.read_text("utf-8"))]


def _uri(target: Path) -> str:
    """Where a file of the repository is on the site, which has no hidden folders."""
    if DOCS in target.parents:
        return target.relative_to(DOCS).as_posix()
    path = target.relative_to(ROOT).as_posix().removeprefix(".")
    return f"repository/{path}" + (".md" if _is_shown_as_code(target) else "")


def _is_shown_as_code(target: Path) -> bool:
    return target.suffix == ".py" or target.parts[-2] == "ISSUE_TEMPLATE"


def _added(target: Path, uri: str, config: MkDocsConfig) -> File:
    ADDED[uri] = target
    if target.suffix not in (".py", ".md"):
        return File.generated(config, uri, abs_src_path=str(target))
    text = target.read_text("utf-8")
    if _is_shown_as_code(target):
        language = "python" if target.suffix == ".py" else "markdown"
        text = f"# {target.relative_to(ROOT).as_posix()}\n\n`````{language}\n{text}`````\n"
    return File.generated(config, uri, content=UNSEARCHED + text)
