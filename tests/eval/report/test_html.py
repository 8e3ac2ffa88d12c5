"""The one-page report: it stands alone, it escapes what it shows, and it works in a real browser."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.synthetic_runs import write_run
from eval.eval_parse import main

HOSTILE = "<script>document.title='owned'</script>&\"'"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        write_run(folder / "runs", "search", seed, target=0.05)
        write_run(folder / "runs", "uniform", seed, (8,), metrics={"validation": {"accuracy": 0.5}})
    write_run(folder / "runs", "float", 0, (16,), model=HOSTILE, folder="hostile")
    write_run(folder / "runs", "search", 7, target=0.05, status="failed", reason=HOSTILE)
    assert main([str(folder / "runs"), "--html", str(folder / "report.html"), "--output_dir", str(folder / "out")]) == 0
    return (folder / "report.html").read_text()


def test_needs_no_network(page):
    links = re.findall(r'(?:src|href|xlink:href|url)\s*[=(]\s*"?([^"\s)>]+)', page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "Content-Security-Policy" in page and "@import" not in page


def test_escapes_what_records_say(page):
    assert HOSTILE not in page and "&lt;script&gt;" in page


def test_pictures_take_the_colours_of_the_page(page):
    assert page.count("<svg") >= 6
    assert "currentColor" in page and "var(--grid)" in page and "#1f2429" not in page.split("</style>", 1)[1]


def test_says_what_was_left_out(page):
    assert "1 left out" in page and 'id="left-out"' in page


class Browser:
    """Headless Chromium: the document's title after a script has run in the page."""

    def __init__(self, folder: Path):
        self.folder = folder

    def title_after(self, page: str, script: str, *flags: str) -> str:
        path = self.folder / "page.html"
        path.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
        quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            *quiet,
            *flags,
            "--dump-dom",
        ]
        command += [f"--user-data-dir={self.folder}/profile", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1])


@pytest.fixture
def browser(tmp_path) -> Browser:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    return Browser(tmp_path)


def test_headings_sort_up_then_down_with_empty_cells_last(browser, page):
    script = """
        const table = document.querySelectorAll("table")[1];
        const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.startsWith("target"));
        const read = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.sort || "-").join(" ");
        const click = () => table.tHead.rows[0].cells[column].firstElementChild.click();
        const seen = [];
        for (const _ of [1, 2]) { click(); seen.push(read()); }
        const accuracy = [...table.tHead.rows[0].cells].find((cell) => cell.textContent.startsWith("accuracy"));
        accuracy.firstElementChild.click();
        const values = [...table.tBodies[0].rows].map((row) => +row.cells[accuracy.cellIndex].dataset.sort);
        seen.push(values.every((value, i) => i === 0 || values[i - 1] <= value));
        document.title = seen.join("|");
    """
    up, down, sorted_by_accuracy = browser.title_after(page, script).split("|")
    assert up.split() == down.split() == ["0.05", "0.05", "-", "-", "-"]
    assert sorted_by_accuracy == "true"


def test_hostile_text_does_not_run(browser, page):
    assert browser.title_after(page, "") == "Mixed-precision results: digits"


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    """Chromium's own window is never narrower than 500 pixels: the page stands in a frame."""
    script = f"""
        const frame = document.createElement("iframe");
        frame.style.width = "{width}px"; frame.style.height = "800px";
        frame.srcdoc = document.querySelector("#copy").textContent;
        frame.onload = () => {{
          const page = frame.contentDocument.documentElement;
          document.title = [page.clientWidth, page.scrollWidth, page.querySelectorAll("svg").length].join(" ");
        }};
        document.body.append(frame);
    """
    wrapper = f"<!doctype html><title></title><body><pre id=copy hidden>{html.escape(page)}</pre></body>"
    shown, needed, pictures = map(int, browser.title_after(wrapper, script, "--virtual-time-budget=5000").split())
    assert width - 20 <= shown <= width and needed <= shown and pictures >= 6


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(browser, page, dark):
    script = """
        const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
        const paper = light(rgb(getComputedStyle(document.body).backgroundColor));
        const ratios = ["body", "p", "td", "a", "svg text", "figcaption span"].map((what) => {
          const style = getComputedStyle(document.querySelector(what));
          const ink = light(rgb(what === "svg text" ? style.fill : style.color));
          return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        });
        document.title = [paper, ...ratios].join(" ");
    """
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    paper, *ratios = map(float, browser.title_after(page, script, *flags).split())
    assert (paper < 0.1) == dark
    assert min(ratios) >= 4.5  # WCAG AA
