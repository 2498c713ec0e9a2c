"""MIGU: only the rows of A and B whose outputs are large get a gradient.

From the second task on, in every optimizer step and for every layer: n_j is the sum over
the tokens of the batch of |h_j|, h the r outputs of A or the outputs of the layer (base
and adapter together); the gradients of row j of A, or of B, are zeroed unless n_j is at
least the `quantile` of its layer's. Adam's moments go on from the gradients that are left.
The control masks as many rows at random, others in each step.

Source: Du et al. 2024 (arXiv 2406.17245), the rule of its paper: the release's LoRA path
masks nothing unless its flag is changed. Padding does not count.
"""

import dataclasses

import jax
import jax.numpy as jnp

from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of MIGU."""

    name: str = "migu"
    quantile: float = 0.7  # part of the rows that is masked
    random: bool = False  # the control: masks that know nothing


def make(options: Options) -> methods.Method:
    """The method that masks gradients."""

    def memo_of(number):
        return methods.Memo({"later": jnp.asarray(number > 0)})

    def start(delta, tasks):
        return memo_of(0)

    def before_task(tools, state, memo):
        return state, memo_of(tools.number)

    def gradients(state, grads, magnitudes, arrays, rehearsal):
        if options.random:
            magnitudes = noise(state, magnitudes)

        def masked(gradient, size):
            least = jnp.quantile(size, options.quantile, axis=-1, keepdims=True)
            kept = (size >= least) | ~arrays["later"]
            return jnp.where(kept[..., None], gradient, 0)

        return jax.tree.map(masked, grads, magnitudes), state.carry

    return methods.Method(
        start=start, before_task=before_task, gradients=gradients, magnitudes=True
    )


def noise(state, magnitudes):
    """Uniform numbers in place of `magnitudes`, others in each step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.adam.count)
    # A number that nothing else is drawn by.
    key = jax.random.fold_in(key, 2**31)
    leaves, treedef = jax.tree.flatten(magnitudes)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)
