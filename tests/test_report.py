"""bin/report: a picture from a run's metrics, and what it says of runs that have none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lapse_elmo import report
from lapse_elmo.errors import ConfigError, OutputError
from lapse_elmo.metrics.server_meter import band_ends
from lapse_elmo.world import solo


def records(num_nodes: int) -> list[dict]:
    """Metrics of two reports, as a run of ``num_nodes`` nodes writes them."""
    lines: list[dict] = []
    for step in (10, 20):
        train: dict = {"kind": "train", "step": step, "train/loss_nats": 6.0 - step / 10, "train/tokens_per_s": 100.0}
        train |= {"train/learning_rate": 0.2, "train/gradient_norm": 3.0, "train/global_batch_tokens": 80.0 * step}
        train |= {"train/noise_scale_tokens": None if step == 10 else 900.0}
        train |= {f"step/{name}_s": 0.1 for name in ("pull", "compute", "agree", "push")}
        for name in ("embedding", "softmax"):
            train[f"server/{name}_local_share"] = 0.9 + step / 1000
            train |= {f"server/{name}_{what}_rows": 5.0 for what in ("relocated", "replicated", "synchronised")}
        lines.append(train)
        if num_nodes > 1:
            bands = {"ends": [1, 3, 9], "main": [[1, 1, 4], [0, 1, 2]], "replicas": [[0, 1, 1], [1, 0, step // 10]]}
            lines.append({"kind": "placement", "step": step, "embedding": bands, "softmax": bands})
    return [*lines, {"kind": "epoch", "step": 20, "heldout/mean_perplexity": 90.0}]


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(num_nodes: int, suffix: str, tmp_path: Path) -> None:
    run = write(tmp_path / "run", records(num_nodes))
    report.main([str(run), "--output", str(tmp_path / f"out.{suffix}")], solo)
    begin = (tmp_path / f"out.{suffix}").read_bytes()[:8]
    assert begin == (b"\x89PNG\r\n\x1a\n" if suffix == "png" else b"<?xml ve")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out.{suffix}", "run"]


def test_panels_show_the_metrics() -> None:
    figure = report.draw(records(2), "run")
    loss, share, _, _, owners, bands, batch, rate = figure.axes[:8]
    np.testing.assert_array_equal(batch.lines[0].get_xydata(), [[10, 800], [20, 1600]])
    np.testing.assert_array_equal(batch.lines[1].get_xydata(), [[20, 900]])  # a noise scale may be unknown
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [0.2, 0.2])
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 5.0], [20, 4.0]])
    np.testing.assert_allclose(np.array(share.lines[1].get_ydata()), [91.0, 92.0])
    # Two segments of alike bands: main copies 6 and 3 of each, replicas 2 and 2 or 3.
    assert [np.array(line.get_ydata()).tolist() for line in owners.lines] == [[12, 12], [4, 4], [6, 6], [4, 6]]
    np.testing.assert_allclose(np.array(bands.collections[0].get_array()).T, [[1, 1 / 2, 2 / 6], [1, 1 / 2, 3 / 6]])


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
    with pytest.raises(ConfigError, match=r"cannot read .*metrics\.jsonl: .*give the folder of a run"):
        report.main([str(tmp_path / "none")], solo)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", records(1))
    with pytest.raises(OutputError, match=r"cannot write .*name another by --output"):
        report.main([str(run), "--output", str(tmp_path / "none" / "out.png")], solo)


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.png"):
        report.main([str(tmp_path), "--output", "out.docx"], solo)


@pytest.mark.parametrize("num_rows", [1, 2, 33, 793_471])
def test_bands_cover_all_rows(num_rows: int) -> None:
    ends = band_ends(num_rows)
    assert ends[-1] == num_rows
    assert (np.diff(ends, prepend=0) > 0).all()
