"""Attention in tiles that no score leaves, for NVIDIA GPUs and TPUs (Pallas).

Source: Dao 2023, "FlashAttention-2" (arXiv 2307.08691), section 3. Letters as in `layers`.
A kernel runs for each row, head and block of queries (or of keys).
"""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

_dot = functools.partial(jax.lax.dot, preferred_element_type=jnp.float32)

# kept(words, place): whether dropout keeps a weight; words: uint32 of a key, place: its
# uint32 number among all (b, h, t, s).
Kept = Callable[[Sequence[jax.Array], jax.Array], jax.Array]


class Compiler(NamedTuple):
    """What Pallas compiles kernels by: Triton for GPUs, Mosaic for TPUs.

    widths: features that heads may have. block(n, other): of n queries (or keys) those of a
    tile, which all `other` keys (or queries) lie beside; 0 where there is none.
    scalars: where a kernel reads single numbers. params: of its compilation, by the width.
    """

    widths: Container[int]
    block: Callable[[int, int], int]
    scalars: Any
    params: Callable[[int], pl.CompilerParams]

    def fits(self, t: int, s: int, d: int) -> bool:
        """Whether there are tiles of t queries and s keys of d features."""
        return d in self.widths and self.block(t, s) > 0 and self.block(s, t) > 0


def _block_of_vmem(n: int, other: int) -> int:
    """All, or else some 128s, of which XLA's tiles are made; a strip of 2 MiB at most."""
    sizes = [n, 512, 384, 256, 128] if n <= 640 else [512, 384, 256, 128]
    fitting = [x for x in sizes if n % x == n % 64 == 0 and x * other <= 2**19]
    return max(fitting, default=0)


TRITON = Compiler(
    (16, 32, 64, 128),
    lambda n, other: 64 if n % 64 == 0 else 0,
    None,
    lambda width: triton.CompilerParams(
        num_warps=4 if width <= 64 else 8, num_stages=2
    ),
)
MOSAIC = Compiler(
    range(8, 257, 8),
    _block_of_vmem,
    tpu.SMEM,
    lambda width: tpu.CompilerParams(
        dimension_semantics=("parallel",) * 3, vmem_limit_bytes=2**25
    ),
)
COMPILERS = {"triton": TRITON, "mosaic": MOSAIC}  # by the name in a model's config


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def attend(
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    biases: Sequence[jax.Array],
    words: jax.Array | None,
    rate: float,
    kept: Kept,
    compiler: Compiler,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention (b, h, t, d) of scores with `biases`, to which no gradient goes.

    Each bias is (b or 1, h or 1, t or 1, s). With `words` weights are 0 but where they are
    `kept`, there over 1 - rate. interpret: as plain JAX, on any device.
    """
    arrays = q_bhtd, k_bksd, v_bksd, biases, words
    return _forward(*arrays, rate, kept, compiler, interpret)[0]


def _forward(q, k, v, biases, words, rate, kept, compiler, interpret):
    b, h, t, d = q.shape
    s = k.shape[2]
    blocks = block_t, block_s = compiler.block(t, s), compiler.block(s, t)
    how = rate, kept, compiler, interpret
    run = functools.partial(_run, biases, words, how, (b, h, t, s), blocks)

    def kernel(block, tile, q_ref, k_ref, v_ref, out_ref, total_ref):
        q = q_ref[...]

        def add(i, carry):
            out, most, total = carry
            keys = _places(i, block_s, s)
            scores, drop = tile(q, k_ref[keys, :], block, i)
            higher = jnp.maximum(most, scores.max(1, keepdims=True))
            weights = jnp.exp(scores - higher)
            fewer = jnp.exp(most - higher)
            total = total * fewer + weights.sum(1, keepdims=True)
            dropped = drop(weights).astype(v.dtype)
            return out * fewer + _dot(dropped, v_ref[keys, :]), higher, total

        zero = jnp.zeros((block_t, 1), jnp.float32)
        start = jnp.zeros((block_t, d), jnp.float32), zero - jnp.inf, zero
        out, most, total = jax.lax.fori_loop(0, s // block_s, add, start)
        out_ref[...] = (out / total).astype(out_ref.dtype)
        total_ref[...] = (most + jnp.log(total)).reshape(total_ref.shape)

    total = jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32)
    out, total = checkpoint_name(run(kernel, 2, [q], [k, v], [q, total]), "product")
    return out, (q, k, v, biases, words, out, total)


def _backward(rate, kept, compiler, interpret, residuals, grad):
    q, k, v, biases, words, out, total = residuals
    b, h, t, d = q.shape
    s = k.shape[2]
    blocks = block_t, block_s = compiler.block(t, s), compiler.block(s, t)
    how = rate, kept, compiler, interpret
    run = functools.partial(_run, biases, words, how, (b, h, t, s), blocks)
    mean = jnp.einsum("bhtd,bhtd->bht", grad, out, preferred_element_type=jnp.float32)
    of_queries = [q, grad, total, mean[:, :, None]]

    def shares(scores, drop, total, grad, v, mean):
        """The weights that were used, and the gradient of the scores."""
        total, mean = (x.reshape(-1, 1) for x in (total, mean))
        weights = jnp.exp(scores - total)
        on_scores = weights * (drop(_dot(grad, v.T)) - mean)
        return drop(weights).astype(v.dtype), on_scores.astype(v.dtype)

    def on_queries(
        block, tile, q_ref, grad_ref, total_ref, mean_ref, k_ref, v_ref, out_ref
    ):
        q, grad, total, mean = (x[...] for x in (q_ref, grad_ref, total_ref, mean_ref))

        def add(i, on_q):
            keys = _places(i, block_s, s)
            k = k_ref[keys, :]
            scored = tile(q, k, block, i)
            _, on_scores = shares(*scored, total, grad, v_ref[keys, :], mean)
            return on_q + _dot(on_scores, k)

        start = jnp.zeros((block_t, d), jnp.float32)
        made = jax.lax.fori_loop(0, s // block_s, add, start)
        out_ref[...] = made.astype(out_ref.dtype)

    def on_keys(
        block, tile, k_ref, v_ref, q_ref, grad_ref, total_ref, mean_ref, *out_refs
    ):
        k, v = k_ref[...], v_ref[...]

        def add(i, carry):
            on_k, on_v = carry
            rows = _places(i, block_t, t)
            q, grad = q_ref[rows, :], grad_ref[rows, :]
            total, mean = total_ref[:, rows], mean_ref[:, rows]
            scored = tile(q, k, i, block)
            used, on_scores = shares(*scored, total, grad, v, mean)
            return on_k + _dot(on_scores.T, q), on_v + _dot(used.T, grad)

        zero = jnp.zeros((block_s, d), jnp.float32)
        made = jax.lax.fori_loop(0, t // block_t, add, (zero, zero))
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


def _places(block, size, count):
    """Those of a block by its number, among `count`."""
    if size == count:
        return slice(None)
    return pl.ds(pl.multiple_of(block * size, size), size)


def _run(biases, words, how, sizes, blocks, kernel, axis, cut, whole, out):
    """What `kernel` makes, like `out`, for each row, head and block of queries or keys.

    kernel(block, tile, *refs): blocks of the arrays in `cut`, those in `whole`, blocks of
    the results. tile(q, k, query, key): scores of two blocks by their numbers, and the
    dropout of their weights; axis: the one of scores (b, h, t, s) that blocks are cut
    along. Arrays are (b, h, t or s, d), or (b, h, 1, t) with a number for each query.
    """
    rate, kept, compiler, interpret = how
    rows, heads, t, s = sizes
    size = blocks[axis - 2]

    def spec(x, axis):
        shape = [None, None, *x.shape[2:]]
        blocked = axis is not None and shape[axis] > 1
        if blocked:
            shape[axis] = size

        def place(row, head, block):
            # Not `//`, whose signs Mosaic refuses where no TPU is.
            own = jax.lax.div(head, jnp.int32(heads // x.shape[1]))
            at = [row if x.shape[0] > 1 else 0, own, 0, 0]
            if blocked:
                at[axis] = block
            return tuple(at)

        return pl.BlockSpec(shape, place)

    def of_cut(x):
        return spec(x, 2 if x.shape[2] > 1 else 3)

    arrays = [*cut, *whole, *biases]
    specs = [of_cut(x) for x in cut] + [spec(x, None) for x in whole]
    specs += [spec(x, axis) for x in biases]
    if words is not None:
        arrays.append(words)
        specs.append(pl.BlockSpec(memory_space=compiler.scalars))

    def body(*refs):
        at_row, at_head, at_block = map(pl.program_id, range(3))
        given = len(cut) + len(whole)
        bias_refs = refs[given : given + len(biases)]

        def tile(q, k, query, key):
            at = [_places(query, blocks[0], t), _places(key, blocks[1], s)]
            at[axis - 2] = slice(None)  # which the block is cut along
            scores = _dot(q, k.T)
            for ref in bias_refs:
                scores += ref[at[0] if ref.shape[0] > 1 else slice(None), at[1]]

            def drop(x):
                if words is None:
                    return x
                word = [refs[given + len(biases)][i] for i in range(3)]
                row, column = (
                    jax.lax.broadcasted_iota(jnp.uint32, blocks, i) for i in (0, 1)
                )
                row += ((at_row * heads + at_head) * t + query * blocks[0]).astype(
                    jnp.uint32
                )
                column += jnp.uint32(key * blocks[1])
                place = row * jnp.uint32(s) + column
                place += word[2] * jnp.uint32(heads * t * s)
                return jnp.where(kept(word, place), x / (1 - rate), 0)

            return scores, drop

        kernel(at_block, tile, *refs[:given], *refs[len(arrays) :])

    return pl.pallas_call(
        body,
        grid=(rows, heads, (t, s)[axis - 2] // size),
        in_specs=specs,
        out_specs=[of_cut(x) for x in out],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
        compiler_params=compiler.params(cut[0].shape[3]),
        interpret=interpret,
    )(*arrays)
