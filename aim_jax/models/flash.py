"""Attention in tiles that no score leaves, for NVIDIA GPUs (Pallas by Triton).

Source: Dao 2023, "FlashAttention-2" (arXiv 2307.08691), section 3. Letters as in `layers`.
A kernel runs for each row, head and block of queries (or of keys).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64  # queries and keys of a tile
WIDTHS = (16, 32, 64, 128)

# kept(words, place): whether dropout keeps a weight; words: uint32 of a key, place: its
# uint32 number among all (b, h, t, s).
Kept = Callable[[Sequence[jax.Array], jax.Array], jax.Array]


def fits(t: int, s: int, d: int) -> bool:
    """Whether there are tiles of t queries and s keys of d features."""
    return t % BLOCK == s % BLOCK == 0 and d in WIDTHS


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend(
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    biases: Sequence[jax.Array],
    words: jax.Array | None,
    rate: float,
    kept: Kept,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention (b, h, t, d) of scores with `biases`, to which no gradient goes.

    Each bias is (b or 1, h or 1, t or 1, s). With `words` weights are 0 but where they are
    `kept`, there over 1 - rate. interpret: as plain JAX, on any device.
    """
    return _forward(q_bhtd, k_bksd, v_bksd, biases, words, rate, kept, interpret)[0]


def _forward(q, k, v, biases, words, rate, kept, interpret):
    b, h, t, d = q.shape
    run = functools.partial(_run, biases, words, rate, kept, interpret, (b, h, t))

    def kernel(block, tile, q_ref, k_ref, v_ref, out_ref, total_ref):
        q = q_ref[...]

        def add(i, carry):
            out, most, total = carry
            keys = pl.ds(i * BLOCK, BLOCK)
            scores, drop = tile(q, k_ref[keys, :], block, i)
            higher = jnp.maximum(most, scores.max(1, keepdims=True))
            weights = jnp.exp(scores - higher)
            fewer = jnp.exp(most - higher)
            total = total * fewer + weights.sum(1, keepdims=True)
            dropped = drop(weights).astype(v.dtype)
            return out * fewer + triton.dot(dropped, v_ref[keys, :]), higher, total

        zero = jnp.zeros((BLOCK, 1), jnp.float32)
        start = jnp.zeros((BLOCK, d), jnp.float32), zero - jnp.inf, zero
        out, most, total = jax.lax.fori_loop(0, k.shape[2] // BLOCK, add, start)
        out_ref[...] = (out / total).astype(out_ref.dtype)
        total_ref[...] = most + jnp.log(total)

    total = jax.ShapeDtypeStruct((b, h, t, 1), jnp.float32)
    out, total = checkpoint_name(run(kernel, 2, [q], [k, v], [q, total]), "product")
    return out, (q, k, v, biases, words, out, total)


def _backward(rate, kept, interpret, residuals, grad):
    q, k, v, biases, words, out, total = residuals
    b, h, t, d = q.shape
    s = k.shape[2]
    run = functools.partial(_run, biases, words, rate, kept, interpret, (b, h, t))
    mean = jnp.einsum("bhtd,bhtd->bht", grad, out, preferred_element_type=jnp.float32)
    of_queries = [q, grad, total, mean[..., None]]

    def shares(scores, drop, total, grad, v, mean):
        """The weights that were used, and the gradient of the scores."""
        weights = jnp.exp(scores - total)
        on_scores = weights * (drop(triton.dot(grad, v.T)) - mean)
        return drop(weights).astype(v.dtype), on_scores.astype(v.dtype)

    def on_queries(
        block, tile, q_ref, grad_ref, total_ref, mean_ref, k_ref, v_ref, out_ref
    ):
        q, grad, total, mean = (x[...] for x in (q_ref, grad_ref, total_ref, mean_ref))

        def add(i, on_q):
            keys = pl.ds(i * BLOCK, BLOCK)
            k = k_ref[keys, :]
            scored = tile(q, k, block, i)
            _, on_scores = shares(*scored, total, grad, v_ref[keys, :], mean)
            return on_q + triton.dot(on_scores, k)

        start = jnp.zeros((BLOCK, d), jnp.float32)
        made = jax.lax.fori_loop(0, s // BLOCK, add, start)
        out_ref[...] = made.astype(out_ref.dtype)

    def on_keys(
        block, tile, k_ref, v_ref, q_ref, grad_ref, total_ref, mean_ref, *out_refs
    ):
        k, v = k_ref[...], v_ref[...]

        def add(i, carry):
            on_k, on_v = carry
            rows = pl.ds(i * BLOCK, BLOCK)
            q, grad, total, mean = (
                x[rows, :] for x in (q_ref, grad_ref, total_ref, mean_ref)
            )
            scored = tile(q, k, i, block)
            used, on_scores = shares(*scored, total, grad, v, mean)
            return on_k + triton.dot(on_scores.T, q), on_v + triton.dot(used.T, grad)

        zero = jnp.zeros((BLOCK, d), jnp.float32)
        made = jax.lax.fori_loop(0, t // BLOCK, add, (zero, zero))
        for ref, x in zip(out_refs, made, strict=True):
            ref[...] = x

    (on_q,) = run(on_queries, 2, of_queries, [k, v], [q])
    # Of each query head; those that share keys and values are added.
    apart = jax.ShapeDtypeStruct((b, h, s, d), jnp.float32)
    on_k, on_v = (
        x.reshape(b, k.shape[1], -1, s, d).sum(2).astype(k.dtype)
        for x in run(on_keys, 3, [k, v], of_queries, [apart, apart])
    )
    return on_q, on_k, on_v, None, None


attend.defvjp(_forward, _backward)


def _run(biases, words, rate, kept, interpret, sizes, kernel, axis, cut, whole, out):
    """What `kernel` makes, like `out`, for each row, head and block of axis 2.

    kernel(block, tile, *refs): blocks of the arrays in `cut`, those in `whole`, blocks of
    the results. tile(q, k, query, key): scores of two blocks by their numbers, and the
    dropout of their weights; axis: the one of scores that blocks are cut along.
    """
    rows, heads, queries = sizes

    def spec(x, axis):
        shape = [None, None, *x.shape[2:]]
        blocked = axis is not None and shape[axis] > 1
        if blocked:
            shape[axis] = BLOCK

        def place(row, head, block):
            at = [row * x.shape[0] // rows, head * x.shape[1] // heads, 0, 0]
            if blocked:
                at[axis] = block
            return tuple(at)

        return pl.BlockSpec(shape, place)

    arrays = [*cut, *whole, *biases]
    specs = [spec(x, 2) for x in cut] + [spec(x, None) for x in whole]
    specs += [spec(x, axis) for x in biases]
    if words is not None:
        arrays.append(words)
        specs.append(pl.BlockSpec(words.shape, lambda row, head, block: (0,)))
    keys = biases[0].shape[3]

    def body(*refs):
        at_row, at_head, at_block = map(pl.program_id, range(3))
        given = len(cut) + len(whole)
        bias_refs = refs[given : given + len(biases)]

        def tile(q, k, query, key):
            at = [pl.ds(query * BLOCK, BLOCK), pl.ds(key * BLOCK, BLOCK)]
            at[axis - 2] = slice(None)  # which the block is cut along
            scores = triton.dot(q, k.T)
            for ref in bias_refs:
                scores += ref[at[0] if ref.shape[0] > 1 else slice(None), at[1]]

            def drop(x):
                if words is None:
                    return x
                word = [refs[given + len(biases)][i] for i in range(3)]
                row = (at_row * heads + at_head) * queries
                row = row + query * BLOCK + jnp.arange(BLOCK)
                column = key * BLOCK + jnp.arange(BLOCK)
                place = row.astype(jnp.uint32)[:, None] * jnp.uint32(keys)
                place = place + column.astype(jnp.uint32)[None]
                place = place + word[2] * jnp.uint32(heads * queries * keys)
                return jnp.where(kept(word, place), x / (1 - rate), 0)

            return scores, drop

        kernel(at_block, tile, *refs[:given], *refs[len(arrays) :])

    return pl.pallas_call(
        body,
        grid=(rows, heads, out[0].shape[2] // BLOCK),
        in_specs=specs,
        out_specs=[spec(x, 2) for x in out],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
        compiler_params=triton.CompilerParams(
            num_warps=4 if cut[0].shape[3] <= 64 else 8, num_stages=2
        ),
        interpret=interpret,
    )(*arrays)
