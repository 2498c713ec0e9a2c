"""Greedy decoding: the same tokens in any batch, and those of teacher forcing."""

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
    decode = evaluate.greedy(base.model, tokenizer.eos_token_id, cfg)
    return base, text, batches.encode(text, rows), decode


def test_any_batch_gives_the_same_tokens(setup):
    base, text, examples, decode = setup
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    alone, batched = (
        evaluate.generate(decode, base.params, {}, text, examples, rows, devices)
        for rows in (1, 7)
    )
    assert len(batched) == len(examples)
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


def test_texts_leave_padding_out(setup):
    tokenizer = setup[1].tokenizer
    ids = tokenizer("two words", add_special_tokens=False)["input_ids"]
    padded = np.array([*ids, tokenizer.pad_token_id, tokenizer.pad_token_id])
    assert evaluate.texts(tokenizer, [padded, padded[:0]]) == ["two words", ""]
