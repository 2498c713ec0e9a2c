"""Scores from predictions alone: those of the run, and those of the published scripts."""

import json

import golden
import pytest

import aim_jax
from aim_jax import metrics, records, report, rescore
from aim_jax.data import tasks

NAMES = ["task363", "task875"]


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    filled = ({"input": "?", "score": -1.0} | row for row in rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in filled))


def make_run(folder, names, final, after, single, **results):
    """A finished SuperNI run of these predictions (by task); its scores are all wrong."""
    zeros = [0.0] * len(names)
    results = {
        "tasks": names,
        "matrix": [zeros] * len(names),
        "single": zeros,
        "finished": True,
    } | results
    folder.mkdir()
    settings = {"data": {"benchmark": "superni", "order": 7}, "method": {"name": "aim"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "results.json").write_text(json.dumps(results))
    for i, name in enumerate(names):
        made = folder / "predictions" / f"{i:02d}-{name}"
        write_rows(made / f"{name}.jsonl", after[name])
        write_rows(folder / "predictions" / "single" / f"{name}.jsonl", single[name])
        if made.name.endswith(names[-1]):
            for earlier in names:
                write_rows(made / f"{earlier}.jsonl", final[earlier])
    return records.load(folder)


def answers(*predictions):
    return [
        {"id": str(i), "label": "p", "prediction": p} for i, p in enumerate(predictions)
    ]


@pytest.fixture
def run(tmp_path):
    final = {"task363": answers("pos", "neg", "p"), "task875": answers("p", "n", "n")}
    after = {"task363": answers("p", "p", "p"), "task875": final["task875"]}
    single = {"task363": answers("n", "n", "pos"), "task875": answers("n", "n", "n")}
    return make_run(tmp_path / "run", NAMES, final, after, single)


def test_every_option_counts(run):
    sound = rescore.rescore(run, "sound").results
    assert sound["matrix"] == [[1.0, None], pytest.approx([2 / 3, 1 / 3])]
    assert sound["single"] == pytest.approx([1 / 3, 0])
    assert sound["op"] == pytest.approx(1 / 2)
    assert sound["bwt"] == pytest.approx(-1 / 3)
    assert sound["fwt"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert rescore.rescore(run, "bwt_over=all").results["bwt"] == pytest.approx(-1 / 6)
    plain = rescore.rescore(run, "remap=false").results
    assert (plain["op"], plain["bwt"]) == pytest.approx((1 / 3, -2 / 3))
    assert plain["fwt"] == pytest.approx((1 + 1 / 3) / 2)
    rounded = rescore.rescore(run, "decimals=1").results
    assert rounded["matrix"][1] == [0.7, 0.3] and rounded["op"] == 0.5
    release = rescore.rescore(run, "release").results
    assert release["op"] == (0.6667 + 0.3333) / 2
    assert release["bwt"] == plain["bwt"] and release["fwt"] == plain["fwt"]


def test_rouge_by_name(run):
    pytest.importorskip("rouge_score")
    rows = [{"id": "0", "label": "a b", "prediction": "a"}]
    write_rows(run.path / "predictions/01-task875/task875.jsonl", rows)
    assert rescore.rescore(run, "sound").results["matrix"][1][1] == 0
    scored = rescore.rescore(run, "rouge_l=task875").results["matrix"][1]
    assert scored == pytest.approx([2 / 3, 2 / 3])


def test_rouge_of_a_task_that_no_run_has_is_refused(run):
    with pytest.raises(aim_jax.InputError, match="no task 'task87'; there are task363"):
        report.load([run.path], "rouge_l=task363+task87")


def test_predictions_are_marked_anew(run):
    first, last = rescore.rescore(run, "sound").tasks
    assert [row["score"] for row in first.predictions] == [1.0, 0.0, 1.0]
    assert first.before == [1.0, 1.0, 1.0]
    assert last.before == [row["score"] for row in last.predictions]


def test_what_has_no_predictions_is_unknown(run):
    (run.path / "predictions" / "single" / "task875.jsonl").unlink()
    (run.path / "predictions" / "00-task363" / "task363.jsonl").unlink()
    again = rescore.rescore(run, "sound")
    assert again.results["op"] == pytest.approx(1 / 2)
    assert again.results["bwt"] is None and again.results["fwt"] is None
    assert again.notes == ["no predictions of task875 trained alone: FWT is not known"]


def test_a_metric_that_is_not_known_is_asked_for(tmp_path):
    own = {"mine": answers("p")}
    run = make_run(tmp_path / "run", ["mine"], own, own, own)
    with pytest.raises(aim_jax.InputError, match="'metrics' has none for task mine"):
        rescore.rescore(run, "sound")
    run = make_run(tmp_path / "told", ["mine"], own, own, own, metrics=["exact"])
    assert rescore.rescore(run, "sound").results["op"] == 1.0


def test_the_command_says_how_it_scored(command, run, tmp_path):
    out = tmp_path / "out.html"
    given = "report", run.path, "--out", out
    assert command(*given, "--scoring=remap=false").returncode == 0
    assert "predictions scored anew: remap=false" in out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["runs"][0][
        "op"
    ] == pytest.approx(1 / 3)
    done = command(*given, "--scoring=no")
    assert done.returncode == 2 and "there are sound, release" in done.stderr


@golden.needed
def test_release_gives_the_numbers_of_its_three_scripts(tmp_path):
    pytest.importorskip("rouge_score")
    data = golden.read("superni_metrics.json.gz")
    final, after, single = (data["predictions"][k] for k in ("avgPerf", "bwt", "fwt"))
    last = data["order"][-1]
    close = {"rel": 0, "abs": 1e-12}
    run = make_run(tmp_path / "run", data["order"], final, after, single)
    report.write([run.path], tmp_path / "run.html", "release")
    (row,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert row["matrix"][-1] == data["per_task_rounded4"]
    assert row["op"] == pytest.approx(data["average_performance"], **close)
    assert row["bwt"] == pytest.approx(data["bwt"], **close)
    # The scripts read the last task's predictions for FWT from another file than for OP.
    final = final | {last: after[last]}
    run = make_run(tmp_path / "fwt", data["order"], final, after, single)
    results = rescore.rescore(run, "release").results
    assert results["fwt"] == pytest.approx(data["fwt"], **close)
    sound = rescore.rescore(run, "sound").results
    assert all(sound[k] != results[k] for k in ("op", "bwt", "fwt"))
    assert set(data["order"]) == set(tasks.BENCHMARKS["superni"].orders[7])
    assert metrics.SCHEMES["release"].bwt_over == "earlier"
