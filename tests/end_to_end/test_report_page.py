"""Reports: what training writes, as a person sees it in a real browser."""

import json
import threading
from pathlib import Path

import pytest

from megatron.report.command import run as report_command
from megatron.report.live import make_server
from megatron.report.run_folder import RunFolder
from tests.end_to_end.browser import PROGRAM, chromium
from tests.end_to_end.commands import ROOT, SMALL, json_lines, run

browsed = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")

PLOT = "#grid .card:first-child .plot"
OVER = f"{PLOT} .u-over"
ROWS = f"[...document.querySelectorAll('{PLOT} .u-legend tr')]"
LEGEND = f"Object.fromEntries({ROWS}.map(row => [...row.children].map(cell => cell.textContent)))"
RANGES = "JSON.stringify([...cards.values()].map(card => [card.drawn.scales.x.min, card.drawn.scales.x.max]))"
HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The log folder of a run of 20 steps that was resumed after the tenth."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "small.yml").write_text(SMALL.replace("report: false", "report: true"))
    for _ in range(2):
        run(folder, "train.py", "small", "save=run", "load=run", "exit_interval=10", "checkpoint_factor=5")
    return folder / "run" / "logs"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser):
    browser.complaints.clear()
    browser.show_as(1280, 900, "light")
    yield browser
    assert browser.complaints == []


def test_training_leaves_its_report_with_the_last_step_and_how_it_ended(trained):
    assert {"report.html", "report.md", "report.csv"} <= {path.name for path in trained.iterdir()}
    last = json_lines(trained / "metrics.jsonl")[-1]
    assert (trained / "report.csv").read_text().splitlines()[-1].startswith("run,20,")
    tables = (trained / "report.md").read_text()
    assert f"{last['train/lm_loss']:.4g}" in tables and tables.count("| finish | done |") == 2
    assert not list(trained.glob(".report*"))


@browsed
def test_the_report_of_a_run_opens_and_tells_values_and_events_under_the_mouse(trained, page):
    page.open(f"file://{trained}/report.html")
    assert page.value("[...cards.values()].every(card => card.drawn)") and page.value("cards.size") >= 5
    assert page.value("performance.getEntriesByType('resource').length") == 0
    rows = {row["step"]: row for row in json_lines(trained / "metrics.jsonl")}
    seen = []
    for across in (0.3, 0.5, 0.9):
        page.hover(OVER, across)
        page.wait_for(f"{LEGEND}.training !== '–' && {LEGEND}.step !== '{seen[-1] if seen else ''}'")
        values = page.value(LEGEND)
        assert float(values["training"]) == pytest.approx(rows[int(values["step"])]["train/lm_loss"], rel=1e-4)
        assert (values["validation"] == "–") == ("validation/lm_loss" not in rows[int(values["step"])])
        seen.append(int(values["step"]))
    assert seen == sorted(seen) and len(set(seen)) == 3
    assert page.value("[...cards.values()].every(card => card.drawn.cursor.idx === cards.get('loss').drawn.cursor.idx)")
    page.hover(OVER, 0.5)  # of 20 steps
    page.wait_for("document.querySelector('#grid .near').textContent.includes('resume at step 10: ')")
    assert "checkpoint at step 10: " in page.value("document.querySelector('#grid .near').textContent")


@pytest.mark.long
@browsed
def test_the_report_of_the_demo_opens_and_tells_values_under_the_mouse(tmp_path, page):
    """Its data, configuration and two ranks; a tenth of its steps."""
    run(tmp_path, "tools/prepare_data.py", "stdlib")
    few = ("train_iters=40", "eval_interval=20", "eval_iters=2", "checkpoint_factor=20", "num_gpus=2")
    run(tmp_path, "deepy.py", "train.py", ROOT / "configs", *few)
    logs = tmp_path / "checkpoints" / "stdlib" / "logs"
    page.open(f"file://{logs}/report.html")
    assert page.value("[...cards.values()].every(card => card.drawn || card.element.closest('#more'))")
    assert page.value("[...cards.values()].filter(card => card.drawn).length") >= 5
    rows = {row["step"]: row for row in json_lines(logs / "metrics.jsonl")}
    page.hover(OVER, 0.45)  # between steps 20 and 30 of 10 to 40
    page.wait_for(f"{LEGEND}.training !== '–'")
    values = page.value(LEGEND)
    assert float(values["training"]) == pytest.approx(rows[int(values["step"])]["train/lm_loss"], rel=1e-4)


@browsed
def test_all_charts_are_zoomed_by_mouse_buttons_and_keyboard(trained, page):
    page.open(f"file://{trained}/report.html")
    everything = page.value(RANGES)
    assert len(set(map(tuple, json.loads(everything)))) == 1
    page.drag(OVER, 0.25, 0.5)
    page.wait_for(f"{RANGES} !== {everything!r}")
    (low, high), *others = json.loads(page.value(RANGES))
    assert low == pytest.approx(5, abs=0.2) and high == pytest.approx(10, abs=0.2)
    assert others and all(other == [low, high] for other in others)
    page.click(OVER, times=2)
    page.wait_for(f"{RANGES} === {everything!r}")
    for closer, farther in ((lambda: page.click("#closer"), lambda: page.click("#all")),
                            (lambda: page.press("+"), lambda: page.press("0"))):  # fmt: skip
        page.value(f"document.querySelector('{PLOT}').focus()")
        closer()
        page.wait_for(f"{RANGES} !== {everything!r}")
        assert json.loads(page.value(RANGES))[0] == pytest.approx([5, 15], abs=0.2)
        farther()
        page.wait_for(f"{RANGES} === {everything!r}")


@browsed
def test_a_chart_is_read_with_the_keyboard_alone(trained, page):
    page.open(f"file://{trained}/report.html")
    page.value("document.querySelector('#all').focus()")
    for _ in range(30):
        page.press("Tab")
        if page.value("document.activeElement.className === 'plot'"):
            break
    assert page.value("document.activeElement.getAttribute('aria-label')").startswith(
        "Loss over steps. training: from "
    )
    page.press("ArrowRight")
    page.press("ArrowRight")
    loss = json_lines(trained / "metrics.jsonl")[1]["train/lm_loss"]
    assert page.value("document.querySelector('#spoken').textContent").startswith(f"steps 2, training {loss:.4g}")
    page.press("Tab")
    assert page.value("document.activeElement.textContent") == "training"
    page.press("Enter")
    assert page.value("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert page.value("cards.get('loss').drawn.series[1].show") is False


@browsed
def test_axes_scales_and_smoothing_change_what_is_drawn(trained, page):
    page.open(f"file://{trained}/report.html")
    loss = "cards.get('loss').drawn"
    raw = page.value(f"{loss}.data[1]")
    set_to = "(box => {{ box.{} = {}; box.dispatchEvent(new Event('{}')); }})(document.querySelector('{}'))"
    page.value(set_to.format("value", "'10'", "input", "#smoothing"))
    smooth = [value for value in page.value(f"{loss}.data[2]") if value is not None]
    assert min(raw) < min(smooth) and max(smooth) < max(raw)
    assert page.value(f"{loss}.data[1]") == raw
    page.value(set_to.format("checked", "true", "change", "#log-y"))
    page.value(set_to.format("checked", "true", "change", "#log-x"))
    assert page.value(f"[{loss}.scales.x.distr, {loss}.scales.y.distr]") == [3, 3]
    for axis, last in (("tokens", 20 * 8 * 32), ("seconds", None)):
        page.value(set_to.format("value", f"'{axis}'", "change", "#axis"))
        assert last is None or page.value(f"{loss}.scales.x.max") == pytest.approx(last)
    assert page.value(f"{loss}.scales.x.max") < 100


@browsed
def test_texts_of_a_run_are_shown_as_texts(tmp_path, page):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    rows = [{"step": step, "train/lm_loss": 4.0 - step, f"<b>{HOSTILE[:9]}": 1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text(json.dumps({"step": 2, "prompt": "A", "text": HOSTILE}) + "\n")
    (folder / "events.jsonl").write_text(json.dumps({"kind": "spike", "text": HOSTILE, "step": 2}) + "\n")
    report_command([str(folder), "-o", str(tmp_path / "report.html")])
    page.open(f"file://{tmp_path}/report.html")
    assert page.value("document.querySelector('.text').textContent") == f"A{HOSTILE}"
    assert HOSTILE in page.value("document.querySelector('.wordy').textContent")
    assert page.value("document.title") == page.value("document.querySelector('h1').textContent") == folder.name
    page.value("document.querySelector('#more').open = true")
    page.wait_for("document.querySelector('#rest .u-over')")
    assert page.value("document.images.length") == 0 and page.value("window.taken") is None


@browsed
def test_several_runs_lie_over_each_other_and_can_be_hidden(trained, tmp_path, page):
    (tmp_path / "other").mkdir()
    rows = [{"step": step, "train/lm_loss": 2 + 1 / step} for step in range(1, 50_000)]
    rows[30_000]["train/lm_loss"] = 40.0
    (tmp_path / "other" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report_command([str(trained), str(tmp_path / "other"), "-o", str(tmp_path / "report.html")])
    page.open(f"file://{tmp_path}/report.html")
    names = page.value("[...document.querySelectorAll('#overview tbody th')].map(cell => cell.textContent)")
    assert names == ["run", "other"]
    labels = "cards.get('loss').lines.map(line => line.label).join()"
    assert page.value(labels) == "run, training,run, validation,other, training"
    assert page.value("Math.max(...cards.get('loss').lines[2].ys)") == 40, "the spike is drawn"
    page.click("#runs label:last-child input")
    assert page.value(labels) == "run, training,run, validation"
    assert page.value("cards.get('loss').drawn.scales.x.max") == 20


@browsed
@pytest.mark.parametrize("width", [360, pytest.param(1280, marks=pytest.mark.long)])
def test_nothing_is_wider_than_the_window_in_either_theme(trained, page, width):
    shades = []
    for scheme in ("light", "dark"):
        page.show_as(width, 780, scheme)
        page.open(f"file://{trained}/report.html")
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.value("[...cards.values()].every(card => card.drawn.width <= card.plot.clientWidth)")
        shades.append(
            page.value("[getComputedStyle(document.body).backgroundColor, cards.get('loss').lines[0].stroke]")
        )
    assert shades[0][0] != shades[1][0] and shades[0][1] != shades[1][1]


@browsed
def test_a_dark_page_is_printed_light_and_is_dark_again(trained, page):
    page.show_as(1280, 900, "dark")
    page.open(f"file://{trained}/report.html")
    look = "[cards.get('loss').lines[0].stroke, cards.get('loss').drawn.width]"
    page.value(f"addEventListener('beforeprint', () => {{ window.onPaper = {look}; }})")
    assert page.printed().startswith(b"%PDF")
    page.wait_for("!document.documentElement.classList.contains('printing')")
    stroke, width = page.value("window.onPaper")
    assert stroke != page.value("cards.get('loss').lines[0].stroke") and 500 < width < 700


@browsed
def test_a_live_page_follows_its_run_and_keeps_what_was_chosen(tmp_path, page):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text("")
    server = make_server([RunFolder(metrics.parent)], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page.open(f"http://127.0.0.1:{server.server_address[1]}/")
        assert "no step has been logged" in page.value("document.body.innerText")
        with metrics.open("a") as file:
            file.write("".join(json.dumps({"step": step, "train/lm_loss": 5 - step}) + "\n" for step in range(1, 4)))
        page.wait_for("cards.get('loss')?.drawn")
        page.click("#log-y")
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 4, "train/lm_loss": 1.25}) + "\n")
        page.wait_for("cards.get('loss').lines[0].ys.at(-1) === 1.25")
        assert page.value("cards.get('loss').drawn.scales.y.distr") == 3
    finally:
        server.shutdown()
        server.server_close()
