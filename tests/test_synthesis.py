"""Rows that a model writes: prompts and their answers as text, and which rows are kept."""

import numpy as np
import pytest

from aim_jax import config
from aim_jax.data import synthesis

ROWS = [
    {"input": "Say the topic.\nText: A dog ran.\nAnswer:", "output": "animals"},
    {"input": "Say the topic.\nText: A bank fell.\nAnswer:", "output": "money"},
    {"input": "Say the topic.\nText: Rome won.\nAnswer:", "output": "sports"},
]
FRAME = synthesis.Frame("Say the topic.\nText: ", "\nAnswer:")


def test_the_frame_is_what_all_inputs_have_in_whole_words():
    assert synthesis.frame([r["input"] for r in ROWS]) == FRAME
    # Letters in common are no words in common.
    assert synthesis.frame(["to bed or", "to be for"]) == ("to ", "")
    nothing = synthesis.Frame("", "")
    for inputs in (
        [],
        ["one alone"],
        ["one", "two"],
        ["a b", "a b"],
        ["a: \nb", "a: c\nb"],  # which is all of the first
    ):
        assert synthesis.frame(inputs) == nothing, inputs


@pytest.mark.parametrize("gaps", [False, True])
def test_prompts_show_every_ordered_pair(gaps):
    made = synthesis.prompts(ROWS, FRAME, gaps, None, (1,))
    assert len(set(made)) == 6
    end = "Input: Say the topic.\nText:"
    if gaps:
        end += " <extra_id_0>\nAnswer:\nOutput: <extra_id_1>"
    assert made[0] == (
        f"Input: {ROWS[0]['input']}\nOutput: animals\n\n"
        f"Input: {ROWS[1]['input']}\nOutput: money\n\n{end}"
    )
    few = synthesis.prompts(ROWS, FRAME, gaps, 4, (1,))
    assert len(set(few)) == 4 and set(few) <= set(made)
    assert few == synthesis.prompts(ROWS, FRAME, gaps, 4, (1,))
    alone = synthesis.prompts(ROWS[:1], synthesis.Frame("", ""), False, None, (1,))
    assert alone == [f"Input: {ROWS[0]['input']}\nOutput: animals\n\nInput:"]


@pytest.mark.parametrize(
    ("text", "middle"),
    [
        ("The cat.\nAnswer:\nOutput: animals\n\nInput: more", "The cat."),
        ("The cat. Output: animals", "The cat."),
        ("The cat.\nAnswer: animals", None),  # no output
        ("\nAnswer:\nOutput: animals", None),  # no input
        ("The cat.\n\nInput: a dog\nOutput: animals", None),  # two inputs
        ("", None),
    ],
)
def test_what_was_written_becomes_an_input(text, middle):
    expected = middle and f"Say the topic.\nText: {middle}\nAnswer:"
    assert synthesis.parse(text, FRAME, False) == expected


@pytest.mark.parametrize(
    ("text", "middle"),
    [
        ("<extra_id_0> The cat. <extra_id_1> animals", "The cat."),
        ("<extra_id_0> The cat.", None),
        ("<extra_id_0> <extra_id_1> animals", None),
        ("<extra_id_0> The <extra_id_2> cat. <extra_id_1>", None),
        ("The cat. <extra_id_1>", None),
    ],
)
def test_filled_gaps_become_an_input(text, middle):
    expected = middle and f"Say the topic.\nText: {middle}\nAnswer:"
    assert synthesis.parse(text, FRAME, True) == expected


def test_each_cluster_gives_its_nearest_rows_in_proportion():
    rng = np.random.default_rng(0)
    sizes, centres = (60, 31, 9), rng.normal(size=(3, 5)) * 100
    labels = rng.permutation(np.repeat(np.arange(3), sizes))
    vectors = np.float32(centres[labels] + rng.normal(size=(100, 5)))
    chosen = synthesis.pick(vectors, 10, 3, (0, 7))
    expected = []
    for cluster, share in enumerate((6, 3, 1)):
        members = np.flatnonzero(labels == cluster)
        away = np.linalg.norm(vectors[members] - vectors[members].mean(0), axis=1)
        expected += members[np.argsort(away)[:share]].tolist()
    assert chosen == sorted(expected)
    assert chosen == synthesis.pick(vectors, 10, 3, (0, 7))
    # Every count comes out exactly; all, where there are no more.
    for count in range(1, 100):
        picked = synthesis.pick(vectors, count, 20, (1,))
        assert len(set(picked)) == len(picked) == count
    for count in (100, 200):
        assert synthesis.pick(vectors, count, 20, (1,)) == list(range(100))
    assert synthesis.pick(vectors[:0], 10, 20, (1,)) == []


def test_fewer_different_rows_than_clusters():
    vectors = np.repeat(np.eye(2), [7, 3], 0)
    assert len(synthesis.pick(vectors, 5, 4, (1,))) == 5


def test_rows_are_sampled_filtered_picked_and_answered():
    """With a model whose samples are known."""
    asked = []
    ends = [" Output: x", "\nAnswer:\nOutput: x", " and no more", " Output: x"]
    texts = [f"Text {i % 5}{ends[i % 4]}" for i in range(12)]
    texts[3] = f"{'long ' * 50} Output: x"

    def sample(prompts):
        asked.extend(prompts)
        return texts

    def answer(inputs):
        return ["" if "Text 0" in text else text.upper() for text in inputs]

    rows = synthesis.write(
        "topic",
        ROWS,
        config.Memory(rows=3, samples=2),
        (1, 2),
        gaps=False,
        sample=sample,
        fits=lambda inputs: [len(text) < 60 for text in inputs],
        embed=lambda inputs: np.array([[len(text), 0.0] for text in inputs]),
        answer=answer,
    )
    assert len(asked) == 12 and asked[:6] == asked[6:]
    assert 2 <= len(rows) <= 3
    known = {f"Say the topic.\nText: Text {i}\nAnswer:" for i in range(1, 5)}
    assert {row["input"] for row in rows} <= known
    for row in rows:
        assert row["output"] == row["input"].upper()
    assert len({row["id"] for row in rows}) == len(rows)
