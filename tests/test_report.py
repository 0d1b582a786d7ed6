"""bin/report: a page from runs' metrics, opened in a browser, and what it says of runs that have none."""

from __future__ import annotations

import base64
import csv
import functools
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapse_elmo import report
from lapse_elmo.errors import ConfigError, OutputError
from lapse_elmo.metrics.server_meter import band_ends
from lapse_elmo.mpi.world import solo
from lapse_elmo.report.charts import (
    _draw_bands,
    _draw_heldout,
    _draw_local_share,
    _draw_loss,
    _draw_owners,
    charts_of,
    figure_of,
)
from lapse_elmo.report.runs import Run, read_run
from lapse_elmo.trained import load
from tests.mpi import ROOT
from tests.training.corpora import prepare, train_alone

CONFIG = '[data]\nshards = "corpus/shards"\n[model]\nprojection_size = 16\n[training]\nseed = 7\n'


def records(num_nodes: int) -> list[dict]:
    """Return the metrics of two reports, as a run of ``num_nodes`` nodes writes them."""
    lines: list[dict] = []
    for step in (10, 20):
        train: dict = {"kind": "train", "step": step, "train/loss_nats": 6.0 - step / 10, "train/tokens_per_s": 100.0}
        train |= {"train/trained_tokens": 1000 * step, "train/learning_rate": 0.2}
        train |= {f"step/{name}_s": 0.1 for name in ("pull", "compute", "agree", "push")}
        for name in ("embedding", "softmax"):
            train[f"server/{name}_local_share"] = 0.9 + step / 1000
            train |= {f"server/{name}_{what}_rows": 5.0 for what in ("relocated", "replicated", "synchronised")}
        lines.append(train)
        bands = {"ends": [1, 3, 9], "main": [[1, 1, 4], [0, 1, 2]], "replicas": [[0, 1, 1], [1, 0, step // 10]]}
        one = {"ends": [1, 3, 9], "main": [[1, 2, 6]], "replicas": [[0, 0, 0]]}
        shown = bands if num_nodes > 1 else one
        lines.append({"kind": "placement", "step": step, "embedding": shown, "softmax": shown})
    return [*lines, {"kind": "epoch", "step": 20, "train/trained_tokens": 20000, "heldout/mean_perplexity": 90.0}]


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(CONFIG)
    (folder / "versions.toml").write_text('torch = "9.8.7"\n')
    return folder


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_page_of_one_run(num_nodes: int, tmp_path: Path) -> None:
    run = write(tmp_path / "run", records(num_nodes))
    report.main([str(run)], solo)
    page = (run / "report.html").read_text()
    assert ("Local share" in titles(page)) == ("Rows on each node" in titles(page)) == (num_nodes > 1)
    assert {"Loss", "Held-out perplexity", "Speed", "Learning rate", "Time by phase"} <= set(titles(page))
    assert "Noise scale" not in titles(page) and "Batch" not in titles(page)
    for text in ("corpus/shards", "9.8.7", "training.seed", ">90.0<", "tokens trained"):
        assert text in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs another file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    lines = records(2)
    trains = [line for line in lines if line["kind"] == "train"]
    for line, rank in zip(trains, (5, 5), strict=True):
        line |= {"ranks/slowest": rank, "ranks/slowest_host": "host7"}
        line |= {"ranks/slowest_compute_s": line["step"] / 10, "ranks/slowest_pull_s": 0.25}
    report.main([str(write(tmp_path / "run", lines))], solo)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "5 on host7 (2 of 2 reports; s/step: pull 0.250, compute 1.500)" in page


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, records(1)) for name in ("first", "<second>")]
    report.main([*map(str, runs), "--output", str(tmp_path / "both.html")], solo)
    page = (tmp_path / "both.html").read_text()
    assert "<second>" not in page and page.count("&lt;second&gt;") > 3
    assert "Time by phase (first)" in titles(page)
    data = re.search(r"base64,([^\"]+)", page)
    assert data
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(data.group(1)).decode())))
    assert [(r["run"], r["kind"], r["step"]) for r in rows[:3]] == [
        ("first", "train", "10"), ("first", "train", "20"), ("first", "epoch", "20")
    ]
    assert len(rows) == 6 and rows[0]["train/loss_nats"] == "5.0"
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_charts_show_the_metrics(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", records(2)), "run")
    assert run.series("train/loss_nats", tokens=True) == ([10_000, 20_000], [5.0, 4.0])
    share = figure_of(lambda axis: _draw_local_share(axis, run)).axes[0]
    np.testing.assert_allclose(np.array(share.lines[1].get_ydata()), [91.0, 92.0])
    # Two segments of alike bands: main copies 6 and 3 of each, replicas 2 and 2 or 3.
    owners = figure_of(lambda axis: _draw_owners(axis, run)).axes[0]
    assert [np.array(line.get_ydata()).tolist() for line in owners.lines] == [[12, 12], [4, 4], [6, 6], [4, 6]]
    bands = figure_of(lambda axis: _draw_bands(axis, run)).axes[0]
    np.testing.assert_allclose(np.array(bands.collections[0].get_array()).T, [[1, 1 / 2, 2 / 6], [1, 1 / 2, 3 / 6]])


def test_more_than_ten_runs_look_different() -> None:
    runs = [Run(f"run {number}", records(1)[:1], records(1)[-1:], []) for number in range(25)]
    for draw in (_draw_loss, _draw_heldout):
        (axis,) = figure_of(functools.partial(draw, runs=runs, tokens=False, x_label="step")).axes
        named = [line for line in axis.lines if str(line.get_label()).startswith("run")]
        assert len({(line.get_color(), line.get_linestyle()) for line in named}) == len(named) == 25


def test_a_run_that_changes_its_number_of_nodes(tmp_path: Path) -> None:
    """A run is resumed on one node, then on two: its line of the second node has a gap."""
    lines = records(2)
    for number, line in enumerate([*records(1), *records(2)], 3):
        lines.append({**line, "step": 10 * number})
    owners = figure_of(lambda axis: _draw_owners(axis, read_run(write(tmp_path / "run", lines), "run"))).axes[0]
    main = [np.array(line.get_ydata()) for line in owners.lines[::2]]
    np.testing.assert_array_equal(main, [[12, 12, 18, 18, 12, 12], [6, 6, np.nan, np.nan, 6, 6]])


def test_a_line_that_is_not_complete_is_left_out(tmp_path: Path) -> None:
    """A run may be writing it, or have been killed meanwhile."""
    folder = write(tmp_path / "run", records(1))
    whole = read_run(folder, "run")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 30, "train/lo')
    assert read_run(folder, "run") == whole


def test_metrics_without_tokens_are_drawn_by_steps() -> None:
    lines = [{k: v for k, v in line.items() if k != "train/trained_tokens"} for line in records(1)]
    run = Run("old", [r for r in lines if r["kind"] == "train"], [r for r in lines if r["kind"] == "epoch"], [])
    assert all("tokens trained" not in chart.svg for chart in charts_of([run]))


# Run in the page: what a reader sees, left in the page's title.
LOOK = """
<script>
window.addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return [Math.round(box.x), box.width, box.height];
  });
  const page = document.documentElement;
  document.title = JSON.stringify({
    boxes, inside: page.scrollWidth, whole: page.clientWidth,
    names: [...document.querySelectorAll("#runs tbody tr")].map(row => row.cells[0].textContent),
    charts: Object.fromEntries([...document.querySelectorAll("figure")].map(figure => [
      figure.querySelector("h3").textContent, [...figure.querySelectorAll("svg text")].map(text => text.textContent)
    ])),
    neighbours: [...document.querySelectorAll(".neighbours")].map(
      table => [...table.querySelectorAll("tbody tr")].map(row => [...row.cells].map(cell => cell.textContent))
    ),
    overlaps: [...document.querySelectorAll("figure")].filter(figure => {
      const boxes = [...figure.querySelectorAll("[id*=tick] text")].map(text => text.getBoundingClientRect());
      return boxes.some((one, i) => boxes.slice(i + 1).some(other =>
        one.x < other.right && other.x < one.right && one.y + 2 < other.bottom && other.y + 2 < one.bottom
      ));
    }).map(figure => figure.querySelector("h3").textContent),
    requests: performance.getEntriesByType("resource").length,
  });
});
</script>
"""


def seen_by_chromium(page: Path, width: int) -> dict[str, Any]:
    """Return what a headless Chromium shows in a window of ``width``; skip the test if there is no Chromium."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium on this machine (Debian: chromium)")
    looked = page.with_name(f"looked-at-{width}.html")
    looked.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000",
         "--dump-dom", looked.as_uri()],
        capture_output=True, text=True, timeout=240,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    return json.loads(html.unescape(title.group(1)))


OPTIONS = ("--max-steps", "9", "--report-every", "3", "--batch-size", "4", "--accumulate", "2")
SENTENCES = ["some people read long books about trees", "other people write them", "trees have many leaves"]


def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Two runs: the metrics of one of two nodes, and a model that was trained, with its batch and noise scale."""
    first = write(tmp_path / "first", records(2))
    corpus = prepare(tmp_path / "corpus", SENTENCES * 8, SENTENCES)
    trained = train_alone(corpus, tmp_path / "second", *OPTIONS)
    report.main([str(first), str(trained), "--output", str(tmp_path / "both.html")], solo)
    columns = {}
    for width in (500, 1400):
        seen = seen_by_chromium(tmp_path / "both.html", width)
        assert seen["inside"] <= seen["whole"], "the page is wider than the window"
        assert len(seen["boxes"]) == len(seen["charts"]) >= 12
        assert all(wide > 250 and 100 < high < wide for _, wide, high in seen["boxes"])
        assert seen["names"] == ["first", "second"] and seen["requests"] == 0
        assert seen["overlaps"] == [], "numbers at an axis cover each other"
        columns[width] = len({x for x, _, _ in seen["boxes"]})
    assert columns[500] == 1 and columns[1400] >= 2
    for title, label in (
        ("Loss", "loss (nats)"), ("Learning rate", "learning rate"), ("Batch", "tokens"), ("Noise scale", "tokens")
    ):
        assert {"tokens trained", label, "second"} <= set(seen["charts"][title]), title
    (table,) = seen["neighbours"]
    words = load(trained).vocabulary.words
    assert len(table) > 4 and all(word in words and len(found.split(" · ")) == 6 for word, found in table)


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "holds no reports yet"), ("{}\nnot json\n", "a line is not JSON"), ("[1]\n", "holds no reports yet")],
)
def test_what_is_not_a_run_is_refused(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match=message):
        report.main([str(tmp_path)], solo)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*metrics\.jsonl: .*give the directory of a run"):
        report.main([str(tmp_path / "none")], solo)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", records(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*"):
        report.main([str(run), "--output", str(tmp_path / "file" / "out.html")], solo)


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.html"):
        report.main([str(tmp_path), "--output", "out.docx"], solo)


@pytest.mark.parametrize("num_rows", [1, 2, 33, 793_471])
def test_bands_cover_all_rows(num_rows: int) -> None:
    ends = band_ends(num_rows)
    assert ends[-1] == num_rows
    assert (np.diff(ends, prepend=0) > 0).all()


def test_a_chart_for_a_user_without_a_home() -> None:
    """As in a container that knows nothing of its user."""
    code = (
        "import pwd; pwd.getpwuid = {}.__getitem__; from lapse_elmo.report.charts import figure_of; "
        "figure_of(lambda axis: None)"
    )
    hidden = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
