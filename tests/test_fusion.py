"""Fusion against its formula in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import fusion


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
