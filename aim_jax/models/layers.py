"""Layers that every family shares; a Dense layer takes its low-rank delta as data.

Einsum letters and shape suffixes: b batch, t query position, s key position, h query
head, k key/value head, g query heads per key/value head, d head width, i input features,
o output features, r rank, v vocabulary. Weights keep the [out, in] layout of Hugging Face.
Dropout is active exactly when a `dropout` random key is passed to `apply`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from aim_jax.models import flash

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}

FEW, WIDE = 128, 512  # at most so many rows, of at least so many features, are turned
GROUP = 64  # inputs of a quantized weight that share a scale

REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
}

# Finite, so that a row without any visible position stays free of NaN.
MASKED = -1e9
KeyValues = tuple[jax.Array, jax.Array]
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Dense(nn.Module):
    """x W^T + bias, plus (x A^T) B^T where the `lora` collection holds A (r, i), B (o, r).

    W (o, i) may be `quantize`d; then `scale` lies beside `weight`.
    B comes already multiplied by the scale (`lora.bind`). An entry `rate` beside them is
    the dropout rate of the input of A (PEFT's lora_dropout); entries `real`, `on_a` and
    `on_b` are what `measure` takes, of which `real` may cover earlier positions too.
    """

    features: int
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", "scale"):
            stored = (self.get_variable("params", name) for name in ("weight", "scale"))
            weight = dequantize(*stored, self.dtype)
        else:
            shape = self.features, x.shape[-1]
            weight = self.param("weight", nn.initializers.normal(0.02), shape)
        y = project(x.astype(self.dtype), weight.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name) for name in "ab")
            x = x.astype(a.dtype)
            if self.has_variable("lora", "rate") and self.has_rng("dropout"):
                x = drop(x, self.get_variable("lora", "rate"), self.make_rng("dropout"))
            x = checkpoint_name(jnp.einsum("...i,ri->...r", x, a), "product")
            y = y + jnp.einsum("...r,or->...o", x, b).astype(y.dtype)
            if self.has_variable("lora", "real"):
                names = ("real", "on_a", "on_b")
                real, on_a, on_b = (self.get_variable("lora", n) for n in names)
                y = measure(y, x, real[:, -y.shape[1] :], on_a, on_b)
        return checkpoint_name(y, "product")


def project(
    x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x W^T (..., o) of x (..., i) and W (o, i), in `dtype` or that of x.

    On a CPU few wide rows meet the weight from the right, W x^T, which is up to twice as
    fast there; barriers, of the gradient too, keep XLA from turning that around again.
    """

    def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)

    def turned(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y = jnp.einsum("oi,ri->or", weight, rows, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)

    if math.prod(x.shape[:-1]) > FEW or x.shape[-1] < WIDE:
        return plain(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=turned, default=plain)


def quantize(weight: jax.Array, bits: int) -> dict[str, jax.Array]:
    """`weight` (..., o, i) as integers of 4 or 8 bits, and float32 `scale` (..., o, i / 64).

    Symmetric: 64 inputs of a row (all, if 64 does not divide them) share the scale that
    makes the largest of them the largest integer. Integers of 4 bits lie two in a byte:
    rows 2 k and 2 k + 1 are the low and the high half of row k of (..., o / 2, i), uint8.
    Odd numbers of rows take a byte for each.
    """
    *outer, inputs = weight.shape
    width = GROUP if inputs % GROUP == 0 else inputs
    grouped = weight.astype(jnp.float32).reshape(*outer, -1, width)
    greatest = 2 ** (bits - 1) - 1
    scale = jnp.abs(grouped).max(-1) / greatest
    whole = jnp.round(grouped / jnp.where(scale == 0, 1, scale)[..., None])
    whole = whole.reshape(weight.shape).astype(jnp.int8)
    if bits == 4 and outer[-1] % 2 == 0:
        low, high = (whole[..., row::2, :].astype(jnp.uint8) for row in (0, 1))
        whole = (low & 15) | (high << 4)
    return {"weight": whole, "scale": scale}


def dequantize(weight: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The weight (..., o, i) in `dtype` that `quantize` made of one."""
    if weight.dtype == jnp.uint8:
        # Shifted as signed numbers, so that the sign fills what comes in.
        halves = (
            jax.lax.bitcast_convert_type(w, jnp.int8) for w in (weight << 4, weight)
        )
        weight = jnp.stack([half >> 4 for half in halves], -2)
        weight = weight.reshape(*scale.shape[:-1], -1)
    grouped = weight.astype(dtype).reshape(*scale.shape, -1)
    return (grouped * scale.astype(dtype)[..., None]).reshape(weight.shape)


@jax.custom_vjp
def measure(
    y: jax.Array, x: jax.Array, real: jax.Array, on_a: jax.Array, on_b: jax.Array
) -> jax.Array:
    """y; the "gradients" of on_a and on_b are the sums over tokens of |x| and of |y|.

    y (b, t, o) the output of a layer, x (b, t, r) that of its A, real (b, t) 0 at padding.
    So they add up over micro-batches and devices as gradients do.
    """
    return y


def _measure_forward(y, x, real, on_a, on_b):
    return y, (y, x, real)


def _measure_backward(kept, grad):
    y, x, real = kept
    on_a, on_b = (jnp.einsum("btu,bt->u", jnp.abs(z), real) for z in (x, y))
    return grad, None, None, on_a, on_b


measure.defvjp(_measure_forward, _measure_backward)


class Dropout(nn.Module):
    """Inverted dropout at `rate`, where a `dropout` random key is passed."""

    rate: float

    def __call__(self, x: jax.Array) -> jax.Array:
        key = self.key()
        return x if key is None else drop(x, self.rate, key)

    def key(self) -> jax.Array | None:
        """The random key to `drop` with; None where nothing is dropped."""
        active = self.rate and self.has_rng("dropout")
        return self.make_rng("dropout") if active else None


def drop(x: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    """x with each element zeroed with probability `rate`, the others over 1 - rate."""
    keep = 1 - rate
    return jnp.where(_below(keep, jax.random.bits(key, x.shape)), x / keep, 0)


def _below(chance: float | jax.Array, bits: jax.Array) -> jax.Array:
    # As a fraction of 24 bits, which float32 holds exactly.
    return (bits >> 8) * np.float32(2**-24) < chance


def kept(rate: float, words: Sequence[jax.Array], place: jax.Array) -> jax.Array:
    """Whether `drop` keeps the element at `place` by the words of a `HASH` key."""
    return _below(1 - rate, _hash(words, place))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of x flips half of the result's.

    Source: Wellons, "Prospecting for Hash Functions", 2018 (lowbias32).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _seed(seed: jax.Array) -> jax.Array:
    start = jnp.array([0x9E3779B9, 0x85EBCA6B, 0], jnp.uint32)  # _mix leaves 0 as it is
    return _fold(start, seed.astype(jnp.uint32))


def _fold(key: jax.Array, number: jax.Array) -> jax.Array:
    first, second, row = key
    first = _mix(_mix(first ^ number) + second)
    return jnp.stack([first, _mix(_mix(second ^ number) + first), row])


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    numbers = jnp.arange(math.prod(shape), dtype=jnp.uint32)
    return jax.vmap(_fold, (None, 0))(key, numbers).reshape(*shape, 3)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    assert width == 32
    sizes = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = key[2] * np.uint32(math.prod(shape[1:]))
    place = first + sum(
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(size)
        for axis, size in enumerate(sizes)
    )
    return _hash(key, place)


def _hash(words: Sequence[jax.Array], place: jax.Array) -> jax.Array:
    return _mix(_mix(place ^ words[0]) + words[1])


# Keys for dropout. A new key hashes an old one and a number, an element's bits hash its place
# and the key: a quarter of the time of threefry and a tenth of its compilation, and each
# device makes the bits of its own places. A key ends in the number of the first row here, so
# that these are the bits of all rows in one array, whichever way devices share them.
HASH = jax.extend.random.define_prng_impl(
    key_shape=(3,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold,
    name="hash",
)


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, in float32; `offset` 1 for weights stored as w - 1."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.initializers.constant(1.0 - self.offset)
        weight = self.param("weight", ones, (x.shape[-1],)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (x32 * (weight + self.offset)).astype(x.dtype)


class Embed(nn.Module):
    """Token embeddings (v, i); `attend` gives float32 logits against the same table."""

    vocab: int
    features: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.weight = self.param(
            "weight", nn.initializers.normal(1.0), (self.vocab, self.features)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return by_rows(jnp.take(self.weight, tokens, axis=0).astype(self.dtype))

    def attend(self, x: jax.Array) -> jax.Array:
        return logits(x, self.weight)


@jax.custom_vjp
def logits(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Float32 logits (..., v) of x (..., i) against a table (v, i) in x's precision.

    So is their gradient, which would otherwise turn the whole table to float32.
    """
    return project(x, weight.astype(x.dtype), jnp.float32)


def _logits_forward(x, weight):
    frozen = None if weight.perturbed else ()
    return logits(x.value, weight.value), (x.value, weight.value, frozen)


def _logits_backward(kept, grad):
    x, weight, frozen = kept
    grad = grad.astype(x.dtype)
    turn = jax.linear_transpose(lambda x: project(x, weight.astype(x.dtype)), x)
    (on_x,) = turn(grad)
    if frozen is not None:
        return on_x, None
    return on_x, _product("...v,...i->vi", grad, x).astype(weight.dtype)


logits.defvjp(_logits_forward, _logits_backward, symbolic_zeros=True)


def by_rows(x: jax.Array) -> jax.Array:
    """x (b, ...) split by rows over the axis `data` of the mesh that a step runs on.

    Said of activations, so that a product gathers the split weights (FSDP) and not the
    rows. Without a mesh (as in decoding, where rows are fewer than weights), and for rows
    that it does not divide, nothing is said.
    """
    if not _row_parts(x):
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P("data", *free))


def _row_parts(x: jax.Array) -> int:
    """How many parts the mesh that a step runs on splits the rows of x into, if it does."""
    mesh = jax.sharding.get_abstract_mesh()
    count = mesh.shape["data"] if "data" in mesh.auto_axes else 0
    return count if count and x.shape[0] % count == 0 else 0


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """(b, t, h*d) as (b, h, t, d)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def merge_heads(x: jax.Array) -> jax.Array:
    """(b, h, t, d) as (b, t, h*d)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    biases: Sequence[jax.Array],
    rate: float = 0.0,
    key: jax.Array | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """Softmax attention (b, h, t, d); softmax in float32, nothing (t, s) kept for backward.

    biases: float32 that broadcast to (b, h, t, s), added; MASKED at invisible positions.
    With a `key` the weights are dropped at `rate`. Where key/value heads are fewer, the
    queries of a group lie one after another as if they were more positions; then their sum
    is (b, 1, t, s).

    kernel: one of `flash.COMPILERS` and `cudnn` are one call for prompts. That of cudnn has
    no dropout, a bias of 0 or MASKED alone, and as many keys as queries are taken to hide
    those after each.
    """
    b, h, t, d = q_bhtd.shape
    k, s = k_bksd.shape[1:3]
    q_bhtd, k_bksd, v_bksd = checkpoint_name((q_bhtd, k_bksd, v_bksd), "product")
    compiler = flash.COMPILERS.get(kernel)
    if compiler and compiler.fits(t, s, d):
        return _in_tiles(q_bhtd, k_bksd, v_bksd, biases, rate, key, compiler)
    bias = sum(biases[1:], biases[0])
    if kernel == "cudnn" and t > 1:
        out = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q_bhtd, k_bksd, v_bksd)),
            mask=bias > MASKED,
            scale=1.0,
            is_causal=t == s,
            implementation=kernel,
        )
        return out.swapaxes(1, 2)
    if h == k:
        return _attend(q_bhtd, k_bksd, v_bksd, bias, rate, key)

    def grouped(q: jax.Array, k_bksd: jax.Array, v_bksd: jax.Array) -> jax.Array:
        tiled = jnp.tile(bias, (1, 1, h // k, 1))
        out = _attend(q.reshape(b, k, -1, d), k_bksd, v_bksd, tiled, rate, key)
        return out.reshape(b, h, t, d)

    def repeated(q: jax.Array, *kv_bksd: jax.Array) -> jax.Array:
        kv_bhsd = (jnp.repeat(x, h // k, 1) for x in kv_bksd)
        return _attend(q, *kv_bhsd, bias, rate, key)

    if t > 1 or h > 4 * k:
        return grouped(q_bhtd, k_bksd, v_bksd)
    # XLA multiplies and sums for a single query, which reads a layer's part of a cache where
    # it lies and repeats it on the way; for the product of a group a GPU copies it first.
    return jax.lax.platform_dependent(
        q_bhtd, k_bksd, v_bksd, cuda=repeated, default=grouped
    )


def _in_tiles(
    q_bhtd: jax.Array,
    k_bksd: jax.Array,
    v_bksd: jax.Array,
    biases: Sequence[jax.Array],
    rate: float,
    key: jax.Array | None,
    compiler: flash.Compiler,
) -> jax.Array:
    """`flash.attend`, on a mesh by each device for its own rows, or for all."""
    parts = _row_parts(q_bhtd)

    def own(q, k, v, biases, words):
        if parts > 1 and words is not None:
            before = jax.lax.axis_index("data") * len(q)
            words = words.at[2].add(before.astype(jnp.uint32))
        keep = functools.partial(kept, rate)
        return flash.attend(q, k, v, biases, words, rate, keep, compiler)

    words = None if key is None else jax.random.key_data(key)
    arrays = q_bhtd, k_bksd, v_bksd, list(biases), words
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes or mesh.size == 1:
        return own(*arrays)
    rows = P("data") if parts else P()
    of_biases = [P() if len(bias) == 1 else rows for bias in biases]
    split = jax.shard_map(
        own,
        in_specs=(rows, rows, rows, of_biases, P()),
        out_specs=rows,
        check_vma=False,  # a Pallas call does not say along which axes results vary
    )
    return split(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, bias, rate, key):
    return _attend_forward(q, k, v, bias, rate, key)[0]


def _attend_forward(q, k, v, bias, rate, key):
    scores = _product("bktd,bksd->bkts", q, k) + bias
    most = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    if key is not None:
        weights = drop(weights, rate, key)
    out = _product("bkts,bksd->bktd", weights.astype(v.dtype), v) / total
    out = out.astype(v.dtype)
    out, total = checkpoint_name((out, most + jnp.log(total)), "product")
    return out, (q, k, v, bias, key, out, total)


def _attend_backward(rate, kept, grad):
    """From the logarithmic sums of each query's weights (Dao et al. 2022, section 3.1)."""
    q, k, v, bias, key, out, total = kept
    weights = jnp.exp(_product("bktd,bksd->bkts", q, k) + bias - total)
    on_weights = _product("bktd,bksd->bkts", grad, v)
    dropped = weights
    if key is not None:
        dropped, on_weights = (drop(x, rate, key) for x in (weights, on_weights))
    mean = _product("bktd,bktd->bkt", grad, out)[..., None]
    on_scores = weights * (on_weights - mean)
    spread = [i for i, n in enumerate(bias.shape) if n != on_scores.shape[i]]
    on_bias = on_scores.sum(spread, keepdims=True)
    on_scores = on_scores.astype(k.dtype)
    on_q = _product("bkts,bksd->bktd", on_scores, k).astype(q.dtype)
    # A product that ends in keys leaves the large operand as it lies; the barrier keeps
    # XLA from turning that around again, which on a CPU costs a copy of it.
    turned = [
        jax.lax.optimization_barrier(_product("bktd,bkts->bkds", x, y))
        for x, y in ((q, on_scores), (grad, dropped.astype(grad.dtype)))
    ]
    on_k, on_v = (x.swapaxes(2, 3).astype(k.dtype) for x in turned)
    return on_q, on_k, on_v, on_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


def mask_bias(visible: jax.Array) -> jax.Array:
    """Float32 bias: 0 where `visible` (bool), MASKED elsewhere."""
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)


def same(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Where a query (b, t) and a key (b, s) are of one segment, (b, 1, t, s)."""
    return (queries[:, :, None] == keys[:, None])[:, None]


def age(
    index: jax.Array, length: int, written: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many tokens ago each place of a ring of `length` was written, and who sees it.

    index: the place that is being written; written (b,): tokens that each row wrote before
    this one. Returns int32 (length,) and bool (b, length).
    """
    ago = (index - jnp.arange(length)) % length
    return ago, ago <= written[:, None]


def widen(x: jax.Array, before: int, axis: int, after: int = 0) -> jax.Array:
    """x with zeros (or False) before and after it on an axis."""
    room = [(0, 0)] * x.ndim
    room[axis] = (before, after)
    return jnp.pad(x, room)


def put(cache: KeyValues, new: KeyValues, place: jax.Array | int) -> KeyValues:
    """Keys and values (..., s, d) with `new` ones (..., t, d) from `place` on."""

    def write(old: jax.Array, kv: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, kv, place, old.ndim - 2)

    return jax.tree.map(write, cache, new)


def stack(
    layer: type[nn.Module], count: int, shared: int, remat: str
) -> type[nn.Module]:
    """`layer` repeated `count` times by a scan: weights stacked on axis 0.

    The layer maps (x, cache slice, *shared arguments) to (x, what goes out of each).
    remat: what backward computes anew: `none`; `full`, the layer; `dots`, what lies between
    products with weights and attention, whose results are kept.
    """
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast,) * shared),
        length=count,
    )
