"""Fusion and merges against their formulas in NumPy, on whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aim_jax
from aim_jax import fusion

LAYERS, OUT, WIDTH, RANK = 2, 11, 7, 3
WEIGHTS = (1.0, 0.5, 2.0)
FACTOR, PRODUCT = fusion.SPACES


def adapter(seed: int, rank: int = RANK, out: int = OUT, width: int = WIDTH):
    """A tree of one stacked module and one alone, without zeros."""
    rng = np.random.default_rng(seed)

    def module(*layers: int):
        shapes = {"a": (*layers, rank, width), "b": (*layers, out, rank)}
        return {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}

    return {"layers": {"q": module(LAYERS)}, "last": {"v": module()}}


def matrices(trees, space: str):
    """Every matrix that is merged by itself, float64 (n, rows, columns), and its name."""
    found = {}
    for path, index in (
        (("layers", "q"), 0),
        (("layers", "q"), 1),
        (("last", "v"), ...),
    ):
        nodes = [tree[path[0]][path[1]] for tree in trees]
        a, b = ([np.float64(n[side][index]) for n in nodes] for side in "ab")
        if space == PRODUCT:
            products = [y @ x for x, y in zip(a, b, strict=True)]
            found[*path, index] = np.stack(products)
        else:
            found[*path, index, "a"] = np.stack(a)
            found[*path, index, "b"] = np.stack(b)
    return found


def linear(x, w):
    return np.tensordot(w, x, 1) / sum(w)


def task_arithmetic(x, w, scale=0.3):
    return scale * np.tensordot(w, x, 1)


def trimmed(x, density):
    out = np.zeros_like(x)
    for one, kept in zip(x, out, strict=True):
        chosen = np.argsort(-np.abs(one), axis=None)[: int(density * one.size)]
        kept.flat[chosen] = one.flat[chosen]
    return out


def elected(x, w):
    """Sums over the agreeing entries, one entry at a time."""
    merged = np.zeros(x.shape[1:])
    for place in np.ndindex(*merged.shape):
        values = x[(slice(None), *place)]
        sign = 1 if values.sum() >= 0 else -1
        agreeing = [(v, u) for v, u in zip(values, w, strict=True) if v * sign > 0]
        if agreeing:
            merged[place] = sum(v * u for v, u in agreeing) / sum(
                u for _, u in agreeing
            )
    return merged


def ties(x, w, density=0.4):
    return elected(trimmed(x, density), w)


def magmax(x, w):
    merged = np.zeros(x.shape[1:])
    for place in np.ndindex(*merged.shape):
        merged[place] = max(
            (v * u for v, u in zip(x[(slice(None), *place)], w, strict=True)), key=abs
        )
    return merged


RULES = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "magmax": magmax,
}


def best(matrix, rank=RANK):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def close(merged, expected, space: str, tolerance=2e-5):
    """Whether every matrix of a merged tree is as expected."""
    found = matrices([merged], space)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name][0], value, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.6, 0.4), (0.4, 0.6)])
def test_fuse_is_the_weighted_average_of_both_deltas(weights):
    rng = np.random.default_rng(0)
    trees = [
        {"q": {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}} for _ in "oir"
    ]
    origin, inner, outer = (
        {"q": {k: jnp.float32(v) for k, v in t["q"].items()}} for t in trees
    )
    fused, motion = fusion.fuse(origin, inner, outer, *weights)
    for name in "ab":
        o, i, r = (t["q"][name] for t in trees)
        expected = o + weights[0] * (i - o) + weights[1] * (r - i)
        np.testing.assert_allclose(fused["q"][name], expected, rtol=1e-5, atol=1e-6)
    moved = sum(np.abs(trees[1]["q"][k] - trees[0]["q"][k]).sum() for k in "ab")
    assert float(motion) == pytest.approx(moved, rel=1e-5)


def test_fuse_with_weights_one_and_no_rehearsal_keeps_the_adapter():
    origin, inner = {"a": jnp.arange(3.0)}, {"a": jnp.float32([5, -1, 2])}
    fused, _ = fusion.fuse(origin, inner, inner, 1.0, 1.0)
    np.testing.assert_array_equal(fused["a"], inner["a"])


@pytest.mark.parametrize("space", fusion.SPACES)
@pytest.mark.parametrize("name", RULES)
def test_rules(name, space):
    """Each matrix is merged as the formula says; products are cut to their best rank."""
    trees = [adapter(seed) for seed in range(3)]
    rule = fusion.Rule(name, space, density=0.4)
    merged = fusion.merge(trees, rule, WEIGHTS)
    expected = {k: RULES[name](x, WEIGHTS) for k, x in matrices(trees, space).items()}
    if space == PRODUCT:
        expected = {k: best(x) for k, x in expected.items()}
    close(merged, expected, space)


@pytest.mark.parametrize("space", fusion.SPACES)
@pytest.mark.parametrize("name", fusion.RULES)
def test_one_adapter_of_weight_one_is_itself(name, space):
    """Bitwise in factor space; in product space the same product within rounding."""
    tree = adapter(0)
    merged = fusion.merge([tree], fusion.Rule(name, space), fishers=[adapter(1)])
    if space == FACTOR:
        jax.tree.map(np.testing.assert_array_equal, merged, tree)
    close(merged, {k: x[0] for k, x in matrices([tree], space).items()}, space)


@pytest.mark.parametrize("name", fusion.SIGNED)
def test_one_adapter_of_another_weight(name):
    tree = adapter(0)
    merged = fusion.merge([tree], fusion.Rule(name), [-2.0])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, -2 * y), merged, tree)


def test_factor_space_has_cross_terms():
    """(B1 + B2)(A1 + A2) is not B1 A1 + B2 A2: the rest is B1 A2 + B2 A1."""
    trees = [adapter(seed) for seed in range(2)]
    rule = fusion.Rule("task_arithmetic", FACTOR, scale=1.0)
    summed = matrices([fusion.merge(trees, rule)], PRODUCT)
    products = matrices(trees, PRODUCT)
    crossed = matrices(
        [
            {
                k: {
                    m: {"a": x["a"], "b": trees[not i][k][m]["b"]} for m, x in v.items()
                }
                for k, v in tree.items()
            }
            for i, tree in enumerate(trees)
        ],
        PRODUCT,
    )
    for name, (first, second) in products.items():
        rest = summed[name][0] - (first + second)
        np.testing.assert_allclose(rest, crossed[name].sum(0), atol=2e-5)
        assert np.linalg.norm(rest) > 0.5 * np.linalg.norm(first + second)
    # Rank 6 holds the sum of two products of rank 3 whole.
    rule = fusion.Rule("task_arithmetic", PRODUCT, scale=1.0)
    merged = fusion.merge(trees, rule, rank=2 * RANK)
    close(merged, {k: x.sum(0) for k, x in products.items()}, PRODUCT)


def test_opposite_factors_cancel_only_in_factor_space():
    """-A and -B give the same product as A and B; their average as factors is nothing."""
    tree = adapter(0)
    trees = [tree, jax.tree.map(jnp.negative, tree)]
    merged = fusion.merge(trees, fusion.Rule("linear", FACTOR))
    assert not any(x.any() for x in jax.tree.leaves(merged))
    merged = fusion.merge(trees, fusion.Rule("linear", PRODUCT))
    close(merged, {k: x[0] for k, x in matrices([tree], PRODUCT).items()}, PRODUCT)


def test_products_of_other_ranks():
    """Ranks may differ in product space; the result has the largest, or the one asked."""
    trees = [adapter(0, 2), adapter(1, 4)]
    for name in ("linear", "ties"):
        merged = fusion.merge(trees, fusion.Rule(name, PRODUCT, density=0.4))
        expected = {
            k: best(RULES[name](x, (1, 1)), 4)
            for k, x in matrices(trees, PRODUCT).items()
        }
        close(merged, expected, PRODUCT)
        assert fusion.merge(trees, fusion.Rule(name, PRODUCT), rank=9)["last"]["v"][
            "a"
        ].shape == (9, WIDTH)


@pytest.mark.parametrize("name", ["ties", "magmax", "fisher"])
def test_products_in_blocks(name):
    """More rows than a block, a last block that is not full, a spectrum that falls slowly.

    What is found is as near to the merged matrix as its best approximation is, to 0.1 %.
    """
    out, width, rank = 2 * fusion.ROWS + 37, 90, 8
    rng = np.random.default_rng(0)
    trees = [
        {
            "q": {
                "a": jnp.float32(rng.normal(size=(rank, width))),
                "b": jnp.float32(rng.normal(size=(out, rank))),
            }
        }
        for _ in range(3)
    ]
    x = np.stack([np.float64(t["q"]["b"]) @ np.float64(t["q"]["a"]) for t in trees])
    if name == "ties":
        kept = trimmed(x, 0.2)
        sign = np.where(kept.sum(0) >= 0, 1, -1)
        agree = np.sign(kept) == sign
        whole = (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)
    elif name == "magmax":
        whole = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    else:
        sides = [[np.float64(t["q"][s]) for s in "ba"] for t in trees]
        # Every F is the square of the other adapters' entry.
        others = [sides[2], *sides[:2]]
        share = [
            1 / (b**2 @ (1 / (f**2 + 1e-6)) + (1 / (g**2 + 1e-6)) @ a**2)
            for (b, a), (g, f) in zip(sides, others, strict=True)
        ]
        whole = sum(s * y for s, y in zip(share, x, strict=True)) / sum(share)
    fishers = [jax.tree.map(jnp.square, t) for t in (trees[2], *trees[:2])]
    merged = fusion.merge(trees, fusion.Rule(name, PRODUCT), fishers=fishers)["q"]
    found = np.float64(merged["b"]) @ np.float64(merged["a"])
    least = np.linalg.norm(whole - best(whole, rank))
    assert least > 0.1 * np.linalg.norm(whole)
    assert np.linalg.norm(whole - found) < 1.001 * least


@pytest.mark.parametrize("name", ["linear", "ties"])
def test_a_product_is_never_formed(name):
    """All the memory that a merge of three takes is less than half of one product."""
    size, rank = 8192, 16
    module = {
        "a": jax.ShapeDtypeStruct((rank, size), jnp.float32),
        "b": jax.ShapeDtypeStruct((size, rank), jnp.float32),
    }
    weights = jax.ShapeDtypeStruct((3,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rule = fusion.Rule(name, PRODUCT)
    lowered = fusion._in_product.lower((module,) * 3, (), weights, key, rule, None)
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    assert 0 < used < 0.5 * 4 * size**2


@pytest.mark.parametrize("space", fusion.SPACES)
@pytest.mark.parametrize("into", ["linear", "ties"])
def test_dare(space, into):
    """Entries are kept at the density and divided by it; the seed decides which."""
    size = 40
    trees = [adapter(s, size, size, size) for s in range(2)]
    # One layer, whose product has all its singular values, so that nothing is cut.
    trees = [{"last": t["last"]} for t in trees]
    if space == PRODUCT:
        for t in trees:
            t["last"]["v"]["a"] = jnp.eye(size)

    def merge(seed, density=0.25, weights=(1.0, 3.0)):
        rule = fusion.Rule("dare", space, density=density, drop_into=into, seed=seed)
        tree = fusion.merge(trees, rule, weights)["last"]["v"]
        return np.asarray(tree["b"] @ tree["a"] if space == PRODUCT else tree["b"])

    first, second = (np.asarray(t["last"]["v"]["b"]) for t in trees)
    x, y = first / 0.25, second / 0.25
    if into == "linear":
        cases = [0 * x, x / 4, 3 * y / 4, (x + 3 * y) / 4]
    else:
        sign = np.where(x + y >= 0, 1, -1)
        both = np.where(x * y > 0, (x + 3 * y) / 4, np.where(x * sign > 0, x, y))
        cases = [0 * x, x, y, both]
    found = merge(0)
    errors = np.abs(np.stack(cases) - found)
    assert errors.min(0).max() < 2e-4
    shares = np.bincount(errors.argmin(0).ravel(), minlength=4) / found.size
    # Neither, one, the other, both; 1600 draws of each.
    np.testing.assert_allclose(shares, [9 / 16, 3 / 16, 3 / 16, 1 / 16], atol=0.04)
    np.testing.assert_array_equal(found, merge(0))
    assert (np.abs(found - merge(1)) > 1e-3).mean() > 0.2
    whole = merge(0, density=1.0)
    expected = linear(np.stack([first, second]), (1, 3))
    if into == "linear":
        np.testing.assert_allclose(whole, expected, atol=2e-4)


@pytest.mark.parametrize("space", fusion.SPACES)
def test_dare_draws_anew_for_every_matrix(space):
    """For A and for B, for each module, and for each block of a product."""
    size = 2 * fusion.ROWS
    a = jnp.ones((size, size)) if space == FACTOR else jnp.eye(size)
    module = {"a": a, "b": jnp.ones((size, size))}
    tree = {"q": module, "v": module}
    merged = fusion.merge([tree] * 2, fusion.Rule("dare", space, density=0.5))
    if space == FACTOR:
        drawn = [x[side] for x in merged.values() for side in "ab"]
    else:
        drawn = [x["b"] @ x["a"] for x in merged.values()]
    parts = [half > 0.5 for x in drawn for half in np.split(np.asarray(x), 2)]
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert (one != other).mean() > 0.3


@pytest.mark.parametrize("space", fusion.SPACES)
def test_fisher(space):
    """Means weighted by precision; a product's follows from its factors' to first order."""
    trees = [adapter(seed) for seed in range(3)]
    fishers = [jax.tree.map(lambda x: 1e-4 * x**2, adapter(s)) for s in (7, 8, 9)]
    rule = fusion.Rule("fisher", space, fisher_floor=1e-5)
    merged = fusion.merge(trees, rule, WEIGHTS, fishers)
    expected = {}
    if space == FACTOR:
        precision = matrices(fishers, space)
        precision = {k: f + 1e-5 for k, f in precision.items()}
    else:
        sides, floors = matrices(trees, FACTOR), matrices(fishers, FACTOR)
        precision = {}
        for name in matrices(trees, PRODUCT):
            a, b, fa, fb = (
                x[*name, side] for x in (sides, floors) for side in ("a", "b")
            )
            # Var(sum_r b_r a_r) of independent a and b, to first order, entry by entry.
            variance = np.zeros((3, b.shape[1], a.shape[2]))
            for r in range(RANK):
                variance += b[:, :, [r]] ** 2 / (fa[:, [r]] + 1e-5)
                variance += a[:, [r]] ** 2 / (fb[:, :, [r]] + 1e-5)
            precision[name] = 1 / variance
    for name, x in matrices(trees, space).items():
        share = precision[name] * np.reshape(WEIGHTS, (3, 1, 1))
        expected[name] = (share * x).sum(0) / share.sum(0)
        if space == PRODUCT:
            expected[name] = best(expected[name])
    close(merged, expected, space)


@pytest.mark.parametrize("space", fusion.SPACES)
def test_opcm(space):
    """Against the rule on whole matrices, in the basis of a complete decomposition."""
    trees = [adapter(seed) for seed in range(3)]
    weights = (1.0, 0.9, 1.1)
    merged = fusion.merge(trees, fusion.Rule("opcm", space, split=0.6), weights, rank=7)
    tasks = {
        k: x * np.reshape(weights, (3, 1, 1)) for k, x in matrices(trees, space).items()
    }
    norms = [np.sqrt(sum((x[i] ** 2).sum() for x in tasks.values())) for i in range(3)]
    running, normaliser, protected = {k: x[0] for k, x in tasks.items()}, 1.0, 0
    for i in (1, 2):
        sums = {}
        for name, x in tasks.items():
            u, s, vt = np.linalg.svd(running[name])
            real = (s > 1e-9 * s[0]).sum()
            inner = u.T @ x[i] @ vt.T
            inner[range(real), range(real)] = 0
            split = np.argmax(np.cumsum(s) / s.sum() > 0.6)
            protected += split
            inner[:split, :split] = 0
            sums[name] = normaliser * running[name] + u @ inner @ vt
        norm = np.sqrt(sum((x**2).sum() for x in sums.values()))
        normaliser = norm / np.mean(norms[: i + 1])
        running = {k: x / normaliser for k, x in sums.items()}
    assert protected and 1.4 < normaliser < 2
    close(merged, running, space, 1e-4)


@pytest.mark.parametrize("space", fusion.SPACES)
def test_opcm_of_adapters_that_have_not_moved(space):
    still = jax.tree.map(jnp.zeros_like, adapter(0))
    merged = fusion.merge([still, still], fusion.Rule("opcm", space))
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(merged))


def test_ema():
    old, new = adapter(0), adapter(1)
    found = fusion.ema(old, new, 0.9)
    expected = jax.tree.map(
        lambda o, n: 0.9 * np.float64(o) + 0.1 * np.float64(n), old, new
    )
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, atol=1e-6), found, expected
    )


def test_slao():
    """B by 1 / sqrt(i), A the newest; the first task is itself."""
    merged = adapter(0)
    for number, seed in enumerate((1, 2, 3), 1):
        tuned = adapter(seed)
        old = np.float64(merged["last"]["v"]["b"])
        merged = fusion.slao(merged, tuned, number)
        new = np.float64(tuned["last"]["v"]["b"])
        expected = old + (new - old) / np.sqrt(number)
        np.testing.assert_allclose(merged["last"]["v"]["b"], expected, atol=1e-5)
        np.testing.assert_array_equal(merged["last"]["v"]["a"], tuned["last"]["v"]["a"])
        if number == 1:
            jax.tree.map(np.testing.assert_array_equal, merged, tuned)


@pytest.mark.parametrize("space", fusion.SPACES)
@pytest.mark.parametrize("name", ["ema", "slao"])
def test_running_averages_of_several(name, space):
    """All at once as one by one; in product space both average products."""
    trees = [adapter(seed) for seed in range(4)]
    merged = fusion.merge(trees, fusion.Rule(name, space, decay=0.7), rank=7)
    if space == PRODUCT:
        expected = {}
        for key, x in matrices(trees, space).items():
            total = x[0]
            for number in (2, 3, 4):
                rate = 0.3 if name == "ema" else number**-0.5
                total = (1 - rate) * total + rate * x[number - 1]
            expected[key] = total
        close(merged, expected, space)
        return
    running = trees[0]
    for number, tree in enumerate(trees[1:], 2):
        if name == "ema":
            running = fusion.ema(running, tree, 0.7)
        else:
            running = fusion.slao(running, tree, number)
    close(merged, {k: x[0] for k, x in matrices([running], space).items()}, space)


def test_orthonormal():
    """A keeps its row space and gets orthonormal rows; A = R^T Q^T, diag(R) > 0."""
    tree = adapter(0)
    found = fusion.orthonormal(tree)
    for old, new in zip(
        tree["layers"]["q"]["a"], found["layers"]["q"]["a"], strict=True
    ):
        np.testing.assert_allclose(new @ new.T, np.eye(RANK), atol=1e-6)
        lower = np.asarray(old @ new.T)
        np.testing.assert_allclose(lower @ new, old, atol=1e-5)
        assert (np.diag(lower) > 0).all()
        np.testing.assert_allclose(lower, np.tril(lower), atol=1e-5)
    np.testing.assert_array_equal(found["last"]["v"]["b"], tree["last"]["v"]["b"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value):
    broken = adapter(1)
    broken["layers"]["q"]["b"] = broken["layers"]["q"]["b"].at[1, 2, 0].set(value)
    with pytest.raises(aim_jax.InputError, match="adapter 2 of 2.*in layers/q/b"):
        fusion.merge([adapter(0), broken], fusion.Rule("linear"))


@pytest.mark.parametrize("space", fusion.SPACES)
def test_shapes_that_differ(space):
    trees = [adapter(0), adapter(1, width=5)]
    with pytest.raises(aim_jax.InputError, match="adapter 2 of 2: last/v/a is .*, but"):
        fusion.merge(trees, fusion.Rule("linear", space))
    rule = fusion.Rule("fisher", space)
    with pytest.raises(aim_jax.InputError, match="fisher of adapter 2 of 2: last/v/a"):
        fusion.merge([adapter(0), adapter(1)], rule, fishers=trees)
    del trees[1]["last"]
    with pytest.raises(
        aim_jax.InputError, match="adapter 2 of 2: no last/v/a, which adapter 1"
    ):
        fusion.merge(trees, fusion.Rule("linear", space))


@pytest.mark.parametrize(
    ("rule", "weights", "words"),
    [
        (fusion.Rule("tie"), None, "rule: no 'tie'; there are linear, task_arithmetic"),
        (
            fusion.Rule("ties", "both"),
            None,
            "space: no 'both'; there are factor, product",
        ),
        (fusion.Rule("ties", density=0.0), None, "density 0.0 must be above 0"),
        (fusion.Rule("dare", drop_into="magmax"), None, "drop_into: no 'magmax'"),
        (fusion.Rule("linear"), (1,), "1 weights for 2 adapters"),
        (
            fusion.Rule("ties"),
            (1, -1),
            "weight -1.0 must be finite and above 0 for ties",
        ),
        (fusion.Rule("magmax"), (1, np.nan), "weight nan must be finite"),
        (fusion.Rule("ema", decay=1.1), None, "decay 1.1 must be at least 0"),
        (fusion.Rule("slao"), (1, 2), "slao weighs by order; it takes no weights"),
        (fusion.Rule("fisher"), None, "fisher needs the squared gradients"),
        (
            fusion.Rule("fisher", fisher_floor=0.0),
            None,
            "fisher_floor 0.0 must be above",
        ),
        (fusion.Rule("ema", roots=True), None, "roots: .* not for ema"),
        (
            fusion.Rule("ties", "product", roots=True),
            None,
            "roots: .* space factor",
        ),
    ],
)
def test_what_cannot_be_merged(rule, weights, words):
    with pytest.raises(aim_jax.InputError, match=words):
        fusion.merge([adapter(0), adapter(1)], rule, weights)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_as_peft(density):
    """PEFT's own ties, sign by total, on every factor and on every product."""
    torch = pytest.importorskip("torch")
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    trees = [adapter(seed) for seed in range(3)]
    for space in fusion.SPACES:
        merged = fusion.merge(
            trees, fusion.Rule("ties", space, density=density), rank=7
        )
        expected = {
            name: merge_utils.ties(
                list(torch.tensor(x)), torch.ones(3), density
            ).numpy()
            for name, x in matrices(trees, space).items()
        }
        close(merged, expected, space)


def test_linear_as_peft():
    """PEFT's `linear` is a sum with the roots of the weights on A and on B."""
    torch = pytest.importorskip("torch")
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    trees = [adapter(seed) for seed in range(3)]
    rule = fusion.Rule("task_arithmetic", FACTOR, scale=1.0, roots=True)
    merged = fusion.merge(trees, rule, (1.0, -0.5, 2.0))
    root = torch.tensor([1.0, 0.5**0.5, 2**0.5])
    signs = {"a": torch.tensor([1.0, -1.0, 1.0]), "b": torch.ones(3)}
    expected = {
        name: merge_utils.task_arithmetic(
            list(torch.tensor(x, dtype=torch.float32)), root * signs[name[-1]]
        ).numpy()
        for name, x in matrices(trees, FACTOR).items()
    }
    close(merged, expected, FACTOR)
