"""Text as it comes: nothing crashes without a row number, no row is lost or doubled."""

import ast
import collections
import json
import pathlib
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import aim_jax
from aim_jax import config, evaluate, metrics, parallel
from aim_jax.data import batches, memory, tasks
from aim_jax.models import hf, layers

hypothesis.settings.register_profile("fast", max_examples=30, deadline=None)
hypothesis.settings.load_profile("fast")

# Written out: halves of surrogate pairs, NUL, line separators, right-to-left, emoji of
# several code points, the end token as text, white space that is not ASCII.
SPECIMENS = (
    "",
    " ",
    "\u3000\u2003",
    "\0",
    "a\0b",
    "\ud83d",
    "\u2028\u2029\x85",
    "\ufeffx",
    "\u200fשלום \u202eabc",
    "😀👩‍👩‍👧🏽",
    "</s><pad>",
    "None",
    "x" * 100_000,
    "word " * 20_000,
)
TEXT = st.one_of(st.sampled_from(SPECIMENS), st.text(max_size=40))
GOOD = TEXT.filter(lambda t: t.strip() and "\ud83d" not in t)
ROWS = st.lists(
    st.fixed_dictionaries({"id": st.sampled_from("ab"), "input": GOOD, "output": GOOD}),
    min_size=1,
    max_size=12,
)
DATA = config.Data(
    max_input=24, max_target=6, max_test_input=80, buckets=(8, 16, 32), device_rows=8
)


@pytest.fixture(scope="module")
def text():
    return batches.Text(batches.tokenizer(hf.ASSETS), "encdec", DATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    for split in tasks.SPLITS:
        (folder / split).mkdir()
        write(folder, split, [{"input": "a", "output": "b"}])
    return folder


def write(folder, split, rows, ascii_only=True):
    data = json.dumps(rows, ensure_ascii=ascii_only)
    (folder / split / "t.json").write_bytes(data.encode("utf-8", "surrogatepass"))


def load(folder):
    return tasks.load(config.Data(benchmark="custom", root=str(folder), tasks=("t",)))[
        0
    ]


def sound(text):
    return bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


@hypothesis.given(
    rows=st.lists(
        st.fixed_dictionaries({"id": TEXT, "input": TEXT, "output": TEXT}),
        min_size=1,
        max_size=6,
    ),
    ascii_only=st.booleans(),
)
@hypothesis.example(  # a sound character whose escape has the half of a pair in it
    rows=[{"id": "", "input": "", "output": t} for t in ("\U00013c00", "\ud83d")],
    ascii_only=False,
)
def test_the_loader_gives_every_row_or_names_the_first_bad_one(
    folder, rows, ascii_only
):
    write(folder, "train", rows, ascii_only)
    bad = [i for i, row in enumerate(rows) if not all(map(sound, row.values()))]
    if bad:
        with pytest.raises(aim_jax.InputError) as error:
            load(folder)
        garbled = [
            i
            for i, r in enumerate(rows)
            if any(re.search("[\ud800-\udfff]", text) for text in r.values())
        ]
        first = bad[0] if ascii_only or not garbled else garbled[0]
        assert f"train/t.json: row {first} (counted from 0)" in str(error.value)
    else:
        assert load(folder).train == rows


@hypothesis.given(data=st.binary(max_size=60))
def test_a_file_of_any_bytes_is_named(folder, data):
    (folder / "train" / "t.json").write_bytes(data)
    with pytest.raises(aim_jax.InputError, match="train/t.json: "):
        load(folder)


@hypothesis.given(rows=ROWS)
def test_every_row_becomes_one_example_within_the_limits(text, rows):
    for truncate, most in ((True, DATA.max_input), (False, DATA.max_test_input)):
        examples = batches.encode(text, rows, truncate)
        assert [e.id for e in examples] == [row["id"] for row in rows]
        for example in examples:
            assert 1 <= len(example.inputs) <= most
            assert 1 <= len(example.targets) <= DATA.max_target
            assert example.targets[-1] == text.tokenizer.eos_token_id


@hypothesis.given(
    rows=ROWS, size=st.integers(1, 5), kind=st.sampled_from(["encdec", "decoder"])
)
def test_an_epoch_trains_on_every_row_once(text, rows, size, kind):
    text = text._replace(kind=kind)
    examples = batches.encode(text, rows)
    cfg = config.Train(epochs=1, batch_size=size)
    seen = collections.Counter()
    for step in range(1, -(-len(rows) // size) + 1):
        (chosen,) = batches.step_rows(len(rows), cfg, (42, 7), step)
        seen.update(chosen.tolist())
        batch = batches.collate(text, [[examples[i] for i in chosen]], size)
        for r, i in enumerate(chosen):
            there = batch["weights"][0, r] > 0
            assert np.array_equal(batch["targets"][0, r][there], examples[i].targets)
            tokens = batch["inputs"][0, r][batch["mask"][0, r]]
            assert np.array_equal(tokens[: len(examples[i].inputs)], examples[i].inputs)
        assert not batch["mask"][0, len(chosen) :].any()
        assert not batch["weights"][0, len(chosen) :].any()
    assert seen == dict.fromkeys(range(len(rows)), 1)


@hypothesis.given(
    rows=ROWS,
    percent=st.sampled_from([1.0, 30.0, 100.0]),
    rule=st.sampled_from(["release", "exact"]),
)
def test_the_memory_keeps_no_row_twice(rows, percent, rule):
    numbered = [row | {"id": str(i)} for i, row in enumerate(rows)]
    (kept,) = memory.sample([numbered], percent, rule)
    ids = [row["id"] for row in memory.fill([kept])]
    assert len(set(ids)) == len(ids) >= 1
    if percent == 100:
        assert len(ids) == len(rows)


class Echo:
    """A model whose answer is the end of the prompt, without its end token."""

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def prefill(self, batch, length, index):
        start = batch["mask"].sum(-1, keepdims=True) - 1 - length
        place = jnp.maximum(start, 0) + jnp.arange(length)
        said = jnp.take_along_axis(batch["inputs"], place, 1, mode="fill", fill_value=0)
        written = jnp.zeros(len(said), jnp.int32)
        cache = {"mask": batch["mask"], "said": said, "written": written}
        return self.logits(said[:, 0]), cache | {"index": index}

    def step(self, token, cache):
        written = cache["written"] + 1
        token = jnp.take_along_axis(cache["said"], written[:, None], 1)[:, 0]
        return self.logits(token), cache | {"written": written}

    def widen(self, cache, extra):
        return cache | {"mask": layers.widen(cache["mask"], extra, 1)}

    def logits(self, token):
        return jax.nn.one_hot(token, 8192)


@pytest.fixture(scope="module")
def decoder(text, devices):
    cfg = config.Config(eval=config.Eval(max_length=5))
    return evaluate.greedy(Echo(), (text.tokenizer.eos_token_id,), cfg, devices)


@pytest.fixture(scope="module")
def devices():
    return parallel.open_devices(config.Parallel(mode="jit"))


@hypothesis.given(rows=ROWS, size=st.integers(1, 4))
def test_every_row_is_decoded_once_and_scored(text, decoder, devices, rows, size):
    """Each answer meets its own row, whichever places rows leave to others."""
    eos = text.tokenizer.eos_token_id
    examples = batches.encode(text, rows, truncate=False)
    tokens = evaluate.generate(decoder, {}, {}, text, examples, size, devices)
    assert len(tokens) == len(rows)
    for made, example in zip(tokens, examples, strict=True):
        wanted = example.inputs[:-1][-4:]
        ends = np.flatnonzero(wanted == eos)
        assert np.array_equal(made, wanted[: ends[0]] if len(ends) else wanted)
    for made, row in zip(evaluate.texts(text.tokenizer, tokens), rows, strict=True):
        assert 0.0 <= metrics.score_row("exact", made, row["output"]) <= 1.0


@hypothesis.given(
    prediction=TEXT, label=TEXT, metric=st.sampled_from(list(metrics.METRICS))
)
def test_any_prediction_scores_from_0_to_1(prediction, label, metric):
    if metric == "rouge_l":
        pytest.importorskip("rouge_score")
        prediction, label = prediction[:200], label[:200]
    assert 0.0 <= metrics.score_row(metric, prediction, label, {"pos": "p"}) <= 1.0
    assert metrics.score_row("exact", label, label) == 1.0


def test_rows_beyond_the_last_bucket_are_read_one_by_one(text, decoder, devices):
    """And as many are decoded at once as take no more room than the others."""
    last = max(DATA.buckets)
    lengths = (2 * last + 1, 3, last + 1, last, 9, last + 1)
    eos = text.tokenizer.eos_token_id
    rows = [
        batches.Example("", np.array([n] * (n - 1) + [eos]), np.ones(1))
        for n in lengths
    ]
    seen = []

    def fill(base, delta, pool, batch, places, key):
        seen.append((*batch["inputs"].shape, *pool.cache["mask"].shape))
        return decoder.fill(base, delta, pool, batch, places, key)

    watched = decoder._replace(fill=fill)
    tokens = evaluate.generate(watched, {}, {}, text, rows, 8, devices)
    assert [row.tolist() for row in tokens] == [[n] * min(n - 1, 4) for n in lengths]
    # (rows, their length, places, room of a place) of each filling
    usual, long = [(2, 12, 8, 16), (2, 32, 8, 32)], [(1, 64, 2, 64)] * 2
    assert seen == [*usual, *long, (1, 96, 2, 96)]


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/x.safetensors", "a/b"])
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(aim_jax.InputError, match="must be names of files beside it"):
        hf.tensor_files(tmp_path)


def test_nothing_that_is_read_is_run():
    """No unpickling and no evaluation anywhere; a config file alone is a program."""
    for file in pathlib.Path(aim_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "dill", "joblib", "marshal", "shelve"}, (
                    file
                )
                assert "torch" not in names, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile"), (file, called)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("trust_remote_code", "False") == "False", file
                assert "allow_pickle" not in keywords, file


def test_no_tokenizer_of_a_model_directory_is_run(tmp_path, monkeypatch):
    """transformers asks at a terminal, and a yes would run it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    named = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with pytest.raises(aim_jax.InputError, match="no tokenizer"):
        batches.tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
