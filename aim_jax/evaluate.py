"""Compiled greedy decoding in batches, and scores of what it gives."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax import config, lora, parallel, preemption
from aim_jax.data import batches

Tree = Any


def greedy(model: Any, eos: int, cfg: config.Config) -> Callable:
    """A compiled function (base, delta, batch) -> tokens (b, max_length - 1) int32.

    The most likely token each time, until every row has ended; a row is padded with eos
    after its end. Rows without any input end at once.
    """
    length = cfg.eval.max_length - 1

    @jax.jit
    def run(base: Tree, delta: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        variables = {"params": base, "lora": lora.bind(delta, cfg.lora)}
        apply = functools.partial(model.apply, variables)
        logits, cache = apply(batch, length, method="prefill")
        done = ~batch["mask"].any(-1)
        tokens = jnp.full((done.shape[0], length), eos, jnp.int32)

        def choose(
            logits: jax.Array, done: jax.Array, tokens: jax.Array, t: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            token = jnp.where(done, eos, logits.argmax(-1).astype(jnp.int32))
            return token, done | (token == eos), tokens.at[:, t].set(token)

        def body(carry: Tree) -> Tree:
            token, done, tokens, t, cache = carry
            logits, cache = apply(token, cache, method="step")
            return *choose(logits, done, tokens, t), t + 1, cache

        def going(carry: Tree) -> jax.Array:
            return ~carry[1].all() & (carry[3] < length)

        first = choose(logits, done, tokens, jnp.int32(0))
        return jax.lax.while_loop(going, body, (*first, jnp.int32(1), cache))[2]

    return run


def generate(
    decode: Callable,
    base: Tree,
    delta: Tree,
    text: batches.Text,
    examples: Sequence[batches.Example],
    rows: int,
    devices: parallel.Devices,
) -> list[np.ndarray]:
    """Token ids decoded for each example, without the end token, in their order."""
    out: dict[int, np.ndarray] = {}
    eos = text.tokenizer.eos_token_id
    for chosen, size in groups(text, [len(e.inputs) for e in examples], rows):
        preemption.check()
        batch = batches.prompts(text, [examples[i] for i in chosen], size)
        tokens = parallel.by_rows(decode, base, delta, batch, devices)
        for row, i in zip(tokens, chosen, strict=False):
            ends = np.flatnonzero(row == eos)
            out[i] = row[: ends[0]] if len(ends) else row
    return [out[i] for i in range(len(examples))]


def groups(
    text: batches.Text, lengths: Sequence[int], rows: int
) -> Iterator[tuple[list[int], int]]:
    """Numbers of the rows to decode together, by length, and the rows of their batch.

    Rows longer than the last bucket are decoded one by one: the memory that attention
    takes grows with the square of the length.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    usual = [i for i in order if lengths[i] <= text.data.buckets[-1]]
    for start in range(0, len(usual), rows):
        yield usual[start : start + rows], rows
    for i in order[len(usual) :]:
        yield [i], 1


def texts(tokenizer: Any, tokens: Sequence[np.ndarray]) -> list[str]:
    """Decoded text: padding removed, stripped (semantics.md 5.1)."""
    pad = tokenizer.pad_token_id
    kept = [[int(t) for t in row if t != pad] for row in tokens]
    return [text.strip() for text in tokenizer.batch_decode(kept)]
