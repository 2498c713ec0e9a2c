"""Decoding: the same tokens in any batch, and those of teacher forcing; sampling."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import config, evaluate, parallel
from aim_jax.data import batches, synthetic
from aim_jax.models import hf


@pytest.fixture(scope="module")
def setup():
    cfg = config.resolve(config.Config(eval=config.Eval(max_length=10)))
    base = hf.load(cfg.model)
    tokenizer = batches.tokenizer(hf.ASSETS)
    text = batches.Text(tokenizer, base.family.KIND, cfg.data)
    rows = [
        synthetic.task(name, 0, 4, 0, 0)["train"][i]
        for name in synthetic.NAMES
        for i in range(3)
    ]
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    decode = evaluate.greedy(base.model, (tokenizer.eos_token_id,), cfg, devices)
    return base, text, batches.encode(text, rows), decode


def test_any_batch_gives_the_same_tokens(setup):
    base, text, examples, decode = setup
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    # Several lengths of prompts and of answers, so that places are left and taken.
    examples = [
        e._replace(inputs=np.resize(e.inputs, n)) for n in (20, 90) for e in examples
    ]
    memory = config.Memory(max_tokens=6)
    cfg = config.resolve(config.Config(memory=memory))
    eos, key = text.tokenizer.eos_token_id, jax.random.key(0)
    sample = evaluate.sampled(base.model, "encdec", (eos,), cfg, devices)
    for decoder in (decode, sample):
        alone, batched = (
            evaluate.generate(
                decoder, base.params, {}, text, examples, rows, devices, key
            )
            for rows in (1, 7)
        )
        assert len(batched) == len(examples)
        assert len({len(row) for row in batched}) > 1
        for one, other in zip(alone, batched, strict=True):
            np.testing.assert_array_equal(one, other)


def test_tokens_are_the_most_likely_ones(setup):
    base, text, examples, decode = setup
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    tokens = evaluate.generate(decode, base.params, {}, text, examples, 8, devices)
    eos = text.tokenizer.eos_token_id
    assert any(0 < len(t) < 9 for t in tokens)
    for example, made in zip(examples[:6], tokens, strict=False):
        whole = np.append(made, eos)[:9]
        logits = base.model.apply(
            {"params": base.params},
            {
                "inputs": jnp.asarray(example.inputs)[None],
                "mask": jnp.ones((1, len(example.inputs)), bool),
                "targets": jnp.asarray(whole)[None],
            },
        )
        np.testing.assert_array_equal(logits[0].argmax(-1), whole)


def test_every_end_token_of_the_model_ends_a_row(setup, tmp_path):
    """Chat models have several; transformers stops at each of generation_config.json."""
    base, text, examples, decode = setup
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    eos = text.tokenizer.eos_token_id

    def decoded(decode: evaluate.Decoder) -> list[list[int]]:
        made = evaluate.generate(
            decode, base.params, {}, text, examples, 8, devices, jax.random.key(0)
        )
        return [row.tolist() for row in made]

    whole = decoded(decode)
    other = next(row for row in whole if len(row) > 1)[1]
    assert hf.ends(tmp_path, eos) == (eos,)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [other, eos]}))
    ends = hf.ends(tmp_path, eos)
    cfg = config.resolve(config.Config(eval=config.Eval(max_length=10)))
    cut = [row[: [*row, other].index(other)] for row in whole]
    assert decoded(evaluate.greedy(base.model, ends, cfg, devices)) == cut != whole


def test_a_nucleus_is_the_fewest_tokens_that_reach_top_p():
    cfg = config.Memory(temperature=0.7, top_p=0.6, repetition=1.5)
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=(20, 50)) * 3, rng.random((20, 50)) < 0.3
    found = evaluate.nucleus(jnp.float32(logits), seen, cfg)
    counts = set()
    for row, said, left in zip(logits, seen, found, strict=True):
        row = [x / 1.5 if x > 0 else x * 1.5 for x in row] * said + row * ~said
        chances = np.exp(row / 0.7) / np.exp(row / 0.7).sum()
        order = np.argsort(-chances)
        count = 1 + np.argmax(np.cumsum(chances[order]) >= 0.6)
        counts.add(count)
        kept = np.sort(order[:count])
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(left)), kept)
        np.testing.assert_allclose(left[kept], row[kept] / 0.7, rtol=1e-5)
    assert len(counts) > 2


@pytest.mark.parametrize("kind", ["encdec", "decoder"])
def test_a_cold_sample_is_greedy_and_a_penalty_forbids_what_was_said(kind, setup):
    base, text, examples, decode = setup
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    memory = config.Memory(temperature=1e-6, repetition=1e9, max_tokens=6)
    cfg = config.resolve(dataclasses.replace(config.Config(), memory=memory))
    eos = text.tokenizer.eos_token_id
    sample = evaluate.sampled(base.model, kind, (eos,), cfg, devices)
    key = jax.random.key(0)
    greedy, made = (
        evaluate.generate(f, base.params, {}, text, examples[:8], 8, devices, key)
        for f in (decode, sample)
    )
    for example, one, other in zip(examples, greedy, made, strict=False):
        said = set(example.inputs.tolist()) if kind == "decoder" else set()
        assert len(set(other.tolist()) | said) == len(other) + len(said)
        if kind == "encdec":
            np.testing.assert_array_equal(one[:1], other[:1])
    assert any(len(row) > 1 for row in made)


class Indifferent:
    """A model that finds all tokens alike."""

    def apply(self, variables, *given, method):
        return getattr(self, method)(*given)

    def prefill(self, batch, length, index):
        cache = {"mask": batch["mask"], "index": jnp.int32(index)}
        return jnp.zeros((len(batch["mask"]), 10_000)), cache

    def step(self, token, cache):
        return jnp.zeros((len(token), 10_000)), cache

    def widen(self, cache, extra):
        return cache | {"mask": jnp.pad(cache["mask"], ((0, 0), (extra, 0)))}


def test_every_token_is_drawn_by_a_key_of_its_own_up_to_the_limit():
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    memory, own = config.Memory(max_tokens=6), config.Eval(max_length=10)
    cfg = config.Config(memory=memory, eval=own)
    text = batches.Text(types.SimpleNamespace(eos_token_id=1), "encdec", config.Data())
    rows = [batches.Example("", np.array([5, 6]), np.array([7]))] * 5
    drawn, likeliest = (
        evaluate.generate(decoder, {}, {}, text, rows, 2, devices, jax.random.key(0))
        for decoder in (
            evaluate.sampled(Indifferent(), "encdec", (1,), cfg, devices),
            evaluate.greedy(Indifferent(), (1,), cfg, devices),
        )
    )
    assert len(np.unique(np.concatenate(drawn))) > 25
    # T5's start token is one of ten.
    assert [len(row) for row in likeliest] == [9] * 5


def test_an_embedding_is_the_mean_over_tokens(setup):
    base, text, examples, _ = setup
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    table = hf.flatten(base.params)[base.family.EMBEDDING]
    found = evaluate.embed(table, text, examples, 7, devices)
    for example, row in zip(examples, found, strict=True):
        expected = np.asarray(table)[example.inputs].mean(0)
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_texts_leave_padding_out(setup):
    tokenizer = setup[1].tokenizer
    ids = tokenizer("two words", add_special_tokens=False)["input_ids"]
    padded = np.array([*ids, tokenizer.pad_token_id, tokenizer.pad_token_id])
    assert evaluate.texts(tokenizer, [padded, padded[:0]]) == ["two words", ""]
