"""The optimisers of the paper's experiments: clipped RMSProp and clipped Adam."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of `config.optimizer`: clips the global norm, then applies the rule."""
    released_reader = config.clip_rule == "released_reader"
    clip = clip_by_root_of_norm if released_reader else optax.clip_by_global_norm
    if config.name == "rmsprop":
        rule = scale_by_floored_rms(config.decay)
    elif config.adam_epsilon == "released":
        rule = scale_by_released_adam()
    else:
        rule = optax.scale_by_adam()
    return optax.chain(
        clip(config.clip_norm),
        rule,
        optax.scale_by_learning_rate(config.learning_rate),
    )


def scale_by_floored_rms(decay: float, floor: float = 1e-5) -> optax.GradientTransformation:
    """RMSProp of the paper's experiments: `g / max(sqrt(v), floor)`, with v = 0 at the start.

    `optax.scale_by_rms` adds a constant to v or to its root; this rule bounds the root from below.
    The two differ for gradients near the floor, such as an LSTM's over 784 time steps.
    """

    def init(params: optax.Params) -> optax.Updates:
        return jax.tree.map(jnp.zeros_like, params)

    def update(gradients, mean_square, params=None):
        mean_square = jax.tree.map(
            lambda v, g: decay * v + (1 - decay) * jnp.square(g), mean_square, gradients
        )
        scaled = jax.tree.map(
            lambda g, v: g / jnp.maximum(jnp.sqrt(v), floor), gradients, mean_square
        )
        return scaled, mean_square

    return optax.GradientTransformation(init, update)


def scale_by_released_adam(
    b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Adam of the paper's code, which adds epsilon to the root before the bias correction.

    Published Adam (`optax.scale_by_adam`) adds it after. At update t this rule is published Adam
    with the larger epsilon `epsilon / sqrt(1 - b2 ** t)`, which is 3.2e-7 at t = 1. This matters
    for gradients of that size: for a gradient of 1e-7, the first step is 0.24 of the learning rate,
    in published Adam 0.91.
    """

    def update(gradients, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        factor = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: factor * m / (jnp.sqrt(v) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def clip_by_root_of_norm(clip_norm: float) -> optax.GradientTransformation:
    """Clipping of the released reader, which mistakes the norm for its square.

    A gradient with a norm n above `clip_norm ** 2` is multiplied by `clip_norm / sqrt(n)`, which
    gives the norm `clip_norm * sqrt(n)`. Smaller gradients are unchanged.
    """

    def clip(gradients, params=None):
        root = jnp.sqrt(optax.tree.norm(gradients))
        factor = jnp.where(root > clip_norm, clip_norm / root, 1)
        return jax.tree.map(lambda g: factor * g, gradients)

    return optax.stateless(clip)
