"""O-LoRA: a new adapter for each task, in a subspace orthogonal to those of earlier ones.

As `inc_lora`, with the loss

    loss + orthogonal * sum_layers sum_{i<t} |A_i A_t^T| + norm * sum (|A_t|_F + |B_t|_F),

where |M| is the sum of absolute values, as the release has it, or the sum of squares, the
squared Frobenius norm of the paper. The release's scripts tune both constants for each
task of a sequence; here they are the same for all. Source: Wang et al. 2023 (arXiv
2310.14152), equations 5 to 8.
"""

import dataclasses

import jax
import jax.numpy as jnp

from aim_jax import methods
from aim_jax.methods import inc_lora


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of O-LoRA."""

    name: str = "olora"
    orthogonal: float = 0.5  # lambda_1
    norm: float = 0.0  # lambda_2
    measure: str = "l1"  # of A_i A_t^T: `l1` (release) or `frobenius` (paper)


def make(options: Options) -> methods.Method:
    """IncLoRA with a penalty."""

    def overlap(past, a):
        product = jnp.einsum("...pi,...ri->...pr", past, a)
        return jnp.sum(jnp.abs(product) if options.measure == "l1" else product**2)

    def length(x):
        # One norm a layer; its gradient at 0, where B begins, is taken to be 0.
        squared = jnp.sum(x**2, (-2, -1))
        return jnp.sum(jnp.where(squared, jnp.sqrt(jnp.where(squared, squared, 1)), 0))

    def penalty(delta, arrays):
        total = jnp.float32(0)
        past = dict(jax.tree.leaves_with_path(arrays["past"]))
        for path, x in jax.tree.leaves_with_path(delta):
            if path[-1].key == "a":
                total += options.orthogonal * overlap(past[path], x)
            total += options.norm * length(x)
        return total

    return inc_lora.make(options)._replace(penalty=penalty)
