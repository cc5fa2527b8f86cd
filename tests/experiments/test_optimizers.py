import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.optimizers import clip_by_root_of_norm, make_optimizer


def settings(**changes):
    values = {"name": "rmsprop", "learning_rate": 0.01, "decay": 0.5, "clip_norm": 1.0}
    return ConfigDict(values | {"clip_rule": "norm", "adam_epsilon": "published"} | changes)


def run(config, gradients):
    """The parameters after one update with each gradient, from zero."""
    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def test_rmsprop_matches_the_released_code():
    random = np.random.default_rng(0)
    # The root mean square of a's gradients is far above the floor of 1e-5, that of b's far below.
    gradients = [{"a": random.normal(size=3), "b": 1e-7 * random.normal(size=2)} for _ in range(4)]
    wanted = {"a": np.zeros(3), "b": np.zeros(2)}
    v = {"a": np.zeros(3), "b": np.zeros(2)}
    for gradient in gradients:
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g / max(norm, 1)
            v[name] = 0.5 * v[name] + 0.5 * g**2
            wanted[name] -= 0.01 * g / np.maximum(np.sqrt(v[name]), 1e-5)
    got = run(settings(), [jax.tree.map(jnp.float32, g) for g in gradients])
    for name in wanted:
        np.testing.assert_allclose(
            got[name], wanted[name], rtol=1e-4
        )  # float32, and steps that cancel


def test_gradient_is_clipped_by_its_global_norm():
    # The norm is 5e-6. Adam would hide it. RMSProp's first step divides by the floor, and shows it.
    gradient = {"a": jnp.array([3e-6]), "b": jnp.array([4e-6])}
    got = run(settings(clip_norm=1e-6, decay=0.0), [gradient])
    np.testing.assert_allclose(got["a"], [-0.01 * 0.6e-6 / 1e-5], rtol=1e-5)
    np.testing.assert_allclose(got["b"], [-0.01 * 0.8e-6 / 1e-5], rtol=1e-5)


def test_released_reader_rule_clips_by_root_of_norm():
    # With decay 1, RMSProp's first step divides by the floor alone, so it shows the clipped norm.
    for norm, clipped in ((99.0, 99.0), (101.0, 10 * math.sqrt(101)), (400.0, 200.0)):
        gradient = {"a": jnp.array([0.6 * norm]), "b": jnp.array([-0.8 * norm])}
        rules = settings(clip_rule="released_reader", clip_norm=10.0, decay=1.0)
        got = run(rules, [gradient])
        np.testing.assert_allclose(got["a"], [-0.01 * 0.6 * clipped / 1e-5], rtol=1e-5)
        np.testing.assert_allclose(got["b"], [0.01 * 0.8 * clipped / 1e-5], rtol=1e-5)


def test_huge_clip_norm_clips_nothing():
    gradients = {"w": jnp.array([3.0, 4.0])}
    rule = clip_by_root_of_norm(1e200)  # its square overflows
    clipped, _ = rule.update(gradients, rule.init(gradients))
    np.testing.assert_array_equal(clipped["w"], gradients["w"])


def test_adam_matches_the_published_formula():
    gradients = [{"a": jnp.array([0.3])}, {"a": jnp.array([-0.1])}]
    m = v = w = 0.0
    for t, g in enumerate((0.3, -0.1), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(run(settings(name="adam"), gradients)["a"], [w], rtol=1e-4)


def test_released_adam_adds_epsilon_before_bias_correction():
    random = np.random.default_rng(0)
    gradients = [{"a": 10.0 ** random.uniform(-9, -1, size=8)} for _ in range(5)]
    m, v, w = (np.zeros(8) for _ in range(3))
    for t, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient["a"], 0.999 * v + 0.001 * gradient["a"] ** 2
        w -= 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
    rules = settings(name="adam", adam_epsilon="released")
    got = run(rules, [jax.tree.map(jnp.float32, g) for g in gradients])
    np.testing.assert_allclose(got["a"], w, rtol=1e-3)  # float32: 1 - .999 has four digits


def test_first_adam_step_matches_hand_computation_for_tiny_gradients():
    """Figures of the released formula, worked out by hand: 1 / (1 + 1e-8 / (0.0316 g))."""
    for g, released, published in (
        (1e-7, 0.240, 0.909),
        (1e-6, 0.760, 0.990),
        (1e-5, 0.969, 0.999),
    ):
        for name, share in (("released", released), ("published", published)):
            got = run(settings(name="adam", adam_epsilon=name), [{"a": jnp.array([g])}])
            np.testing.assert_allclose(got["a"], [-0.01 * share], rtol=2e-3)
