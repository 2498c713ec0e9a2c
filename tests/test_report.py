"""The report: what it says is what the files of the runs say, and it opens offline."""

import dataclasses
import html.parser
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree

import hypothesis
import hypothesis.strategies as st
import pytest

import aim_jax
from aim_jax import config, plots, records, report, svg, tables

ROOT = pathlib.Path(__file__).parents[1]
TASKS = ["topic", "sentiment", "entailment"]
SINGLE = [0.93, 0.81, 0.7]


def make_run(folder, method="aim", seed=42, shift=0.0, cfg=None, steps=40):
    """A finished run over TASKS in `folder`, all of its files."""
    cfg = cfg or config.Config(data=config.Data(benchmark="standard_cl", order=4))
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
    settings = config.to_json(cfg)
    settings["method"]["name"] = method
    rows, merges = [], []
    for t, name in enumerate(TASKS):
        for step in range(1, steps + 1):
            memory = method == "aim" and t > 0
            row = {"task": t, "name": name, "step": step, "loss": 2 / step + 0.1 * t}
            row |= {
                "movement": 1e-4 / step,
                "history": 0.5 + t / step if memory else None,
            }
            merged = memory and step in (10, 30)
            known = memory and step > 5 and not merged
            row |= {"threshold": 0.7 if known else None, "merged": merged}
            rows.append(row)
            if merged:
                merge = {"task": t, "name": name, "step": step, "interval": 8}
                merge |= {"rehearsal": 8, "forced": step == 30, "weights": [0.6, 0.4]}
                merges.append(merge | {"learning": 0.2, "threshold": 0.7, "flag": 1})
            if step % 20 == 0:
                row = {"task": t, "name": name, "step": step, "validation": 1 / step}
                rows.append(row)
    matrix = [
        [0.9 - 0.1 * (i - j) + shift if j <= i else None for j in range(3)]
        for i in range(3)
    ]
    results = {"method": method, "order": 4, "tasks": TASKS, "seed": seed}
    results |= {"matrix": matrix, "single": SINGLE, "finished": True}
    results |= {"op": statistics.fmean(matrix[2]), "bwt": -0.15, "fwt": 0.0866 + shift}
    results |= {"versions": {"jax": "0.10.2"}, "config_sha256": "0" * 64}
    results |= {"seconds": {"train": 90.0, "total": 126.0}}
    results["work"] = {"steps": 3 * steps, "train_tokens": 9000, "extra_bytes": 0}
    if method == "aim":
        results["work"] |= {"rehearsal_steps": 32, "rehearsal_tokens": 2400}
        results["work"] |= {"probes": 80, "probe_tokens": 6000, "extra_bytes": 65536}
    results["rows"] = {
        name: {"train": 100 * (i + 1), "dev": 10, "test": 20, "dropped": i}
        for i, name in enumerate(TASKS)
    }
    folder.mkdir(parents=True)
    write_json(folder / "config.json", settings)
    write_json(folder / "results.json", results)
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "merges.jsonl", merges)
    for i, learnt in enumerate(TASKS):
        for name in TASKS[: i + 1]:
            made = [prediction(k, wrong=k % 10 < (3 if name != learnt else 1))
                    for k in range(80)]  # fmt: skip
            file = folder / "predictions" / f"{i:02d}-{learnt}" / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_rows(file, made)
    return folder


def prediction(k, wrong):
    text = "no" if wrong else "yes"
    row = {"id": f"row-{k:02d}", "input": f"question {k}", "label": "yes"}
    return row | {"prediction": text, "score": float(not wrong)}


def write_json(file, value):
    file.write_text(json.dumps(value))


def write_rows(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def edit_results(folder, **changes):
    file = folder / "results.json"
    write_json(file, json.loads(file.read_text()) | changes)


class Page(html.parser.HTMLParser):
    """Tags with attributes, tables as lists of rows of cell texts, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        self.text += data
        if getattr(self, "cell", False):
            self.tables[-1][-1][-1] += data


def page(out):
    return Page(out.read_text())


@pytest.fixture
def runs(tmp_path):
    """A parent folder of two methods, two seeds each."""
    for method in ("aim", "sequential"):
        for seed, shift in ((1, 0.0), (2, 0.03)):
            make_run(tmp_path / "runs" / f"{method}-{seed}", method, seed, shift)
    return tmp_path / "runs"


def test_table_shows_the_numbers_of_results(tmp_path):
    run = make_run(tmp_path / "run")
    report.write([run], tmp_path / "out.html")
    results = json.loads((run / "results.json").read_text())
    head, row = page(tmp_path / "out.html").tables[0]
    percent = [f"{100 * results[k]:.1f}" for k in ("op", "fwt", "bwt")]
    assert head[:4] == ["method", "OP %", "FWT %", "BWT %"]
    assert row == ["aim", *percent, "2.1", "100", "4", "1"]


def test_seeds_share_a_row_with_mean_and_deviation(tmp_path, runs):
    report.write([runs], tmp_path / "out.html")
    tables = page(tmp_path / "out.html").tables
    values = [
        json.loads((runs / f"aim-{s}" / "results.json").read_text())["op"]
        for s in (1, 2)
    ]
    mean, std = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
    assert [row[0] for row in tables[0]] == ["method", "aim", "sequential"]
    assert tables[0][1][1] == f"{mean:.1f} ± {std:.1f}"
    assert tables[0][1][-1] == "2"
    assert [row[0] for row in tables[2][1:]] == [
        "aim, seed 1",
        "aim, seed 2",
        "sequential, seed 1",
        "sequential, seed 2",
    ]


def test_runs_that_differ_in_more_than_seed_are_told_apart(tmp_path):
    small = config.Config(memory=config.Memory(percent=1.0))
    make_run(tmp_path / "a", cfg=config.Config())
    make_run(tmp_path / "b", cfg=small, seed=7)
    names = [
        g.label for g in tables.group([*map(records.load, records.find([tmp_path]))])
    ]
    assert names == ["aim (memory.percent=2.0)", "aim (memory.percent=1.0)"]


def test_runs_that_differ_in_much_are_told_apart_by_their_folders(tmp_path):
    for name, r, seed in (("a", 1, 1), ("a", 1, 2), ("b", 2, 1), ("c", 3, 1)):
        lora = config.Lora(r=r, alpha=2.0 * r, dropout=r / 9, target=(f"q{r}",))
        cfg = config.Config(lora=lora, memory=config.Memory(batch_size=1 + r // 3))
        make_run(tmp_path / name / f"aim-{seed}", cfg=cfg, seed=seed)
    groups = tables.group([*map(records.load, records.find([tmp_path]))])
    folders = [g.label.removesuffix(")").split(", ")[-1] for g in groups]
    assert folders == [f"{tmp_path}/{f}" for f in ("a/aim-*", "b/aim-1", "c/aim-1")]


def test_twins_are_told_apart_by_their_folders(tmp_path):
    paths = [make_run(tmp_path / name / "aim") for name in "ab"]
    (group,) = tables.group(map(records.load, paths))
    names = [name for name, _ in tables.named([group])]
    assert names == [f"aim, seed 42, {path}" for path in paths]
    assert not group.runs[0].notes
    assert str(paths[0]) in group.runs[1].notes[0]
    edit_results(paths[0], finished=False)  # Then its figures count in no mean.
    (group,) = tables.group(map(records.load, paths))
    assert not group.runs[1].notes


def test_unfinished_run_does_not_blur_the_mean_of_its_group(tmp_path):
    make_run(tmp_path / "a", seed=1)
    make_run(tmp_path / "b", seed=2)
    edit_results(tmp_path / "b", op=0.1, finished=False)
    (group,) = tables.group([*map(records.load, records.find([tmp_path]))])
    row = tables.results_table([group]).rows[0]
    op = json.loads((tmp_path / "a" / "results.json").read_text())["op"]
    assert row[1] == f"{100 * op:.1f} (n=1)"
    assert row[-1] == "2, 1 unfinished"


def test_costs_are_ranked_by_op(tmp_path, runs):
    for seed in (1, 2):
        edit_results(runs / f"sequential-{seed}", op=0.9)
    report.write([runs], tmp_path / "out.html")
    results, costs = page(tmp_path / "out.html").tables[:2]
    assert [row[0] for row in results[1:]] == ["sequential", "aim"]
    assert costs[0][:2] == ["rank", "method"]
    assert [r[:3] for r in costs[1:]] == [
        ["1", "sequential", "90.0 ± 0.0"],
        ["2", "aim", results[2][1]],
    ]
    # 2400 rehearsed and half of 6000 probed tokens beyond the 9000 that sequential reads.
    assert [r[5:] for r in costs[1:]] == [
        ["120", "0", "0", "0 B", "0 %", "2.1"],
        ["120", "32", "80", "65.5 kB", "60 %", "2.1"],
    ]
    twin = json.loads((tmp_path / "out.json").read_text())
    assert [row["extra_flops"] for row in twin["summary"]] == [
        pytest.approx(0.6),
        0.0,
    ]
    assert "| 1 | sequential | 90.0" in (tmp_path / "out.md").read_text()


def test_a_run_without_training_has_no_cost_to_compare_with(tmp_path, runs):
    cfg = config.Config(
        data=config.Data(benchmark="standard_cl", order=4),
        train=config.Train(epochs=0),
    )
    still = make_run(tmp_path / "still", cfg=cfg)
    edit_results(still, work={"extra_bytes": 0, "train_tokens": 0})
    report.write([still, runs], tmp_path / "out.html")
    _, costs = page(tmp_path / "out.html").tables[:2]
    assert {row[-2] for row in costs[1:]} == {"0 %", "60 %", "–"}


def test_a_run_on_fewer_rows_is_no_measure_of_cost(tmp_path, runs):
    data = config.Data(benchmark="standard_cl", order=4, limit_train=10)
    few = make_run(tmp_path / "few", "sequential", cfg=config.Config(data=data))
    edit_results(few, work={"steps": 3, "train_tokens": 90})
    report.write([few, runs], tmp_path / "out.html")
    _, costs = page(tmp_path / "out.html").tables[:2]
    assert {row[-2] for row in costs[1:]} == {"0 %", "60 %"}
    # Nor is one that is not through them yet.
    cfg = config.Config(
        data=dataclasses.replace(data, limit_train=None), train=config.Train(epochs=3)
    )
    begun = make_run(tmp_path / "begun", "sequential", cfg=cfg)
    edit_results(begun, work={"steps": 3, "train_tokens": 90}, finished=False)
    report.write([begun, runs], tmp_path / "out.html")
    _, costs = page(tmp_path / "out.html").tables[:2]
    assert {row[-2] for row in costs[1:]} == {"0 %", "60 %", "–"}


def test_run_that_did_not_count_its_work_has_no_costs(tmp_path):
    run = make_run(tmp_path / "run")
    edit_results(run, work=None)
    report.write([run], tmp_path / "out.html")
    assert "Costs" not in page(tmp_path / "out.html").text
    assert page(tmp_path / "out.html").tables[0][1][5] == tables.NONE


def published_run(folder, path, benchmark="long_sequence", order=1, **data):
    data = config.Data(benchmark=benchmark, order=order, **data)
    return make_run(
        folder, cfg=config.Config(config.Model(path=path), data=data), steps=2
    )


def test_published_numbers_stand_beside_runs_of_their_benchmark_and_model(tmp_path):
    run = published_run(tmp_path / "run", "some/where/t5-large")
    report.write([run], tmp_path / "out.html")
    parsed = page(tmp_path / "out.html")
    shown, more = [t for t in parsed.tables if "confidence" in t[0]]
    assert shown[0] == [
        *("method", "model", "OP %", "FWT %", "BWT %"),
        *("order", "source", "confidence", "note"),
    ]
    rows = shown[1:] + more[1:]
    assert len(shown) == 1 + tables.QUOTED and len(rows) == 32 + 44
    assert rows[0][0] == "AimMerging"
    for row in rows:
        assert row[1] == "T5-large" and row[5] in ("1", "mean")
        assert row[6] and row[7] in ("direct", "secondary", "derived")
    twin = json.loads((tmp_path / "out.json").read_text())
    assert [e["method"] for e in twin["published"]] == [row[0] for row in rows]
    assert "AimMerging, arXiv 2509.17348" in (tmp_path / "out.md").read_text()


def test_published_numbers_of_other_models_are_only_named(tmp_path):
    run = published_run(tmp_path / "run", "embedded", "superni", 7)
    report.write([run], tmp_path / "out.html")
    text = page(tmp_path / "out.html").text
    assert "Nothing for this benchmark on embedded; there are numbers for" in text
    assert "Qwen3-0.6B" in text and "confidence" not in text.lower()


def test_a_limited_run_says_so_beside_published_numbers(tmp_path):
    run = published_run(tmp_path / "run", "t5-large", limit_train=100)
    report.write([run], tmp_path / "out.html")
    assert "limited: data.limit_train=100" in page(tmp_path / "out.html").text


def test_published_curves_join_those_of_runs(tmp_path):
    run = records.load(make_run(tmp_path / "run"))
    curve = plots.task_curve(
        [("aim", [run])], True, [("theirs, published", [90, 8, 7])]
    )
    tree = xml.etree.ElementTree.fromstring(curve)
    assert ">theirs, published<" in curve
    thin = [x for x in tree.iter("path") if "thin" in x.get("class").split()]
    assert len(thin) == 1 and thin[0].get("d").count(" ") >= 3


def test_rows_used_and_leaks_dropped_are_told(tmp_path):
    run = make_run(tmp_path / "run")
    report.write([run], tmp_path / "out.html")
    parsed = page(tmp_path / "out.html")
    assert (
        "600 train / 30 dev / 60 test rows; 3 dropped because of leaks" in parsed.text
    )
    (table,) = [t for t in parsed.tables if t[0][:2] == ["task", "train"]]
    assert table[1:] == [
        [name, str(100 * (i + 1)), "10", "20", str(i)] for i, name in enumerate(TASKS)
    ]
    assert "| entailment | 300 | 10 | 20 | 2 |" in (tmp_path / "out.md").read_text()


def test_held_out_tasks_are_shown_before_and_after(tmp_path, runs):
    for method, after in (("aim", 0.4), ("sequential", 0.1)):
        for seed in (1, 2):
            kept = {"before": {"math": 0.5}, "after": {"math": after + seed / 10}}
            if (method, seed) == ("aim", 1):  # a task that is gone since
                kept = {when: {"art": 0.25} | tasks for when, tasks in kept.items()}
            edit_results(runs / f"{method}-{seed}", before_after=kept)
    report.write([runs], tmp_path / "out.html")
    (table,) = [t for t in page(tmp_path / "out.html").tables if "change" in t[0]]
    assert table[1:] == [
        ["art", "aim", "25.0", "25.0", "+0.0", "1"],
        ["math", "aim", "50.0", "55.0", "+5.0", "2"],
        ["math", "sequential", "50.0", "25.0", "-25.0", "2"],
    ]
    assert (
        "| math | aim | 50.0 | 55.0 | +5.0 | 2 |" in (tmp_path / "out.md").read_text()
    )


def test_many_runs_are_shown_in_brief(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(report, "DETAILED", 3)
    monkeypatch.setattr(report, "MAPS", 1)
    report.write([runs], tmp_path / "out.html")
    parsed = page(tmp_path / "out.html")
    assert "of the 4 runs are on pages of their own" in parsed.text
    assert "Training loss" not in parsed.text and "when learnt" not in parsed.text
    assert "3 more" in parsed.text, "matrices but the first are folded away"
    assert parsed.text.count("command") == 4


def test_heat_map_has_every_cell(tmp_path):
    run = records.load(make_run(tmp_path / "run"))
    tree = xml.etree.ElementTree.fromstring(plots.score_matrix("aim", run))
    cells = [r for r in tree.iter("rect") if "cell" in r.get("class").split()]
    values = [t.text for t in tree.iter("text") if "value" in (t.get("class") or "")]
    known = [v for row in run.matrix for v in row if v is not None] + SINGLE
    assert len(cells) == 3 * 3 + 3
    assert values == [f"{100 * v:.1f}" for v in known]
    assert sum("own" in r.get("class").split() for r in cells) == 3


def test_values_read_well_on_their_cells_and_lines_on_the_page():
    light, dark = re.findall(r":root \{(.*?)\}", svg.CSS, re.DOTALL)
    for text in (light, dark):
        hues = dict(re.findall(r"--(\w+): #(\w{6})", text))
        for depth in (0.06, 0.5, 1.0):
            cell = mix(hues["heat"], hues["page"], depth)
            assert contrast(rgb(hues["ink"]), cell) >= 4.5, (depth, hues["ink"])
        assert contrast(rgb(hues["soft"]), rgb(hues["page"])) >= 4.5
        for name in ["bad", *(f"c{i}" for i in range(svg.COLORS))]:
            assert contrast(rgb(hues[name]), rgb(hues["page"])) >= 3, name


def rgb(text):
    return [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def mix(a, b, share):
    return [share * x + (1 - share) * y for x, y in zip(rgb(a), rgb(b), strict=True)]


def contrast(a, b):
    """Contrast ratio of WCAG 2."""

    def luminance(color):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_task_panels_mark_merges_and_show_both_signals(tmp_path):
    run = records.load(make_run(tmp_path / "run"))
    first, second, _ = run.tasks
    assert set(plots.of_task(first)) == {"learning", "forgetting"}
    charts = plots.of_task(second)
    assert set(charts) == {"learning", "forgetting", "interval", "weights"}
    for kind in ("learning", "forgetting"):
        tree = xml.etree.ElementTree.fromstring(charts[kind])
        marks = [
            m.get("class") for m in tree.iter("line") if m.find("title") is not None
        ]
        assert marks == ["mark", "mark dash"], "a plain merge, then a forced one"
    text = charts["forgetting"]
    assert text.count("<path") == 2 and text.count("<circle") == 1 + 2  # legend, points
    line = next(p for p in xml.etree.ElementTree.fromstring(text).iter("path")
                if "bold" in p.get("class"))  # fmt: skip
    assert line.get("d").count("M") == 1, "the threshold holds up to the merge"
    assert ">memory loss<" in text and ">threshold<" in text


def test_page_loads_nothing(tmp_path, runs):
    report.write([runs], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text
    for tag, attributes in page(tmp_path / "out.html").tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "use", "image")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")


def test_links_lead_to_the_runs(tmp_path, runs):
    report.write([runs], tmp_path / "out.html")
    tags = page(tmp_path / "out.html").tags
    links = {a["href"][1:] for _, a in tags if "href" in a}
    marks = [a["id"] for _, a in tags if "id" in a]
    assert len(links) == 4 and links <= set(marks)
    assert len(marks) == len(set(marks))


def test_text_is_escaped(tmp_path):
    bad = '<script>alert("x")</script>'
    run = make_run(tmp_path / "run", method=bad)
    edit_results(run, tasks=[bad, *TASKS[1:]], versions={bad: bad})
    rows = (run / "metrics.jsonl").read_text().replace('"topic"', json.dumps(bad))
    (run / "metrics.jsonl").write_text(rows)
    row = prediction(0, wrong=True) | {"id": bad, "input": bad, "prediction": bad}
    write_rows(run / "predictions" / "02-entailment" / "topic.jsonl", [row])
    report.write([run], run / "report.html")
    assert "<script" not in (run / "report.html").read_text()
    assert bad in page(run / "report.html").text
    outside_code = (run / "report.md").read_text().split("```")[::2]
    assert "<script" not in "".join(outside_code)
    assert all(f.parent == run / "plots" for f in run.rglob("*.svg"))


def test_twins_hold_the_same_numbers(tmp_path, runs):
    report.write([runs], tmp_path / "out.html")
    twin = json.loads((tmp_path / "out.json").read_text())
    results = json.loads((runs / "aim-1" / "results.json").read_text())
    assert twin["runs"][0]["matrix"] == results["matrix"]
    assert twin["runs"][0]["op"] == results["op"]
    assert twin["summary"][0]["op"]["n"] == 2
    lines = (tmp_path / "out.md").read_text().splitlines()
    table = [
        [c.strip() for c in x.strip("|").split("|")] for x in lines if x[:1] == "|"
    ]
    shown = page(tmp_path / "out.html").tables[0]
    assert [table[0], *table[2:4]] == shown


def test_numbers_json_cannot_hold_become_null(tmp_path):
    run = make_run(tmp_path / "run")
    edit_results(run, fwt=math.nan)
    rows = (run / "metrics.jsonl").read_text().replace('"loss": 2.0', '"loss": NaN')
    (run / "metrics.jsonl").write_text(rows)
    report.write([run], run / "report.html")
    text = (run / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["runs"][0]["fwt"] is None
    assert "nan" not in (run / "plots" / "training_loss.svg").read_text()


def test_a_run_gets_its_plots_as_files(tmp_path, runs):
    run = runs / "aim-1"
    report.write([run], run / "report.html")
    files = sorted(f.name for f in (run / "plots").iterdir())
    assert {"score_matrix.svg", "training_loss.svg", "01-sentiment-weights.svg"} <= set(
        files
    )
    for file in (run / "plots").iterdir():
        tree = xml.etree.ElementTree.parse(file).getroot()
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        assert "--page" in tree.find("{*}style").text
    report.write([runs], runs / "report.html")
    assert not (runs / "plots").exists(), (
        "several runs have no plots folder of their own"
    )


def test_wrong_answers_come_first_and_forgotten_ones_before_those(tmp_path):
    run = records.load(make_run(tmp_path / "run"))
    report.write([run.path], tmp_path / "out.html")
    parsed = page(tmp_path / "out.html")
    tables = [t for t in parsed.tables if t[0][-1] == "when learnt"]
    assert len(tables) == 3
    rows = tables[0][1:]
    assert len(rows) == report.PREDICTIONS < 80
    # Of 80 rows 24 are wrong at the end, 8 of these already when the task was learnt.
    assert [r[-2:] for r in rows[:24]] == [["0.0", "100.0"]] * 16 + [["0.0", "0.0"]] * 8
    assert all(r[-2] == "100.0" for r in rows[24:])
    assert (
        "topic: 24 of 80 not fully right, 16 of them better just after" in parsed.text
    )
    assert "30 more rows are left out, 0 of them not fully right." in parsed.text


def test_rows_of_the_same_id_keep_their_own_scores(tmp_path):
    run = make_run(tmp_path / "run")
    for stage, scores in (("00-topic", (1, 0)), ("02-entailment", (0, 0))):
        rows = [
            {"id": "x", "input": "i", "label": "l", "prediction": "p", "score": score}
            for score in scores
        ]
        write_rows(run / "predictions" / stage / "topic.jsonl", rows)
    report.write([run], tmp_path / "out.html")
    text = page(tmp_path / "out.html").text
    assert "topic: 2 of 2 not fully right, 1 of them better just after" in text


def test_long_inputs_are_cut(tmp_path):
    run = make_run(tmp_path / "run")
    row = prediction(0, wrong=True) | {"input": "x" * 5000}
    write_rows(run / "predictions" / "02-entailment" / "topic.jsonl", [row])
    report.write([run], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert "x" * report.LETTERS + " [4600 more letters]" in text
    assert "x" * (report.LETTERS + 1) not in text


def test_unfinished_run_shows_what_there_is(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "results.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:60]) + '{"task": 1, "na')
    report.write([run], tmp_path / "out.html")
    parsed = page(tmp_path / "out.html")
    assert "unfinished: task 2 (sentiment), step 18" in parsed.text
    assert "there is no results.json yet" in parsed.text
    assert "the last line of metrics.jsonl is cut off and left out" in parsed.text
    assert "Training loss over the stream" in parsed.text
    assert parsed.tables[0][1][1:4] == [tables.NONE] * 3


def test_run_between_tasks_is_marked_unfinished(tmp_path):
    run = make_run(tmp_path / "run")
    matrix = json.loads((run / "results.json").read_text())["matrix"][:1]
    edit_results(run, finished=False, matrix=matrix, bwt=None, fwt=None, single=None)
    report.write([run], tmp_path / "out.html")
    parsed = page(tmp_path / "out.html")
    assert parsed.tables[0][1][1].endswith(" so far")
    assert "unfinished: task 3 of 3" in parsed.text


def test_run_without_a_step_and_without_config(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    report.write([tmp_path / "run"], tmp_path / "run" / "report.html")
    assert "there is no config.json" in page(tmp_path / "run" / "report.html").text
    assert (
        json.loads((tmp_path / "run" / "report.json").read_text())["runs"][0]["tasks"]
        == []
    )


def break_line(run):
    with (run / "merges.jsonl").open("a") as file:
        file.write("{oops\n")


BROKEN = {
    "line": (break_line, r"merges\.jsonl:5: not JSON"),
    "results": (
        lambda run: (run / "results.json").write_text("{"),
        r"results\.json: not JSON",
    ),
    "array": (
        lambda run: write_rows(run / "metrics.jsonl", [[1]]),
        r"metrics\.jsonl:1: must be a JSON object",
    ),
    "field": (
        lambda run: write_rows(run / "metrics.jsonl", [{"task": 0, "name": "x"}]),
        r"metrics\.jsonl:1: field 'step' is missing",
    ),
    "kind": (
        lambda run: write_rows(
            run / "metrics.jsonl", [{"task": 0, "name": "x", "step": 1, "loss": "low"}]
        ),
        r"metrics\.jsonl:1: field 'loss' must be a number",
    ),
    "matrix": (
        lambda run: edit_results(run, matrix=[0.5]),
        r"results\.json: field 'matrix' must be a list of lists of scores",
    ),
    "bytes": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff"),
        r"metrics\.jsonl: not UTF-8",
    ),
    "prediction": (
        lambda run: write_rows(run / "predictions" / "00-topic" / "topic.jsonl", [{}]),
        r"topic\.jsonl:1: field 'id' is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_and_nothing_is_overwritten(tmp_path, case):
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    damage, message = BROKEN[case]
    damage(run)
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(aim_jax.InputError, match=message) as error:
        report.write([run], run / "report.html")
    assert "\n" not in str(error.value)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(aim_jax.InputError, match="no such folder"):
        report.write([tmp_path / "missing"], tmp_path / "out.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(aim_jax.InputError, match="empty: no run here"):
        report.write([tmp_path / "empty"], tmp_path / "out.html")
    deep = tmp_path / "a" / "b" / "c" / "d"
    make_run(deep)
    with pytest.raises(aim_jax.InputError, match="up to 3 below it has"):
        report.write([tmp_path / "a" / ".."], tmp_path / "out.html")
    with pytest.raises(aim_jax.InputError, match="no folder given"):
        report.write([], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_a_run_given_twice_counts_once(runs):
    found = records.find([runs / "aim-1", runs, runs / "aim-2" / ".." / "aim-1"])
    assert [p.name for p in found] == ["aim-1", "aim-2", "sequential-1", "sequential-2"]


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "a copy")
    other = make_run(tmp_path / "other", seed=2)
    assert records.find([tmp_path]) == [tmp_path / "a copy", other]


def test_two_processes_write_the_same_page(tmp_path, runs, monkeypatch):
    page, replace, mine = tmp_path / "new/out.html", os.replace, os.getpid()

    def after_another(source, target):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: mine + 1)
        report.write([runs], page)
        monkeypatch.setattr(os, "getpid", lambda: mine)
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_another)
    report.write([runs], page)
    names = sorted(path.name for path in page.parent.iterdir())
    assert names == ["out.html", "out.json", "out.md"]


@pytest.mark.parametrize("name", ["report", "report.json", "."])
def test_out_must_be_a_page(tmp_path, name):
    with pytest.raises(aim_jax.InputError, match="ends in .html"):
        report.write([make_run(tmp_path / "run")], tmp_path / name)


def test_files_of_a_run_are_never_replaced_by_a_twin(tmp_path):
    run = make_run(tmp_path / "run")
    before = (run / "results.json").read_text()
    with pytest.raises(aim_jax.InputError, match="would replace .*results.json"):
        report.write([run], run / "results.html")
    assert (run / "results.json").read_text() == before


def test_what_cannot_be_written_leaves_the_old_page(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    (run / "plots").write_text("in the way")
    with pytest.raises(aim_jax.InputError, match="cannot write"):
        report.write([run], run / "report.html")
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".*.new"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("standard_cl", ["data.tasks=agnews,yahoo", "train.micro_batch_size=4"]),
        ("quickstart", ["data.benchmark=custom", "data.root=pets", "data.tasks=a"]),
    ],
)
def test_command_gives_the_config_back(tmp_path, name, changes):
    changes = [*changes, "lora.r=16", "method.name=aim", "method.preset=paper"]
    changes += ["train.average=micro_batch"]
    cfg = config.load(str(ROOT / "configs" / f"{name}.py"), changes)
    run = make_run(tmp_path / "run")
    write_json(run / "config.json", config.to_json(cfg))
    edit_results(run, seed=cfg.train.seed)
    words = shlex.split(tables.command(records.load(run)))
    assert words[:3] == ["python", "-m", "aim_jax.main"]
    file = str(ROOT / words[words.index("--config") + 1])
    again = [b for a, b in zip(words, words[1:], strict=False) if a == "--set"]
    assert config.load(file, again) == cfg


def test_command_line(command, tmp_path, runs):
    out = tmp_path / "new" / "out.html"
    done = command("report", runs / "aim-1", "--out", out, runs / "sequential-1")
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in page(out).tables[0][1:]] == ["aim", "sequential"]


def test_a_tilde_is_the_home_folder(command, tmp_path, runs, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(runs / "aim-1", tmp_path / "run")
    done = command("report", "~/run", "--out=~/out.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.html").is_file()


def test_notes_of_ones_own_are_not_replaced(command, tmp_path, runs):
    notes = tmp_path / "README.md"
    notes.write_text("mine")
    given = "report", runs, "--out", tmp_path / "README.html"
    done = command(*given)
    assert done.returncode == 2 and "README.md is there" in done.stderr
    assert notes.read_text() == "mine"
    notes.unlink()
    for _ in range(2):  # its own twins it replaces
        assert command(*given).returncode == 0


def test_command_line_errors_are_one_line_and_exit_2(command, tmp_path, runs):
    for arguments in ([tmp_path / "missing", "--out", tmp_path / "a.html"], [runs],
                      ["--out", tmp_path / "a.html"]):  # fmt: skip
        done = command("report", *arguments)
        assert done.returncode == 2
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
    assert not (tmp_path / "a.html").exists()


def test_report_needs_no_jax():
    code = "import aim_jax.report, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


VALUES = st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan))


LINES = st.lists(VALUES, max_size=9) | st.lists(VALUES, min_size=70, max_size=200)


@hypothesis.settings(deadline=None)
@hypothesis.given(LINES, st.integers(20, 60))
def test_thinned_lines_keep_extremes_ends_and_order(ys, limit):
    xs, kept = svg.thin(range(len(ys)), ys, limit)
    assert len(kept) <= limit and xs == sorted(set(xs))
    clean = [None if y is None or math.isnan(y) else y for y in ys]
    assert kept == [clean[x] for x in xs]
    if ys:
        assert (xs[0], xs[-1]) == (0, len(ys) - 1)
    solid = [y for y in clean if y is not None]
    if solid:
        known = [y for y in kept if y is not None]
        assert (min(known), max(known)) == (min(solid), max(solid))
    assert (None in kept) == (None in clean)


def test_long_series_stay_small(tmp_path):
    run = records.load(make_run(tmp_path / "run", steps=30000))
    assert len(plots.training_loss(run)) < 60_000


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.floats(-1e9, 1e9, width=32), max_size=9), st.booleans())
def test_axes_cover_their_values(values, log):
    axis = svg.axis(values, log=log)
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 320
    span = 1e-9 * (axis.high - axis.low)
    for value in values:
        assert axis.low - span <= value <= axis.high + span
        assert -1e-6 <= axis.place(value, 0, 1) <= 1 + 1e-6
