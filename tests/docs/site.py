"""Serves the built site, walks its pages in a browser without a head and hears what happened."""

import json
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

# Into every page: what went wrong is told to the page around it.
_WATCH = b"""<head><script>
window.troubles = [];
window.addEventListener("error", (e) => troubles.push(e.message || `${e.target.src || e.target.href} missing`), true);
window.addEventListener("unhandledrejection", (e) => troubles.push(`${e.reason}`));
document.addEventListener("securitypolicyviolation", (e) => troubles.push(`blocked ${e.blockedURI}`));
for (const name of ["error", "warn"]) console[name] = (...words) => troubles.push(words.join(" "));
</script>"""

# Around them: visits each in a frame, then searches in the first.
_WALK = """<!DOCTYPE html><title>walk</title><body><script>
const pages = %s, words = %s;
const until = async (probe) => {
  for (let i = 0; i < 200; i++) {
    const found = probe();
    if (found) return found;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return null;
};
const visit = (frame, page) => new Promise((resolve) => { frame.onload = resolve; frame.src = page; });
const beyond = (frame) => frame.contentDocument.documentElement.scrollWidth - frame.contentWindow.innerWidth;
(async () => {
  const frame = document.createElement("iframe");
  frame.style = "width: 1280px; height: 900px";
  document.body.append(frame);
  const found = { pages: {} };
  for (const page of pages) {
    await visit(frame, page);
    const inside = frame.contentDocument, images = [...inside.images];
    images.forEach((image) => { image.loading = "eager"; });
    await until(() => images.every((image) => image.complete));
    found.pages[page] = {
      troubles: frame.contentWindow.troubles,
      images: images.length,
      broken: images.filter((image) => !image.naturalWidth).map((image) => image.src),
      navigation: inside.querySelectorAll(".md-nav--primary a.md-nav__link").length,
      wide: beyond(frame),
      title: inside.title,
    };
    frame.style.width = "360px";  // a small phone
    await new Promise((resolve) => setTimeout(resolve, 50));
    found.pages[page].wide_on_a_phone = beyond(frame);
    frame.style.width = "1280px";
  }
  await visit(frame, pages[0]);
  const query = frame.contentDocument.querySelector("input.md-search__input");
  frame.contentDocument.querySelector("#__search").checked = true;
  query.focus();
  query.value = words;
  query.dispatchEvent(new frame.contentWindow.KeyboardEvent("keyup", { key: "x", bubbles: true }));
  found.results = await until(() => {
    const links = [...frame.contentDocument.querySelectorAll(".md-search-result__link")];
    return links.length ? links.map((link) => link.getAttribute("href")) : null;
  });
  found.troubles = frame.contentWindow.troubles;
  await fetch("/told", { method: "POST", body: JSON.stringify(found) });
})().catch((error) => fetch("/told", { method: "POST", body: JSON.stringify({ died: `${error.stack}` }) }));
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args, walk, told, missing, **options):
        self.walk, self.told, self.missing = walk, told, missing
        super().__init__(*args, **options)

    def do_GET(self):
        path = self.path.partition("?")[0]
        file = Path(self.translate_path(path))
        if path == "/walk":
            self._send(self.walk)
        elif file.suffix == ".html" and file.is_file():
            self._send(file.read_bytes().replace(b"<head>", _WATCH, 1))
        else:
            super().do_GET()

    def do_POST(self):
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(b"")

    def send_error(self, code, *_):
        if not self.path.startswith("/favicon.ico"):
            self.missing.append(self.path)
        super().send_error(code)

    def log_message(self, *_):
        pass

    def _send(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def walked(site, pages, words, profile):
    """What a browser met on these pages of a built site, and what a search for these words found."""
    told, missing = Queue(), []
    walk = (_WALK % (json.dumps([f"/{page}" for page in pages]), json.dumps(words))).encode()
    with _served(partial(_Handler, directory=site, walk=walk, told=told, missing=missing)) as port:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-port=0", f"http://127.0.0.1:{port}/walk"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while told.empty():
                assert browser.poll() is None, "the browser has ended"
                time.sleep(0.1)
            found = told.get()
        finally:
            browser.kill()
            browser.wait()
    assert "died" not in found, found["died"]
    return {**found, "missing": missing}


@contextmanager
def _served(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
