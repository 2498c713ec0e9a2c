"""Metrics: against the numbers that the published evaluators gave for recorded predictions.

The recorded numbers are those of the PyTorch release's scripts. They change only if its
evaluators turn out to do something else.
"""

import subprocess
import sys

import golden
import pytest

import aim_jax
from aim_jax import metrics
from aim_jax.data import tasks


def superni(name):
    benchmark = tasks.BENCHMARKS["superni"]
    remap = benchmark.remaps.get(name, {})
    return tasks.Task(name, benchmark.metrics[name], [], [], [], remap)


@pytest.mark.parametrize(
    "prediction, label, same",
    [
        ("World", "world", True),
        (" world\n", "World ", True),
        ("world .", "world", False),
        ("", "world", False),
        ("true", "True", True),
        ("[1][0]", "1", False),
    ],
)
def test_exact_ignores_case_and_outer_space_only(prediction, label, same):
    assert metrics.exact(prediction, label) is same


def test_rouge_l_is_f1_of_the_longest_common_subsequence_of_stems():
    # Common subsequence: the, cat(s), sat(sit does not stem to sat) -> 2 of 3 and 2 of 4.
    assert metrics.rouge_l("the cats sit", "The cat sat down") == pytest.approx(4 / 7)
    assert metrics.rouge_l("RUNNING", "runs") == 1.0
    assert metrics.rouge_l("", "runs") == 0.0


def test_score_is_a_mean_and_remaps_predictions_but_not_labels():
    task = tasks.Task("task", "exact", [], [], [], {"pos": "p", "neg": "n"})
    rows = [
        {"prediction": prediction, "label": label}
        for prediction, label in zip(
            ["POS", "n", "neg ", "p"], ["P", "N", "N", "pos"], strict=True
        )
    ]
    scores = metrics.score_rows(task, rows)
    assert scores == [1, 1, 1, 0] and metrics.mean(scores) == 0.75
    assert metrics.mean(scores, metrics.Scoring(decimals=1)) == 0.8
    assert metrics.score_rows(task, rows, metrics.Scoring(remap=False)) == [0, 1, 0, 0]
    assert metrics.score_row("exact", "Pos", "p", task.remap) == 1.0


def test_op_bwt_fwt_by_hand():
    matrix = [[0.5, None, None], [0.25, 1.0, None], [0.0, 0.75, 0.5]]
    assert metrics.op(matrix) == pytest.approx((0.0 + 0.75 + 0.5) / 3)
    assert metrics.bwt(matrix) == pytest.approx((-0.5 - 0.25) / 2)
    assert metrics.bwt(matrix, "all") == pytest.approx((-0.5 - 0.25) / 3)
    assert metrics.fwt(matrix, [0.25, 0.5, 0.5]) == pytest.approx((0.25 + 0.5) / 3)


def test_rows_may_be_short_and_a_run_unfinished():
    matrix = [[0.5], [0.25, 1.0]]
    full = [row + [None] * (4 - len(row)) for row in matrix]
    for m in (matrix, full):
        assert metrics.op(m) == pytest.approx(0.625)
        assert metrics.bwt(m) == pytest.approx(-0.25)
        assert metrics.fwt(m, [0.5, 0.5, 0.1, 0.1]) == pytest.approx(0.25)


def test_what_is_unknown_is_none_and_not_a_number():
    assert metrics.op([]) is None
    assert metrics.bwt([]) is None
    assert metrics.bwt([[0.5]]) is None
    assert metrics.op([[0.5], [None, 0.5]]) is None
    assert metrics.op([[0.5], [0.5]]) is None
    assert metrics.bwt([[0.5], [None, 0.5]]) is None
    assert metrics.fwt([[0.5]], None) is None
    assert metrics.fwt([[0.5]], []) is None
    assert metrics.fwt([[0.5], [0.5, 0.5]], [0.5, None]) is None
    with pytest.raises(KeyError):
        metrics.bwt([[0.5], [0.5, 0.5]], "none")


def test_schemes_are_read_from_text():
    assert metrics.scheme("sound") == metrics.Scheme()
    assert metrics.scheme("release") == metrics.SCHEMES["release"]
    assert metrics.scheme("bwt_over=all") == metrics.Scheme(bwt_over="all")
    assert metrics.scheme("bwt_over=all,remap=false").op == metrics.Scoring(remap=False)
    found = metrics.scheme("release,remap=true,rouge_l=a+b,decimals=2,decimals=none")
    plain = metrics.Scoring(rouge_l=("a", "b"))
    assert found == metrics.Scheme(plain, plain, plain)
    assert metrics.scheme("sound,decimals=9").fwt.decimals == 9


@pytest.mark.parametrize(
    "text",
    [
        "",
        "paper",
        "sound,remap",
        "sound,remap=yes",
        "bwt_over=some",
        "decimals=-1",
        "x=1",
    ],
)
def test_bad_schemes_list_what_there_is(text):
    with pytest.raises(aim_jax.InputError, match="^--scoring: no '.*there are"):
        metrics.scheme(text)


def test_importing_metrics_leaves_out_the_slow_package():
    code = "import sys, aim_jax.metrics; sys.exit('rouge_score' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=golden.ROOT).returncode == 0


@golden.needed
def test_recorded_run_has_the_published_op_bwt_and_fwt():
    expected = golden.read("metrics.json")
    predictions = golden.read("predictions.json.gz")

    def scores(kind):
        return [
            metrics.mean(
                metrics.score_rows(
                    tasks.Task(name, "exact", [], [], []), predictions[kind][name]
                )
            )
            for name in expected["order"]
        ]

    for rows in (r for kind in predictions.values() for r in kind.values()):
        for row in rows:
            assert metrics.exact(row["prediction"], row["label"]) is row["exact"]
    final, right_after, single = map(scores, ("final", "right_after", "single_task"))
    matrix = [[None] * i + [right_after[i]] for i in range(3)] + [final]
    assert final == expected["final"]
    assert single == expected["fwt_single_task"]
    assert metrics.op(matrix) == pytest.approx(
        expected["average_performance"], abs=1e-12
    )
    assert metrics.bwt(matrix) == pytest.approx(expected["bwt"], abs=1e-12)
    assert metrics.fwt(matrix, single) == pytest.approx(expected["fwt"], abs=1e-12)


@golden.needed
def test_scorings_reproduce_the_three_superni_scripts():
    data = golden.read("superni_metrics.json.gz")

    release, sound = (metrics.SCHEMES[name] for name in ("release", "sound"))

    def scores(kind, scoring):
        found = data["predictions"][kind]
        return [
            metrics.mean(metrics.score_rows(superni(n), found[n], scoring), scoring)
            for n in data["order"]
        ]

    def matrix(right_after, final):
        rows = [[None] * i + [value] for i, value in enumerate(right_after[:-1])]
        return [*rows, final]

    close = {"rel": 0, "abs": 1e-12}
    final = scores("avgPerf", release.op)
    assert final == data["per_task_rounded4"]
    assert metrics.op([*[[]] * 14, final]) == pytest.approx(
        data["average_performance"], **close
    )

    final, after = scores("avgPerf", release.bwt), scores("bwt", release.bwt)
    assert final[:-1] == pytest.approx(data["bwt_final"], **close)
    assert after[:-1] == pytest.approx(data["bwt_right_after"], **close)
    assert metrics.bwt(matrix(after, final)) == pytest.approx(data["bwt"], **close)

    after, single = scores("bwt", release.fwt), scores("fwt", release.fwt)
    assert after == pytest.approx(data["fwt_right_after"], **close)
    assert single == pytest.approx(data["fwt_single_task"], **close)
    assert metrics.fwt(matrix(after, after), single) == pytest.approx(
        data["fwt"], **close
    )

    # The options matter: the sound scoring keeps the remap in all three, does not round,
    # and scores task1687 by exact match.
    known = scores("bwt", sound.op)
    i, j = data["order"].index("task363"), data["order"].index("task1687")
    assert known[i] > data["bwt_right_after"][i]
    assert known[j] != data["fwt_right_after"][j]
    assert scores("avgPerf", sound.op) != data["per_task_rounded4"]
