"""``bin/report``: write a self-contained HTML page on one or several runs, with options, curves and speed."""

from __future__ import annotations

import base64
import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lapse_elmo.config.trained_model import parse_report
from lapse_elmo.corpus.files import atomic_write
from lapse_elmo.mpi.world import World
from lapse_elmo.report.charts import charts_of
from lapse_elmo.report.runs import Run, read_run

PAGE = "report.html"


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run ``bin/report``, which is a single process without MPI."""
    options = parse_report(argv)
    folders = [Path(run) for run in options.runs]
    path = Path(options.output or folders[0] / PAGE)
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    atomic_write(path, page_of(runs).encode(), overwrite=True)
    print(path)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the base names of the folders, or if two are equal, their paths below the folder common to all."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath(paths)
        names = [str(path.relative_to(common)) for path in paths]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def page_of(runs: Sequence[Run]) -> str:
    """Return a report as HTML that refers to no other file and no network address."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    return template.render(
        title=title, runs=runs, summaries=summaries_of(runs), charts=charts_of(runs), shown=shown,
        options=options_of(runs), csv=base64.b64encode(table_of(runs).encode()).decode(),
    )


def summaries_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the rows of the table of runs, without columns that are empty for all of them."""
    rows = [run.summary() for run in runs]
    columns = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    return [{name: row[name] for name in columns} for row in rows]


def shown(value: Any) -> str:
    """Format a value of the table of runs."""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def options_of(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the name of every option and version, with its value in each run."""
    columns = [
        {f"{group}.{name}": str(value) for group, table in run.options.items() for name, value in table.items()}
        | {f"version of {name}": version for name, version in run.versions.items()}
        for run in runs
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def table_of(runs: Sequence[Run]) -> str:
    """Return the metrics of all reports and evaluations as CSV, with the run's name in the first column."""
    rows = [
        {"run": run.name, **{name: value for name, value in record.items() if not isinstance(value, dict | list)}}
        for run in runs for record in (*run.train, *run.epochs)
    ]
    output = io.StringIO()
    writer = csv.DictWriter(output, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()
