"""``make test-docs``: the notebook runs, and no page of the site is wider than its screen."""

import contextlib
import functools
import http.server
import json
import queue
import re
import shutil
import subprocess
import threading

from pages import ROOT

from bench.notebook import NOTEBOOK, executed

SITE = ROOT / "build" / "site"
WIDTHS = (390, 1280)  # pixels: a telephone, a notebook
# Loads each page into a frame of each width, and tells what is wider than the frame and neither
# scrolls nor is in something that does; then every picture that was not loaded.
HARNESS = """<!doctype html><body><script>
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
  await fetch("/result", {method: "POST", body: JSON.stringify(found)});
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


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site and the harness, and takes the harness's result."""

    def __init__(self, *args, harness, results, **options):
        self.harness, self.results = harness, results
        super().__init__(*args, directory=SITE, **options)

    def do_GET(self):
        if self.path != "/harness":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.harness.encode())

    def do_POST(self):
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_no_page_is_wider_than_its_screen(tmp_path):
    assert (SITE / "index.html").is_file(), "make docs builds the site"
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "apt-get install chromium"
    pages = [p.relative_to(SITE).as_posix() for p in sorted(SITE.rglob("*.html"))]
    pages.remove("404.html")
    assert len(pages) > 25
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    results = queue.Queue()
    handler = functools.partial(Handler, harness=text, results=results)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
            "--window-size=1400,1000", "--remote-debugging-port=0",
            f"http://127.0.0.1:{server.server_port}/harness",
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as browser:
            try:
                assert answer(results, browser) == []
            finally:
                browser.kill()
                server.shutdown()


def answer(results: queue.Queue, browser: subprocess.Popen) -> list[str]:
    """The harness's result, as soon as it is there; an error if the browser ends before."""
    while browser.poll() is None:
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
    raise AssertionError(f"chromium ended with {browser.returncode}")
