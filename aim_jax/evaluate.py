"""Compiled decoding, greedy or by sampling, and the text that it gives.

Rows that have ended leave their places to others at once (Orca, Yu et al. 2022, section 3),
so that no device waits for the longest answer of a batch.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax import config, lora, parallel, preemption
from aim_jax.data import batches

Tree = Any
REFILL = 4  # finished rows make room for others as soon as they are a part of all


class Pool(NamedTuple):
    """Rows that are decoded together, in places (r,) that others take when they are done.

    cache: the model's; tokens (r, length) int32: those chosen so far, `count` (r,) of them,
    eos elsewhere; done (r,): no more are wanted, as in a free place. To sample: keys (r, 2),
    the random key of each row, and said (r, v), which tokens it has.
    """

    cache: Tree
    tokens: jax.Array
    count: jax.Array
    done: jax.Array
    keys: jax.Array | None = None
    said: jax.Array | None = None


class Decoder(NamedTuple):
    """Compiled functions that advance a `Pool`.

    empty(base, delta, batch, key, rows) -> pool of `rows` free places for rows as in batch
    widen(pool, extra) -> pool with room for prompts of `extra` more tokens
    fill(base, delta, pool, batch, places, key) -> pool with the rows of a batch in it
    run(base, delta, pool, least) -> pool of which `least` places a device are done

    places: of each row on the device that has the row; of none for an empty row.
    """

    empty: Callable
    widen: Callable
    fill: Callable
    run: Callable


def greedy(
    model: Any, ends: tuple[int, ...], cfg: config.Config, devices: parallel.Devices
) -> Decoder:
    """Decodes up to `eval.max_length` - 1 tokens, the most likely one each time.

    ends: the tokens that end a row, eos first; it stands for any of them. Rows without any
    input end at once.
    """

    def likeliest(logits: jax.Array, pool: Pool) -> jax.Array:
        return logits.argmax(-1)

    return _decoder(model, ends, cfg.lora, cfg.eval.max_length - 1, devices, likeliest)


def sampled(
    model: Any,
    kind: str,
    ends: tuple[int, ...],
    cfg: config.Config,
    devices: parallel.Devices,
) -> Decoder:
    """Decodes up to `memory.max_tokens`, drawn as `memory.temperature`, `.top_p` and
    `.repetition` say; a `decoder` counts the prompt as said already.

    What is drawn for a row depends on the key and the row's number alone; ends: as of
    `greedy`.
    """

    def draw(logits: jax.Array, pool: Pool) -> jax.Array:
        left = nucleus(logits, pool.said, cfg.memory)
        keys = jax.random.wrap_key_data(pool.keys)
        keys = jax.vmap(jax.random.fold_in)(keys, pool.count)
        return jax.vmap(jax.random.categorical)(keys, left)

    length = cfg.memory.max_tokens
    return _decoder(model, ends, cfg.lora, length, devices, draw, kind)


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
    model: Any,
    ends: tuple[int, ...],
    cfg: config.Lora,
    length: int,
    devices: parallel.Devices,
    pick: Callable,
    sampling: str = "",
) -> Decoder:
    """A decoder of tokens (r,) by pick(logits, pool); sampling: the model's kind."""
    count = parallel.lanes(devices)[0].count
    eos = ends[0]

    def apply(base: Tree, delta: Tree, *args: Any, method: str) -> Any:
        variables = {"params": base, "lora": lora.bind(delta, cfg)}
        return model.apply(variables, *args, method=method)

    def choose(logits: jax.Array, pool: Pool) -> Pool:
        token = pick(logits, pool).astype(jnp.int32)
        token = jnp.where(pool.done | jnp.isin(token, jnp.array(ends)), eos, token)
        rows = jnp.arange(len(token))
        count = pool.count + ~pool.done
        said = pool.said
        return pool._replace(
            tokens=pool.tokens.at[rows, pool.count].set(token, mode="drop"),
            count=count,
            done=pool.done | (token == eos) | (count == length),
            said=None if said is None else said.at[rows, token].set(True),
        )

    def begun(
        base: Tree, delta: Tree, batch: Tree, key: Any, index: jax.Array | int
    ) -> Pool:
        """The rows of a batch with their first token, in as many places."""
        logits, cache = apply(base, delta, batch, length, index, method="prefill")
        keys = said = None
        if sampling:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["number"])
            keys = jax.random.key_data(keys)
            said = jnp.zeros(logits.shape, bool)
        if sampling == "decoder":
            rows = jnp.arange(len(said))[:, None]
            said = said.at[rows, batch["inputs"]].max(batch["mask"])
        rows = len(logits)
        pool = Pool(
            cache,
            tokens=jnp.full((rows, length), eos, jnp.int32),
            count=jnp.zeros(rows, jnp.int32),
            done=~batch["mask"].any(-1),
            keys=keys,
            said=said,
        )
        return choose(logits, pool)

    def placed(pool: Pool) -> Pool:
        return parallel.spread(pool, row_axis, devices)

    @functools.partial(jax.jit, static_argnums=4)
    def empty(base: Tree, delta: Tree, batch: Tree, key: Any, rows: int) -> Pool:
        like = jax.eval_shape(begun, base, delta, batch, key, 0)

        def free(x: jax.ShapeDtypeStruct) -> jax.Array:
            axis = row_axis(x)
            return jnp.zeros(
                [rows if i == axis else size for i, size in enumerate(x.shape)], x.dtype
            )

        pool = jax.tree.map(free, like)
        return placed(pool._replace(done=~pool.done))

    def wider(pool: Pool, extra: int) -> Pool:
        return pool._replace(cache=model.widen(pool.cache, extra))

    @functools.partial(jax.jit, static_argnums=1)
    def widen(pool: Pool, extra: int) -> Pool:
        return placed(wider(pool, extra))

    @functools.partial(jax.jit, donate_argnums=2)
    def fill(
        base: Tree, delta: Tree, pool: Pool, batch: Tree, places: jax.Array, key: Any
    ) -> Pool:
        # Prompts are many tokens, so weights are gathered to their rows.
        begin = parallel.within(begun, devices)
        new = begin(base, delta, batch, key, pool.cache["index"])
        new = wider(new, pool.cache["mask"].shape[1] - batch["mask"].shape[1])

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            axis = row_axis(old)
            if axis is None:
                return old

            def split(x: jax.Array) -> jax.Array:
                return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])

            def own(old: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
                where = (*(slice(None),) * axis, places)
                return old.at[where].set(new, mode="drop")

            apart = places.reshape(count, -1)
            made = jax.vmap(own, (axis, axis, 0), axis)(split(old), split(new), apart)
            return made.reshape(old.shape)

        return placed(jax.tree.map(put, pool, new))

    @functools.partial(jax.jit, donate_argnums=2)
    def run(base: Tree, delta: Tree, pool: Pool, least: jax.Array) -> Pool:
        def going(pool: Pool) -> jax.Array:
            return pool.done.reshape(count, -1).sum(1).min() < least

        def step(pool: Pool) -> Pool:
            last = jnp.take_along_axis(pool.tokens, pool.count[:, None] - 1, 1)[:, 0]
            logits, cache = apply(base, delta, last, pool.cache, method="step")
            return choose(logits, pool._replace(cache=cache))

        return placed(jax.lax.while_loop(going, step, pool))

    return Decoder(empty, widen, fill, run)


def row_axis(x: Any) -> int | None:
    """The axis of the rows in an array of a `Pool`; None for what they share."""
    if x.ndim >= 4:
        return x.ndim - 4  # keys and values (..., r, k, s, d)
    return 0 if x.ndim else None


def generate(
    decoder: Decoder,
    base: Tree,
    delta: Tree,
    text: batches.Text,
    examples: Sequence[batches.Example],
    rows: int,
    devices: parallel.Devices,
    key: jax.Array | None = None,
) -> list[np.ndarray]:
    """Token ids decoded for each example, without the end token, in their order.

    `rows` are decoded at once, those of short prompts first. Longer ones than the last
    bucket take as many places of it as they are long, and are read one by one: the memory
    that attention takes to read a prompt grows with the square of its length.
    """
    out: dict[int, np.ndarray] = {}
    eos = text.tokenizer.eos_token_id
    buckets = sorted(text.data.buckets)
    lanes = parallel.lanes(devices)

    def work(
        lane: parallel.Lane, queue: collections.deque[int], places: int, group: int
    ) -> Iterator[bool]:
        """Decode rows of the queue, and give way where the devices are at work.

        places: rows that a device holds; group: rows that it takes at once.
        """
        own = lane.own((base, delta))
        held = np.full((lane.count, places), -1)  # numbers of examples
        pool = None
        while queue or (held >= 0).any():
            preemption.check()
            while queue and (held < 0).sum(1).min() >= group:
                size = min(len(queue), lane.count * group)
                chosen = [queue.popleft() for _ in range(size)]
                numbers = np.full((lane.count, group), -1, np.int32)
                numbers.flat[:size] = chosen
                free = np.argsort(held >= 0, 1, kind="stable")[:, :group]
                np.put_along_axis(held, free, numbers, 1)
                free = np.where(numbers < 0, places, free).astype(np.int32)
                batch = batches.prompts(
                    text, [examples[i] for i in chosen], numbers.size
                )
                width = batches.bucket(batch["inputs"].shape[1], buckets)
                batch = lane.put({**batch, "number": numbers.ravel()})
                if pool is None:
                    pool = decoder.empty(*own, batch, key, held.size)
                if width > pool.cache["mask"].shape[1]:
                    pool = decoder.widen(pool, width - pool.cache["mask"].shape[1])
                pool = decoder.fill(*own, pool, batch, lane.put(free.ravel()), key)
            pool = decoder.run(*own, pool, np.int32(group if queue else places))
            yield True
            done, tokens = lane.get((pool.done, pool.tokens))
            done = done.reshape(held.shape) & (held >= 0)
            for i, row in zip(held[done], tokens[done.ravel()], strict=True):
                out[i] = row[: np.append(np.flatnonzero(row == eos), len(row))[0]]
            held[done] = -1

    lengths = [len(e.inputs) for e in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    long = sum(n > buckets[-1] for n in lengths)
    fitting = rows * buckets[-1] // batches.bucket(max(lengths, default=1), buckets)
    many, few = (-(-max(count, 1) // devices.count) for count in (rows, fitting))
    for chosen, places, group in (
        (order[: len(order) - long], many, max(1, many // REFILL)),
        (order[len(order) - long :], few, 1),
    ):
        queue = collections.deque(chosen)
        working = [work(lane, queue, places, group) for lane in lanes]
        while working:
            working = [w for w in working if next(w, False)]
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
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].inputs))
    rows = -(-rows // devices.count) * devices.count
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = batches.prompts(text, [examples[i] for i in chosen], rows)
        found = parallel.by_rows(_mean, table, batch, devices)
        out[chosen] = found[: len(chosen)]
    return out


@jax.jit
def _mean(table: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    real = batch["mask"].astype(jnp.float32)
    found = jnp.take(table, batch["inputs"], axis=0).astype(jnp.float32)
    total = jnp.einsum("bti,bt->bi", found, real)
    return total / jnp.maximum(real.sum(-1, keepdims=True), 1)


def texts(tokenizer: Any, tokens: Sequence[np.ndarray]) -> list[str]:
    """Decoded text: padding removed, stripped (semantics.md 5.1)."""
    pad = tokenizer.pad_token_id
    kept = [[int(t) for t in row if t != pad] for row in tokens]
    return [text.strip() for text in tokenizer.batch_decode(kept)]
