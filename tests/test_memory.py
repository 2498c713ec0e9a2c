"""The memory: its rules by hand, and the choices that the PyTorch release recorded.

The recorded choices change only if the release's loader turns out to do something else.
"""

import collections
import hashlib
import json
import random

import golden
import numpy as np
import pytest

from aim_jax.data import memory


def rows(*counts, name="t"):
    """Rows of one class per count, the classes mixed as evenly as they can be."""
    labels = [f"{name}{k}" for k, n in enumerate(counts) for _ in range(n)]
    random.Random(0).shuffle(labels)
    return [
        {"id": f"{name}_{i}", "input": f"{name} {i}", "output": label}
        for i, label in enumerate(labels)
    ]


def classes(chosen):
    return sorted(collections.Counter(row["output"] for row in chosen).values())


def ids(chosen):
    return [row["id"] for row in chosen]


def sample(tasks_train, percent, rule, seed=42):
    kept = memory.sample(tasks_train, percent, rule, seed)
    assert len(kept) == len(tasks_train)
    return [row for rows in kept for row in rows]


def test_release_gives_every_class_an_equal_share_and_fills_up():
    chosen = sample([rows(300, 300, 300)], 1.2, "release")
    assert len(set(ids(chosen))) == 10  # 3 of each class, and one of all the rest
    assert classes(chosen) == [3, 3, 4]


def test_release_keeps_at_least_one_row_a_class():
    text = rows(*[1] * 90, 10)  # 91 classes in 100 rows
    assert classes(sample([text], 2, "release")) == [1] * 91
    assert len(sample([rows(4, 6)], 2, "release")) == 2  # although 2 % of 10 is none


@pytest.mark.parametrize(
    "counts, percent, expected",
    [
        ((500, 500), 2, [10, 10]),
        ((700, 300), 2, [10, 10]),  # balanced, not in proportion
        ((996, 4), 2, [4, 16]),  # the small class is kept whole
        ((400, 300, 300), 1, [3, 3, 4]),
        ((1,) * 100, 5, [1] * 5),  # more classes than rows
        ((10,), 2, [1]),  # never none
        ((5, 3), 100, [3, 5]),
    ],
)
def test_exact_keeps_its_percentage_and_balances(counts, percent, expected):
    task = rows(*counts)
    chosen = sample([task], percent, "exact")
    assert classes(chosen) == expected
    assert len(set(ids(chosen))) == len(chosen)
    assert len(chosen) == max(1, int(len(task) * percent / 100))


def test_exact_draws_lots_where_classes_outnumber_rows():
    text = rows(*[1] * 100)
    drawn = [{r["output"] for r in sample([text], 5, "exact", s)} for s in range(9)]
    assert len(set().union(*drawn)) > 20


@pytest.mark.parametrize("rule", ["release", "exact"])
def test_a_new_task_only_adds_rows(rule):
    a, b = rows(60, 40, name="a"), rows(50, 50, 20, name="b")
    one, two = sample([a], 10, rule), sample([a, b], 10, rule)
    assert two[: len(one)] == one
    assert {row["output"][0] for row in two[len(one) :]} == {"b"}
    mixed = memory.fill(memory.sample([a, b], 10, rule))
    assert mixed != two and set(ids(mixed)) == set(ids(two))


@pytest.mark.parametrize("rule", ["release", "exact"])
def test_the_memory_is_decided_by_its_seed(rule):
    task = [rows(100, 100)]
    assert sample(task, 10, rule, seed=1) == sample(task, 10, rule, seed=1)
    assert sample(task, 10, rule, seed=1) != sample(task, 10, rule, seed=2)
    assert memory.fill(task, seed=1) == memory.fill(task, seed=1)
    assert memory.fill(task, seed=1) != memory.fill(task, seed=2)


@pytest.mark.parametrize("rule", ["release", "exact"])
def test_percentages_end_at_none_and_all(rule):
    task = rows(7, 5)
    assert sample([task], 0, rule) == []
    assert memory.fill([]) == memory.fill([[]]) == []
    assert sorted(ids(sample([task], 100, rule))) == sorted(ids(task))


def test_draw_is_distinct_rows_decided_by_the_key():
    first = memory.draw(100, 8, (42, 1, 7))
    assert len(set(first.tolist())) == 8
    assert set(first.tolist()) <= set(range(100))
    np.testing.assert_array_equal(first, memory.draw(100, 8, (42, 1, 7)))
    keys = [(42, 1, 7), (42, 1, 8), (42, 2, 7), (43, 1, 7), (42, 1, 7, 0), (42, 1)]
    assert len({tuple(memory.draw(100, 8, key)) for key in keys}) == len(keys)


def test_draw_of_more_than_there_is_gives_all_in_a_random_order():
    drawn = memory.draw(5, 32, (1, 2))
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    assert len(memory.draw(0, 32, (1, 2))) == 0


def test_draws_favour_no_row():
    counts = collections.Counter(
        int(i) for step in range(2000) for i in memory.draw(10, 3, (0, step))
    )
    # 600 each is expected, with a standard deviation of 20.
    assert len(counts) == 10
    assert all(500 < n < 700 for n in counts.values())


def test_order_is_a_permutation_decided_by_the_key():
    assert sorted(memory.order(50, (3, 0))) == list(range(50))
    np.testing.assert_array_equal(memory.order(50, (3, 0)), memory.order(50, (3, 0)))
    assert (memory.order(50, (3, 0)) != memory.order(50, (3, 1))).any()


def test_shuffle_is_that_of_datasets():
    # datasets.Dataset.from_dict({"a": range(10)}).shuffle(seed=42)["a"], datasets 5.2.0
    assert memory.shuffle(range(10), 42) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]


@golden.needed
@golden.benchmarks
def test_the_published_choices_on_the_full_data():
    cases = golden.read("memory_and_validation_full_data.json.gz")
    folders = {"data_longsequence": "long_sequence", "data_superni": "superni"}
    assert len(cases) == 18
    for case in cases:
        folder = golden.DATA / folders[case["data_dir"]] / "train"
        train = [
            json.loads((folder / f"{name}.json").read_text())
            for name in case["order"][:-1]
        ]
        chosen = ids(sample(train, case["memory_data_ratio"], "release"))
        assert len(chosen) == case["n_memory"]
        assert chosen == case.get("memory_ids", chosen)
        digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
        assert digest == case["memory_ids_sha256"], case["order"]


@golden.needed
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_recorded_memory_in_its_order(number):
    names = ["dbpedia", "amazon", "yahoo", "agnews"]
    train = [golden.read(f"data/train/{name}_T5.json.gz") for name in names[:number]]
    trace = golden.trace(f"task{number}_{names[number]}_ours")
    expected = trace["memory_sample_id"].tolist()
    assert ids(memory.fill(memory.sample(train, 10, "release"))) == expected


@golden.benchmarks
def test_two_percent_of_superni_is_two_percent():
    folder = golden.DATA / "superni/train"
    train = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    kept = len(sample(train, 2, "exact"))
    assert kept == sum(max(1, int(len(task) * 0.02)) for task in train)
    assert len(sample(train, 2, "release")) > 30 * kept
