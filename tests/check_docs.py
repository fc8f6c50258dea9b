"""``make test-docs``: the notebook runs, and no page of the site is wider than its screen."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from pages import ROOT

from bench.notebook import NOTEBOOK, executed

SITE = ROOT / "build" / "site"
WIDTHS = (390, 1280)  # pixels: a telephone, a notebook
# Loads each page into a frame of each width, and tells what is wider than the frame and neither
# scrolls nor is in something that does; then every picture that was not loaded.
HARNESS = """<!doctype html><pre id="result"></pre><script>
const found = [];
function inside(element, body) {
  for (let e = element; e && e !== body; e = e.parentElement)
    if (/auto|scroll|hidden|clip/.test(getComputedStyle(e).overflowX)) return true;
  return false;
}
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.src = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const inner = frame.contentDocument, root = inner.documentElement;
  if (!inner.querySelector("article")) found.push(`${page} ${width}: no article`);
  const wide = root.scrollWidth;
  if (wide > width) found.push(`${page} ${width}: the page is ${wide} wide`);
  for (const e of inner.querySelectorAll("article *")) {
    const right = e.getBoundingClientRect().right;
    if (right > width + 1 && !inside(e, inner.body))
      found.push(`${page} ${width}: <${e.tagName}> ${e.textContent.slice(0, 40)} ends at ${right}`);
    if (e.tagName === "IMG" && !e.naturalWidth) found.push(`${page}: ${e.src} is not there`);
  }
  frame.remove();
}
(async () => {
  for (const page of PAGES) for (const width of WIDTHS) await look(page, width);
  document.getElementById("result").textContent = JSON.stringify(found);
})();
</script>"""


def test_the_notebook_runs_and_its_clones_are_worse_of_the_defended_network():
    texts = [
        output["text"]
        for cell in executed().cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    ]
    clones = re.findall(r"^(plain|defended) +(\w+).* clone ([\d.]+)%", "".join(texts), re.M)
    accuracy = {(victim, thief): float(x) for victim, thief, x in clones}
    assert len(accuracy) == 6
    for thief in ("probabilities", "classes"):
        assert accuracy["defended", thief] < accuracy["plain", thief] - 10
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert "clone" in json.dumps([cell.get("outputs") for cell in kept])


@pytest.fixture(scope="module")
def server():
    """The address of the built site."""
    assert (SITE / "index.html").is_file(), "make docs builds the site"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_no_page_is_wider_than_its_screen(server, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "apt-get install chromium"
    pages = [p.relative_to(SITE).as_posix() for p in sorted(SITE.rglob("*.html"))]
    pages = [page for page in pages if page not in ("404.html", "harness.html")]
    assert len(pages) > 25
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    harness = SITE / "harness.html"
    harness.write_text(text)
    try:
        shown = dom(chromium, f"{server}/harness.html", tmp_path)
    finally:
        harness.unlink()
    (result,) = re.findall(r'<pre id="result">(.*?)</pre>', shown, re.S)
    assert result, "the pages were not all loaded"
    assert json.loads(html.unescape(result)) == []


def dom(chromium: str, address: str, profile: Path) -> str:
    """The page as its scripts leave it; time stands still while pages load."""
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--window-size=1400,1000", "--virtual-time-budget=600000", "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
