"""The report of runs, finished or not: one page that opens without a network.

    python -m aim_jax.report DIR [DIR ...] --out FILE.html [--scoring SCHEME]

DIR is the folder of a run, or one with such folders up to three levels below. FILE.md and
FILE.json beside the page hold its tables. The page of a single run, written into the folder
of that run, leaves its charts as files in DIR/plots/ too. SCHEME scores the predictions
anew, without a model: `sound`, or `release` as the PyTorch release's scripts do, with
options behind commas (`metrics.scheme`): `sound,bwt_over=all`.
"""

import contextlib
import html
import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import app, flags

import aim_jax
from aim_jax import metrics, plots, published, records, rescore, svg, tables

PREDICTIONS = 50  # rows shown of a task
LETTERS = 400  # shown of an input
OPEN = 2  # runs whose sections are open at first
DETAILED = 12  # runs that are shown with their signals, merges and predictions
MAPS = 6  # score matrices in sight
_STYLE = """
* { box-sizing: border-box }
html { background: var(--page); color: var(--ink) }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0 auto;
  max-width: 1240px; padding: 1rem clamp(.75rem, 2vw, 2rem) 3rem }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .5rem 0 0 }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem }
small, .note, header p, nav { color: var(--soft) } small { font-weight: 400 }
.note { font-size: .85rem; max-width: 100ch; margin: .5rem 0 } .bad { color: var(--bad) }
header p { margin: .3rem 0 } nav a { margin-right: .9em; white-space: nowrap }
a { color: var(--c0) }
.table { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)) }
.grid.wide { grid-template-columns: 1fr }
figure { margin: 0; overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px }
figure svg { display: block; height: auto; width: 100%; max-width: 46rem; min-width: 24rem }
.wide svg { max-width: none; min-width: 42rem }
.maps { display: flex; flex-wrap: wrap } .maps svg { zoom: 1.2; width: auto; max-width: none; min-width: 0 }
details { margin: .4rem 0 } summary { cursor: pointer }
details > .table, details > .predictions { max-height: 34rem; overflow: auto }
details > .table table { font-size: .82rem }
details th { position: sticky; top: 0; background: var(--page) }
.quoted td:nth-child(-n+2) { white-space: nowrap }
.run { border-top: 2px solid var(--rule); margin-top: 2rem }
.run > summary > h2 { display: inline-block; margin: .8rem 0 .3rem }
.tag { font-size: .8rem; font-weight: 600; color: var(--bad); border: 1px solid;
  border-radius: 4px; padding: .1rem .4rem; margin-left: .4rem; vertical-align: middle }
dl { scroll-margin-top: 5rem; display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .3rem 0 1rem }
dt { color: var(--soft) } dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
code { font: .87em ui-monospace, "DejaVu Sans Mono", monospace }
.predictions table { font-size: .82rem; min-width: 44rem }
.predictions td { overflow-wrap: anywhere; white-space: pre-wrap }
.predictions td:nth-child(2) { width: 50% } .predictions td:first-child { min-width: 7em }
@media print {
  body { max-width: none; padding: 0; font-size: 11px } nav { display: none }
  .grid:not(.wide, .maps) { grid-template-columns: 1fr 1fr }
  figure svg, .wide svg { min-width: 0 }
  figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  .heat { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  details > .table, details > .predictions { max-height: none; overflow: visible }
}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write(
    dirs: Sequence[pathlib.Path], out: pathlib.Path, scoring: str | None = None
) -> None:
    """Write the page `out` about the runs in `dirs`, and its twins beside it.

    scoring: a scheme by which predictions are scored anew (`metrics.scheme`).
    Raises InputError before anything is written if a folder or a file is no good.
    """
    if out.suffix != ".html" or out.is_dir():
        raise aim_jax.InputError(f"--out {out}: must be a file that ends in .html")
    groups = load(dirs, scoring)
    runs = [run for g in groups for run in g.runs]
    twins = {out.with_suffix(s) for s in (".md", ".json")}
    for run in runs:
        for name in ("config.json", "results.json"):
            if (run.path / name).resolve() in {t.resolve() for t in twins}:
                raise aim_jax.InputError(
                    f"--out {out}: its JSON twin would replace {run.path / name};"
                    " choose another name"
                )
    summary = to_json(groups)
    files = {
        out.with_suffix(".md"): markdown(groups),
        out.with_suffix(".json"): json.dumps(summary, indent=1, allow_nan=False) + "\n",
        out: page(groups),
    }
    if len(runs) == 1 and out.parent.resolve() == runs[0].path.resolve():
        for name, drawing in plots.of_run(runs[0]).items():
            files[out.parent / "plots" / f"{name}.svg"] = svg.standalone(drawing)
    _replace(files)


def load(
    dirs: Sequence[pathlib.Path], scoring: str | None = None
) -> list[tables.Group]:
    """The runs in and below `dirs`, in groups.

    Raises InputError as `records`, and for a scheme that names a task of none of them.
    """
    runs = [records.load(path) for path in records.find(dirs)]
    if scoring:
        known = dict.fromkeys(name for run in runs for name in run.names)
        for name in metrics.scheme(scoring).op.rouge_l:
            if name not in known:
                raise aim_jax.InputError(
                    f"--scoring: no task '{name}'; there are {', '.join(known)}"
                )
        runs = [rescore.rescore(run, scoring) for run in runs]
    return tables.group(runs)


def to_json(groups: Sequence[tables.Group]) -> dict[str, Any]:
    """All tables as plain JSON types; scores are fractions, NaN becomes null."""
    summary = []
    for label, runs in groups:
        row: dict[str, Any] = {"label": label, "method": runs[0].method}
        row |= {"n": len(runs), "unfinished": sum(not r.finished for r in runs)}
        row["seeds"] = [r.seed for r in runs]
        for key in runs[0].figures:
            value = tables.stat(runs, key)
            row[key] = value._asdict() if value else None
        summary.append(row | {"extra_flops": tables.extra_flops(runs, groups)})
    known = (
        "single",
        "before_after",
        "rows",
        "work",
        "seconds",
        "versions",
        "config_sha256",
    )
    detail = [
        {"name": name, "folder": str(run.path), "method": run.method, "seed": run.seed}
        | {"stream": run.stream, "tasks": run.names, "date": run.date}
        | {"finished": run.finished, "state": run.progress, "notes": run.notes}
        | run.figures
        | {"matrix": run.matrix}
        | {key: run.results.get(key) for key in known}
        | {"config": run.settings, "command": tables.command(run)}
        for name, run in tables.named(groups)
    ]
    matches = published.matching(run for g in groups for run in g.runs)
    return _plain({"summary": summary, "published": matches, "runs": detail})


def markdown(groups: Sequence[tables.Group]) -> str:
    """The tables of the page as Markdown."""
    parts = ["# Runs"]
    for title, table, note in tables.overview(groups):
        parts += [f"## {title}", *([_markdown(table)] if table.rows else []), note]
    if sum(len(g.runs) for g in groups) > len(groups):
        parts += ["## Each run", _markdown(tables.runs_table(groups))]
    for name, run in tables.named(groups):
        state = "" if run.finished else f" ({run.progress})"
        facts = [f"- {k}: {v}" for k, v in tables.facts(run) if k != "command"]
        parts += [f"## {_cell(name)}{state}", "\n".join(map(_cell, facts))]
        parts += [f"```sh\n{tables.command(run)}\n```"] if tables.command(run) else []
        parts += [_markdown(tables.matrix_table(run))] if run.matrix else []
        data = tables.data_table(run)
        parts += ["Rows used:", _markdown(data)] if data.rows else []
    return "\n\n".join(parts) + "\n"


# The page


def page(groups: Sequence[tables.Group]) -> str:
    """The whole page as HTML."""
    runs = tables.named(groups)
    streams = " / ".join(dict.fromkeys(r.stream for _, r in runs))
    methods = list(dict.fromkeys(r.method for _, r in runs))
    what = ", ".join(methods) if len(methods) < 5 else f"{len(methods)} methods"
    title = f"{what} on {streams}"
    parts = [f"<header><h1>{_e(title)}</h1><p>{_sources(runs)}</p>"]
    if len(runs) > 1:
        links = (f'<a href="#run-{i}">{_e(n)}</a>' for i, (n, _) in enumerate(runs, 1))
        parts.append(f"<nav>Runs: {' '.join(links)}</nav>")
    parts.append("</header>")
    for name, table, note in tables.overview(groups):
        parts += [f"<h2>{name}</h2>", _html(table) if table.rows else ""]
        parts.append(f'<p class="note">{_e(note)}</p>')
    if len(runs) > len(groups):
        parts.append(_details("Each run", _html(tables.runs_table(groups))))
    if tables.varied([r.settings for _, r in runs]):
        parts.append(
            _details("Settings that differ", _html(tables.differences_table(runs)))
        )
    curves = []
    for stream in dict.fromkeys(tuple(r.names) for _, r in runs if r.matrix):
        alike = [
            (label, [r for r in members if r.matrix and tuple(r.names) == stream])
            for label, members in groups
        ]
        alike = [(label, members) for label, members in alike if members]
        quoted = [
            (f"{e['method']}, published", e["first_task"])
            for e in published.matching(run for _, members in alike for run in members)
            if len(e.get("first_task", ())) == len(stream)
        ]
        curves.append(plots.task_curve(alike, first=True, quoted=quoted))
        curves.append(plots.task_curve(alike, first=False))
    if curves:
        parts.append(f"<h2>Scores over the stream</h2>{_grid(curves)}")
    maps = [plots.score_matrix(n, r) for n, r in runs if r.matrix]
    if maps:
        parts.append(f"<h2>Score matrices</h2>{_grid(maps[:MAPS], 'maps')}")
    if maps[MAPS:]:
        more = _grid(maps[MAPS:], "maps")
        parts.append(_details(f"{len(maps[MAPS:])} more", more))
    if len(runs) > DETAILED:
        parts.append(
            f'<p class="note">Signals, merges and predictions of the {len(runs)} runs are'
            " on pages of their own: report.html in the folder of each.</p>"
        )
    for i, (name, run) in enumerate(runs, 1):
        parts.append(_run_section(i, name, run, len(runs)))
    return _PAGE.format(title=_e(title), style=svg.CSS + _STYLE, body="\n".join(parts))


def _run_section(number: int, name: str, run: records.Run, count: int) -> str:
    """What there is to say of one of `count` runs; less if they are many."""
    facts = "".join(
        f"<dt>{_e(k)}</dt><dd>{_code(v) if k == 'command' else _e(v)}</dd>"
        for k, v in tables.facts(run)
    )
    parts = [f'<dl id="run-{number}">{facts}</dl>']
    parts += [f'<p class="bad">{_e(note)}</p>' for note in run.notes]
    if count <= DETAILED:
        parts += _training(number, run)
    if count <= DETAILED and any(t.predictions for t in run.tasks):
        parts.append("<h3>Predictions <small>wrong answers first</small></h3>")
        parts += [_predictions(t) for t in run.tasks if t.predictions]
    parts.append("<h3>Set-up</h3>")
    for title, values in (
        ("Config", run.settings),
        ("Versions", run.results.get("versions")),
        ("Seconds", run.results.get("seconds")),
        ("Work", run.results.get("work")),
    ):
        if values:
            rows = [[k, json.dumps(v)] for k, v in values.items()]
            parts.append(
                _details(title, _html(tables.Table(["field", "value"], rows, left=2)))
            )
    data = tables.data_table(run)
    if data.rows:
        parts.append(_details("Data", _html(data)))
    tag = "" if run.finished else f' <span class="tag">{_e(run.progress)}</span>'
    summary = f"<summary><h2>{_e(name)}{tag}</h2></summary>"
    state = " open" if count <= OPEN else ""
    body = "\n".join(parts)
    return f'<details class="run"{state}>{summary}\n{body}</details>'


def _training(number: int, run: records.Run) -> list[str]:
    """The loss over the stream, and the signals and merges of each task."""
    parts = []
    if any(t.steps for t in run.tasks):
        parts.append(_grid([plots.training_loss(run)], "wide"))
    for task in (t for t in run.tasks if t.steps):
        forced = sum(bool(r.get("forced")) for r in task.merges)
        note = f"{task.steps[-1]['step']} steps"
        note += f", {len(task.merges)} merges" if task.merges else ""
        note += f" ({forced} forced)" if forced else ""
        heading = f"Task {task.number}: {_e(task.name)} <small>{_e(note)}</small>"
        anchor = f"run-{number}-task-{task.number}"
        panels = _grid(list(plots.of_task(task).values()))
        parts.append(f'<h3 id="{anchor}">{heading}</h3>{panels}')
        if task.merges:
            parts.append(_details("Table of merges", _html(tables.merges_table(task))))
    return parts


def _predictions(task: records.Task) -> str:
    """Rows of a task, worst first, and among equals first those that were right before."""
    rows = [
        row | {"before": before}
        for row, before in zip(task.predictions, task.before, strict=True)
    ]
    rows.sort(key=lambda r: (r["score"], -r["before"]))
    wrong = [r for r in rows if r["score"] < 1]
    lost = sum(r["before"] > r["score"] for r in wrong)
    table = tables.Table(
        ["id", "input", "label", "prediction", "score", "when learnt"],
        [
            [str(r["id"]), _cut(r["input"]), r["label"], r["prediction"]]
            + [tables.score(r["score"]), tables.score(r["before"])]
            for r in rows[:PREDICTIONS]
        ],
        left=4,
    )
    title = f"{task.name}: {len(wrong)} of {len(rows)} not fully right"
    title += f", {lost} of them better just after the task was learnt" if lost else ""
    left, unseen = len(rows) - len(table.rows), max(0, len(wrong) - len(table.rows))
    more = f"{left} more rows are left out, {unseen} of them not fully right."
    more = f'<p class="note">{more}</p>' if left else ""
    return _details(title, f'<div class="predictions">{_html(table)}</div>{more}')


def _sources(runs: Sequence[tuple[str, records.Run]]) -> str:
    dates = sorted(r.date for _, r in runs)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    left = sum(not r.finished for _, r in runs)
    tag = f' <span class="tag">{left} unfinished</span>' if left else ""
    scoring = runs[0][1].results.get("scoring")
    anew = f"; predictions scored anew: {_e(scoring)}" if scoring else ""
    return f"{count}, written {_e(span)}{anew}{tag}"


def _html(table: tables.Table) -> str:
    """A table that scrolls sideways where it must; rows beyond its fold are hidden."""
    rows = []
    shown = [("td", row) for row in table.rows[: table.fold]]
    for tag, cells in [("th", table.head), *shown]:
        line = (
            f"<{tag}{' class=n' if i in table.numbers() else ''}>{_e(c)}</{tag}>"
            for i, c in enumerate(cells)
        )
        rows.append(f"<tr>{''.join(line)}</tr>")
    head, *body = rows
    hidden = table._replace(rows=table.rows[len(body) :], fold=None)
    more = _details(f"{len(hidden.rows)} more", _html(hidden)) if hidden.rows else ""
    return (
        f'<div class="table{" quoted" if table.right else ""}"><table><thead>{head}</thead>'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>{more}"
    )


def _markdown(table: tables.Table) -> str:
    rule = ["---:" if i in table.numbers() else "---" for i in range(len(table.head))]
    rows = [table.head, rule, *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    """`text` as inert Markdown on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text)


def _grid(charts: Sequence[str], kind: str = "") -> str:
    figures = "".join(f"<figure>{c}</figure>" for c in charts)
    return f'<div class="grid {kind}">{figures}</div>'


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{body}</details>"


def _code(text: str) -> str:
    return f"<code>{_e(text)}</code>"


def _cut(text: str) -> str:
    left = len(text) - LETTERS
    return text if left <= 0 else f"{text[:LETTERS]} [{left} more letters]"


def _plain(value: Any) -> Any:
    """`value` with null for what JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _e(text: str) -> str:
    return html.escape(text)


def _replace(files: dict[pathlib.Path, str]) -> None:
    """Write `files` so that each is there whole or not at all."""
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            _fresh(file).write_text(text, "utf-8", errors="backslashreplace")
        for file in files:
            os.replace(_fresh(file), file)
    except OSError as error:
        raise aim_jax.InputError(f"cannot write {file}: {error.strerror}") from None
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                _fresh(file).unlink()


def _fresh(file: pathlib.Path) -> pathlib.Path:
    # Of this process alone: sweeps side by side write the same page.
    return file.with_name(f".{file.name}.{os.getpid()}.new")


def _begins(file: pathlib.Path, mark: str) -> bool:
    return file.read_bytes().startswith(mark.encode())


def main(argv: Sequence[str]) -> None:
    """The command: absl's arguments in, files out."""
    # Those behind the first are folders.
    with aim_jax.command(argv[:1], needed=("out",)):
        out = pathlib.Path(flags.FLAGS.out).expanduser()
        for suffix, mark in ((".md", "# Runs"), (".json", '{\n "summary"')):
            twin = out.with_suffix(suffix)
            if out.suffix == ".html" and twin.is_file() and not _begins(twin, mark):
                raise aim_jax.InputError(
                    f"--out {out}: {twin} is there and would be replaced; choose another"
                    " name or move it away"
                )
        folders = [pathlib.Path(a).expanduser() for a in argv[1:]]
        write(folders, out, flags.FLAGS.scoring)
    print(
        f"{out} (tables also in {out.with_suffix('.md')}, {out.with_suffix('.json')})"
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "the page to write, FILE.html")
    flags.DEFINE_string("scoring", None, "score predictions anew: sound, release, ...")
    app.run(main)
