"""The one-page report: it needs no network, it escapes what it shows, and its figures answer to a real pointer."""

import re
from pathlib import Path

import pytest

from benchmarks.synthetic_runs import write_run
from eval.eval_parse import main

HOSTILE = "<script>document.title='owned'</script></script>&\"'%{x}"
FIGURE = "[...document.querySelectorAll('figure')].find((own) => own.textContent.includes('{}'))"
FRONT = FIGURE.format("convnet: accuracy against")
POINT = f"{FRONT}.querySelector('.scatterlayer .points path')"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        run = write_run(folder / "runs", "search", seed, target=0.05)
        write_run(folder / "runs", "uniform", seed, (8,), metrics={"validation": {"accuracy": 0.5}})
    write_run(folder / "runs", "float", 0, (16,), model=HOSTILE, folder="hostile", classes=[HOSTILE, "ship"])
    layers = {HOSTILE: ["int4", "int4"], "b": ["int8", "int8"]}
    write_run(folder / "runs", "search", 3, target=0.06, model=HOSTILE, folder="hostile search", assignment=layers)
    write_run(folder / "runs", "search", 7, target=0.05, status="failed", reason=HOSTILE)
    (run / "sensitivity.csv").write_text("decision,measured int4,measured int4 error\nconvs.0,0.0125,0.001\n")
    assert main([str(folder / "runs"), "--html", str(folder / "report.html"), "--output_dir", str(folder / "out")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(report) -> str:
    """The page without the library's script."""
    return re.sub(r"<script>/\*\*\n\* plotly\.js.*?</script>", "", report.read_text(), flags=re.DOTALL)


def test_the_page_holds_the_library_once_and_is_a_few_megabytes(report, page):
    text = report.read_text()
    assert text.count("* plotly.js v") == 1 and "* plotly.js v" not in page
    assert len(page) < 1e6 and len(text) < 8e6


def test_needs_no_network(page):
    links = re.findall(r'(?:src|href|xlink:href|url)\s*[=(]\s*"?([^"\s)>]+)', page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "Content-Security-Policy" in page and "@import" not in page


def test_escapes_what_records_say(page):
    assert HOSTILE not in page and "&lt;script&gt;" in page and "\\u003cscript\\u003e" in page
    assert page.count("<script") == page.count("</script>") == page.count("application/json") + 2


def test_pictures_take_the_colours_of_the_page(page):
    assert page.count("<svg") >= 6
    static = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "currentColor" in static and "var(--grid)" in static and "#1f2429" not in static


def test_says_what_was_left_out(page):
    assert "1 left out" in page and 'id="left-out"' in page
    assert "1 run or file was left out (failed)" in page


def test_a_report_without_pictures_leaves_the_library_out(tmp_path):
    write_run(tmp_path / "runs", "float", 0, (16,))
    main([str(tmp_path / "runs"), "--html", str(tmp_path / "page.html"), "--no_plots"])
    text = (tmp_path / "page.html").read_text()
    assert "plotly" not in text and "What was found" in text


def test_opens_without_a_network_and_without_an_error(browser, report):
    browser.open(report)
    browser.wait_for("document.querySelectorAll('.answers').length > 0")
    browser.evaluate("scrollTo(0, document.body.scrollHeight)")
    browser.wait_for("document.querySelector('figure:last-of-type').classList.contains('answers')")
    assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data"}
    assert not browser.errors


def test_a_point_of_the_front_shows_its_run(browser, report):
    browser.open(report, 1400)
    browser.evaluate(f"{FRONT}.scrollIntoView()")
    browser.wait_for(f"!!{POINT}")
    texts = browser.evaluate(f"{FRONT}.querySelector('.live').data.flatMap((trace) => trace.customdata ?? [])")
    shown = browser.point_at(POINT)
    assert shown in texts
    run = next(text for text in texts if text.startswith("search") and "seed 1" in text.splitlines()[0])
    for what in ("compute cost", "accuracy 0.", "whole file", "convs.", "int"):
        assert what in run
    assert browser.evaluate("getComputedStyle(document.querySelector('#tip')).display") == "block"
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    browser.wait_for("document.querySelector('#tip').hidden")


def test_a_layer_shows_its_format_share_and_sensitivity(browser, report):
    browser.open(report, 1400)
    heat = FIGURE.format("convnet: formats of the weights") + ".querySelector('.live')"
    browser.evaluate(f"{heat}.parentNode.scrollIntoView()")
    browser.wait_for(f"!!{heat}.querySelector('.nsewdrag')")
    texts = browser.evaluate(f"{heat}.data[0].customdata.flat()")
    measured = next(text for text in texts if text.startswith("convs.0\n") and "sensitivity" in text)
    assert "weights int" in measured and "% of the compute cost" in measured and "MACs" in measured
    assert "sensitivity, measured int4: 0.0125 ± 0.001" in measured
    assert browser.point_at(f"{heat}.querySelector('.nsewdrag')") in texts


def test_a_bar_shows_its_layer(browser, report):
    browser.open(report, 1400)
    bars = FIGURE.format("convnet: search ≤ 0.05 GBOPs · seed 0")
    browser.evaluate(f"{bars}.scrollIntoView()")
    browser.wait_for(f"!!{bars}.querySelector('.bars .point path')")
    shown = browser.point_at(f"{bars}.querySelector('.bars .point path')")
    assert "weights int" in shown and "% of the compute cost" in shown


def test_hostile_text_does_not_run(browser, report):
    browser.open(report)
    front, bars = (FIGURE.format(f"owned{what}") for what in ("\\'</script></script>&\"\\'%{x}: accuracy", ""))
    bars = bars.replace("own.textContent", "own.textContent.includes('Format of each layer') && own.textContent")
    browser.evaluate(f"{front}.scrollIntoView()")
    browser.wait_for(f"!!{front}.querySelector('.scatterlayer .points path')")
    texts = browser.evaluate(f"{front}.querySelector('.live').data.flatMap((trace) => trace.customdata ?? [])")
    assert any(HOSTILE in text for text in texts)
    browser.evaluate(f"{bars}.scrollIntoView()")
    browser.wait_for(f"!!{bars}.querySelector('.bars .point path')")
    assert HOSTILE in browser.point_at(f"{bars}.querySelector('.bars .point path')")
    assert HOSTILE in browser.evaluate(f"{bars}.querySelector('.live .yaxislayer-above').textContent")
    assert HOSTILE in browser.evaluate("document.querySelector('#found + .found').textContent")
    assert browser.evaluate("document.title") == "Mixed-precision results: digits"
    assert not browser.errors


def test_headings_sort_up_then_down_with_empty_cells_last(browser, report):
    browser.open(report)
    found = browser.evaluate("""(() => {
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
        return seen;
    })()""")
    assert found == ["0.05 0.05 0.06 - - -", "0.06 0.05 0.05 - - -", True]


@pytest.mark.parametrize("width", [400, 1400])
def test_figures_use_the_width_and_nothing_is_wider_than_the_screen(browser, report, width):
    browser.open(report, width)
    browser.evaluate("scrollTo(0, document.body.scrollHeight)")
    browser.wait_for("document.querySelectorAll('.answers').length > 1")
    needed, shown = browser.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert needed <= shown == width
    tops, widths = browser.evaluate("""(() => {
        const boxes = [...document.querySelectorAll(".pictures")].find((own) => own.children.length > 1).children;
        const places = [...boxes].slice(0, 2).map((box) => box.getBoundingClientRect());
        return [places.map((place) => place.top), places.map((place) => place.width)];
    })()""")
    assert (tops[0] == tops[1]) == (width == 1400)
    assert sum(widths) > 0.9 * width


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(browser, report, dark):
    browser.open(report, dark=dark)
    browser.evaluate(f"{FRONT}.scrollIntoView()")
    browser.wait_for(f"!!{POINT}")
    browser.point_at(POINT)
    paper, *ratios = browser.evaluate("""(() => {
        const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
        const paper = light(rgb(getComputedStyle(document.body).backgroundColor));
        const texts = ["body", "p", "td", "a", "h4", ".static svg text", ".live text", "figcaption span", "#tip"];
        const ratios = texts.map((what) => {
          const style = getComputedStyle(document.querySelector(what));
          const ink = light(rgb(what.endsWith("text") ? style.fill : style.color));
          return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        });
        return [paper, ...ratios];
    })()""")
    assert (paper < 0.1) == dark
    assert min(ratios) >= 4.5  # WCAG AA


def test_figures_follow_a_change_of_the_colour_scheme(browser, report):
    browser.open(report, dark=False)
    browser.wait_for("!!document.querySelector('.live text')")
    before = browser.evaluate("getComputedStyle(document.querySelector('.live text')).fill")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait_for(f"getComputedStyle(document.querySelector('.live text')).fill !== '{before}'")


SHOWN = "[...document.querySelectorAll('{}')].filter((own) => own.getBoundingClientRect().height > 0).length"


@pytest.mark.parametrize("how", [{"media": "print"}, {"scripts": False}], ids=["print", "no scripts"])
def test_pictures_are_static_in_print_and_without_scripts(browser, report, how):
    browser.open(report, **how)
    pictures = browser.evaluate("document.querySelectorAll('figure').length")
    assert browser.evaluate(SHOWN.format(".static")) == pictures >= 6
    assert browser.evaluate(SHOWN.format(".live")) == 0
