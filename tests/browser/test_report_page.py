"""The report in a real browser: nothing overflows, nothing is empty, nothing is loaded, at a desk's and at a phone's width."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from synthetic_study import Planted, write_study  # noqa: E402

from plasticity_jax.config import GridConfig  # noqa: E402
from plasticity_jax.report.figures import figures  # noqa: E402
from plasticity_jax.report.page import collect, write_report  # noqa: E402

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"  # Debian's package; .ci/run installs it

# Runs inside the page: what stands out to the right (but for what lies in a box that scrolls), what has no size, what was loaded.
MEASURE = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const width = document.documentElement.clientWidth;
  const scrolls = e => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const boxes = [...document.querySelectorAll("main *, header *, footer *")].filter(e => !e.closest("svg") || e.matches("svg"));
  parent.postMessage(JSON.stringify({
    client: width,
    scroll: document.documentElement.scrollWidth,
    outside: boxes.filter(e => !scrolls(e.parentElement) && e.getBoundingClientRect().right > width + 1).map(e => e.tagName + "." + e.className),
    figures: [...document.querySelectorAll("figure svg")].map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height]),
    columns: getComputedStyle(document.querySelector(".figures")).gridTemplateColumns.split(" ").length,
    loaded: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
    smallest: Math.min(...boxes.filter(e => e.childElementCount === 0 && e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize))),
  }), "*");
});
</script></body>
"""


def _chromium(tmp_path: Path, *arguments: str) -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def _measure(page: Path, tmp_path: Path, width: int) -> dict:
    """Opens a copy of the page, with the script above, in a frame of this width: a headless window cannot be as narrow as a phone."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))  # the page's own policy would refuse the script
    (tmp_path / "copy.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    frame = f"""<!DOCTYPE html><body style="margin:0">
    <iframe src="copy.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="out"></pre>
    <script>addEventListener("message", e => document.getElementById("out").textContent = "RESULT" + e.data + "END")</script></body>"""
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    dom = _chromium(tmp_path, "--virtual-time-budget=10000", "--window-size=1400,1000", "--dump-dom", (tmp_path / "frame.html").as_uri())
    found = re.search(r'id="out">RESULT(.*?)END', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    whole = write_study(folder / "whole")
    partial = write_study(folder / "partial", Planted(loss=(3.3, 3.2, 3.1, None, None)), stages=("prepare", "init", "pretrain"))
    faceted = write_study(folder / "faceted", Planted(grid=GridConfig(fields=(("train.peak_lr", (1e-3, 5e-3)),))))
    return {"whole": write_report(collect(whole)), "partial": write_report(collect(partial)), "faceted": write_report(collect(faceted))}


@pytest.mark.parametrize("which", ["whole", "partial", "faceted"])
@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (400, 1)])
def test_page_fits_its_width(pages, tmp_path, which, width, columns):
    found = _measure(pages[which], tmp_path, width)
    assert found["client"] == width
    assert found["scroll"] <= width, "the page itself scrolls sideways"
    assert found["outside"] == []
    assert found["columns"] == columns
    parts = [name for name, figure in figures().items() if not figure.of_study and name != "stability"]  # the study does not measure forgetting
    assert len(found["figures"]) == {"whole": len(parts), "partial": 2, "faceted": 2 * len(parts) + 2}[which]
    assert all(w > 250 and h > 150 for w, h in found["figures"])
    assert found["loaded"] == []
    assert found["smallest"] >= 10


SORT = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("#members table"), header = [...table.tHead.rows[0].cells].find(c => c.textContent.startsWith("held-out loss"));
  const column = () => [...table.tBodies[0].rows].map(r => r.cells[header.cellIndex].textContent);
  const found = [column()];
  for (let i = 0; i < 2; i++) {
    const button = header.querySelector("button");
    button.focus();
    found.push(document.activeElement === button);
    button.click();
    found.push(header.getAttribute("aria-sort"), column());
  }
  document.body.textContent = "RESULT" + JSON.stringify(found) + "END";
});
</script></body>
"""


def test_headers_sort_a_column_and_say_so(tmp_path):
    page = write_report(collect(write_study(tmp_path / "study", Planted(loss=(3.3, None, 3.1, 3.2)), stages=("prepare", "init", "pretrain"))))
    text = page.read_text(encoding="utf-8")
    assert "RESULT" not in _chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", page.as_uri())
    refused = tmp_path / "refused.html"
    refused.write_text(text.replace("</body>", SORT), encoding="utf-8")
    dom = _chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", refused.as_uri())
    assert "RESULT[" not in dom, "the policy lets a script in that is not the page's own"
    assert "<button" in dom, "and refuses the page's own"
    copy = tmp_path / "copy.html"
    copy.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", SORT), encoding="utf-8")
    found = re.search("RESULT(.*?)END", _chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()))
    assert found and json.loads(found[1]) == [
        ["3.300", "–", "3.100", "3.200"],
        *(True, "ascending", ["3.100", "3.200", "3.300", "–"]),
        *(True, "descending", ["3.300", "3.200", "3.100", "–"]),
    ]


def test_screenshots_show_something(pages, tmp_path):
    from matplotlib.image import imread

    for width in (1280, 500):
        shot = tmp_path / f"{width}.png"
        _chromium(tmp_path, f"--screenshot={shot}", f"--window-size={width},3000", pages["whole"].as_uri())
        image = imread(shot)
        assert image.shape[:2] == (3000, width)
        # Ink in every quarter of the page's height, on a light ground.
        assert all(0.002 < (quarter[..., :3].mean(axis=-1) < 0.6).mean() < 0.3 for quarter in (image[i : i + 750] for i in range(0, 3000, 750)))
