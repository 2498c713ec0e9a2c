"""The embedded tasks, and the files of the embedded model."""

import collections
import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aim_jax
from aim_jax import config
from aim_jax.assets import exercises
from aim_jax.data import batches, synthetic
from aim_jax.models import hf

SIZES = (synthetic.TRAIN, synthetic.DEV, synthetic.TEST)
# Recorded from the generators; may change only together with the tasks themselves, and
# then every score measured on them must be measured again.
RECORDED = "13940e15144dc87b8fab2d5b03c0636e95bb4f8e43834934ec983aa1410c04c2"
ODD = (
    "",
    " two  spaces ",
    "\n\tAnswer:\r\n",
    "naïve café, e\u0301 and Å",
    "👩‍👩‍👧 🏳️‍🌈 \ufe0f",
    "שלום, العربية \u202eabc\u202c",
    "日本語 ﷺ \x00 \ufffd ▁Ġ",
    "don't stop... it's 12,345.67 % <b>&amp;</b>",
    "_____" * 30,
)


DIGEST = """
import hashlib, json
from aim_jax.data import synthetic
rows = [synthetic.task(name, 7, 5, 2, 2) for name in synthetic.NAMES]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer():
    return batches.tokenizer(hf.ASSETS)


@pytest.fixture(scope="module", params=synthetic.NAMES)
def task(request):
    return synthetic.task(request.param, 0, *SIZES)


def test_there_are_tasks_of_several_kinds():
    assert len(set(synthetic.NAMES)) == len(synthetic.NAMES) >= 6
    assert len(set(synthetic.STREAM)) == len(synthetic.STREAM) >= 4
    assert set(synthetic.STREAM) <= set(synthetic.NAMES)


@pytest.mark.parametrize("hash_seed", ["0", "123"])
def test_every_process_makes_the_rows_recorded(hash_seed):
    made = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.strip() == RECORDED


def test_the_seed_decides():
    name = synthetic.NAMES[0]
    first, again, third = (synthetic.task(name, seed, 9, 3, 3) for seed in (1, 1, 2))
    assert first == again
    assert first != third


def test_rows_have_the_benchmark_format(task):
    for split, size in zip(("train", "dev", "test"), SIZES, strict=True):
        assert len(task[split]) == size
        for row in task[split]:
            assert list(row) == ["id", "input", "output"]
            assert all(
                isinstance(v, str) and v == v.strip() != "" for v in row.values()
            )
            assert row["input"].endswith("\nAnswer:")


def test_no_input_and_no_id_occurs_twice(task):
    rows = [row for split in task.values() for row in split]
    assert len({row["input"] for row in rows}) == len(rows) == sum(SIZES)
    assert len({row["id"] for row in rows}) == len(rows)


def test_labels_are_balanced(task):
    for rows in task.values():
        counts = collections.Counter(row["output"] for row in rows)
        assert len(counts) >= 2
        assert max(counts.values()) <= 0.6 * len(rows)
    assert {r["output"] for r in task["test"]} <= {r["output"] for r in task["train"]}


def test_options_name_every_label(task):
    for row in task["train"]:
        _, found, rest = row["input"].partition("Option: ")
        if found:
            assert row["output"] in rest.partition(".\n")[0].split(", ")
        else:
            assert row["output"] in row["input"].partition("passage: ")[2]


def test_rows_fit_the_smallest_buckets(task, tokenizer):
    data = config.Data()
    text = batches.Text(tokenizer, "encdec", data)
    for rows in task.values():
        for example in batches.encode(text, rows):
            assert 25 <= len(example.inputs) <= 64
            assert len(example.targets) <= min(data.target_buckets)


def test_prefixes_are_balanced():
    rows = synthetic.task("inference", 0, 30, 0, 0)["train"]
    counts = collections.Counter(row["output"] for row in rows)
    assert set(counts.values()) == {10}


def test_the_task_follows_from_its_text():
    """The label is what a reader of the passage would say."""
    for row in synthetic.task("question", 0, 200, 0, 0)["train"]:
        asked = row["input"].partition("question: is ")[2].partition("\n")[0]
        thing, place = asked.split(" in ")
        stated = f"{thing} is in {place}.".capitalize()
        assert (stated in row["input"]) == (row["output"] == "True")
    for row in synthetic.task("sentiment", 0, 200, 0, 0)["train"]:
        text = row["input"].partition("Text: ")[2]
        has = {
            sign: any(word in text.replace(".", " ").split() for word in words.split())
            for sign, words in synthetic.OPINIONS.items()
        }
        said = row["output"]
        if said != "neutral":
            against = {"positive": "negative", "negative": "positive"}[said]
            assert has[said] and not has[against]
        else:
            assert has["positive"] == has["negative"]


def test_too_many_rows_are_refused(monkeypatch):
    writer = (("yes",), lambda rng, label: (synthetic.pick(rng, "ab"), label))
    monkeypatch.setitem(synthetic.WRITERS, "small", writer)
    with pytest.raises(aim_jax.InputError, match="small: no more than 2 distinct"):
        synthetic.task("small", 0, 2, 1, 0)


def test_pretraining_shows_no_task_of_the_stream():
    rng = random.Random(3)
    seen = [exercises.text(rng) for _ in range(500)]
    seen += [exercises.exercise(rng)[1] for _ in range(2000)]
    everything = "\n".join(seen)
    for name in synthetic.NAMES:
        row = synthetic.task(name, 0, 1, 0, 0)["train"][0]
        instruction = row["input"].partition("\n")[0].partition("? ")[0]
        assert instruction not in everything, name


def test_every_exercise_can_be_solved_from_its_text():
    rng = random.Random(4)
    for name, write in exercises.EXERCISES.items():
        for _ in range(100):
            text, output = write(rng)
            assert all(word in text for word in output.split())
            assert text.endswith("\nAnswer:"), name


@pytest.mark.parametrize("text", ODD)
def test_any_text_survives_the_tokenizer(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(max_size=60))
def test_random_text_survives_the_tokenizer(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_is_one_token_wherever_it_stands(tokenizer):
    alone = tokenizer("Science", add_special_tokens=False)["input_ids"]
    inside = tokenizer("Sports, Science", add_special_tokens=False)["input_ids"]
    assert len(alone) == 1
    assert inside[-1:] == alone


def test_special_tokens_have_the_ids_of_t5(tokenizer):
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2)
    sizes = json.loads((hf.ASSETS / "config.json").read_text())
    assert sizes["pad_token_id"] == sizes["decoder_start_token_id"] == 0
    assert sizes["eos_token_id"] == 1
    assert len(tokenizer) <= sizes["vocab_size"]


def test_the_tokenizer_loads_silently():
    code = (
        "import transformers, aim_jax.models.hf as hf;"
        "t = transformers.AutoTokenizer.from_pretrained(hf.ASSETS);"
        "print(t('a')['input_ids'][-1])"
    )
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://localhost:9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == "1\n"
    assert made.stderr == ""


def test_the_model_is_small_and_fits_its_config():
    assert (hf.ASSETS / "model.safetensors").stat().st_size <= 8_000_000
    base = hf.load(config.Model())
    assert base.family.__name__.endswith("t5")
    assert base.params["shared"]["weight"].dtype == "float32"
