"""Compiled decoding in batches, greedy or by sampling, and the text that it gives."""

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

    def likeliest(logits: jax.Array, *context: Any) -> jax.Array:
        return logits.argmax(-1)

    return _decoder(model, eos, cfg.lora, cfg.eval.max_length - 1, likeliest)


def sampled(model: Any, kind: str, eos: int, cfg: config.Config) -> Callable:
    """A compiled function (base, delta, batch, key) -> tokens (b, memory.max_tokens) int32.

    As `greedy`, but each token is drawn as `memory.temperature`, `memory.top_p` and
    `memory.repetition` say; a `decoder` counts the prompt as said already.
    """
    length = cfg.memory.max_tokens

    def draw(
        logits: jax.Array,
        batch: dict[str, jax.Array],
        tokens: jax.Array,
        t: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        rows = jnp.arange(len(logits))[:, None]
        written = jnp.broadcast_to(jnp.arange(length) < t, tokens.shape)
        seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(written)
        if kind == "decoder":
            seen = seen.at[rows, batch["inputs"]].max(batch["mask"])
        left = nucleus(logits, seen, cfg.memory)
        return jax.random.categorical(jax.random.fold_in(key, t), left)

    return _decoder(model, eos, cfg.lora, length, draw)


def nucleus(logits: jax.Array, seen: jax.Array, cfg: config.Memory) -> jax.Array:
    """Logits (b, v) to sample from, -inf where no token is drawn.

    seen (b, v): tokens that were said; their logits are divided by `repetition`, or
    multiplied where below 0 (Keskar et al. 2019). Of the probabilities at `temperature`
    the largest stay that together reach `top_p` (Holtzman et al. 2020).
    """
    less = jnp.where(logits > 0, logits / cfg.repetition, logits * cfg.repetition)
    logits = jnp.where(seen, less, logits) / cfg.temperature
    ordered = -jnp.sort(-logits)
    chances = jax.nn.softmax(ordered)
    kept = jnp.cumsum(chances, -1) - chances < cfg.top_p
    least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _decoder(
    model: Any, eos: int, cfg: config.Lora, length: int, pick: Callable
) -> Callable:
    """`greedy` with tokens (b,) by pick(logits, batch, tokens, t, key)."""

    @jax.jit
    def run(
        base: Tree,
        delta: Tree,
        batch: dict[str, jax.Array],
        key: jax.Array | None = None,
    ) -> jax.Array:
        variables = {"params": base, "lora": lora.bind(delta, cfg)}
        apply = functools.partial(model.apply, variables)
        logits, cache = apply(batch, length, method="prefill")
        done = ~batch["mask"].any(-1)
        tokens = jnp.full((done.shape[0], length), eos, jnp.int32)

        def choose(
            logits: jax.Array, done: jax.Array, tokens: jax.Array, t: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            token = pick(logits, batch, tokens, t, key).astype(jnp.int32)
            token = jnp.where(done, eos, token)
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


def embed(
    table: jax.Array,
    text: batches.Text,
    examples: Sequence[batches.Example],
    rows: int,
    devices: parallel.Devices,
) -> np.ndarray:
    """Mean token embedding (n, i) of the input of each example; table: (v, i)."""
    out = np.zeros((len(examples), table.shape[1]), np.float32)
    for chosen, size in groups(text, [len(e.inputs) for e in examples], rows):
        batch = batches.prompts(text, [examples[i] for i in chosen], size)
        found = parallel.by_rows(_mean, table, {}, batch, devices)
        out[chosen] = found[: len(chosen)]
    return out


@jax.jit
def _mean(table: jax.Array, _: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    real = batch["mask"].astype(jnp.float32)
    found = jnp.take(table, batch["inputs"], axis=0).astype(jnp.float32)
    total = jnp.einsum("bti,bt->bi", found, real)
    return total / jnp.maximum(real.sum(-1, keepdims=True), 1)


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
