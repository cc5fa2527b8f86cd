"""Variables and outputs of an earlier version, in tests/data: this one reproduces them.

The files were written by this file's functions, on a CPU, before the library was rearranged.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import bnlstm_jax
from experiments.models.attentive_reader import FORMS, AttentiveReader, Quirks

DATA = Path(__file__).parents[1] / "data" / "earlier_version"
RESTORED = ("bn_lstm", "lstm", "reader_lstm")  # the modules with variables in the checkpoint
# Float32 (6e-8), of which each normalisation of a batch of four multiplies rounding by up to 316.
# Measured: below 1e-5, but 3e-5 in a gradient of a reader; of small values 1.2e-6.
CLOSE = dict(rtol=1e-4, atol=4e-6)


def modules():
    """Modules with their inputs."""
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 5, 2)).astype(np.float32)
    symbols = random.integers(0, 6, (4, 5))
    lengths = {"seq_lengths": np.array([5, 1, 5, 5])}
    words, questions = random.integers(0, 7, (4, 6)), random.integers(0, 7, (4, 3))
    asked = words, questions, np.array([5, 1, 3, 4]), np.array([3, 1, 2, 2])
    normalized = dict(passage_steps=5, question_steps=3, momentum=0.9)

    def reader(form, quirks, **options):
        return AttentiveReader(7, 3, **FORMS[form], quirks=quirks, **options)

    padded = Quirks(count_padding=True)
    alike = Quirks(double_bias=True, identical_blocks=True)
    return {
        "bn_lstm": (bnlstm_jax.BNLSTM(3, max_steps=6, momentum=0.9), (x,), lengths),
        "ln_lstm": (bnlstm_jax.LNLSTM(3), (x,), lengths),
        "lstm": (bnlstm_jax.LSTM(3, vocab_size=6), (symbols,), {}),
        "reader_lstm": (reader("lstm", alike), asked, {}),
        "bn_e_star": (reader("bn_e_star", padded, **normalized), asked, {}),
        "bn_e_star_star": (reader("bn_e_star_star", padded, **normalized), asked, {}),
    }


def initialized(name):
    module, inputs, _ = modules()[name]
    return jax.jit(functools.partial(module.init, use_running_average=True))(
        jax.random.key(1), *inputs
    )


def randomized(variables):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + np.float32(0.3 * random.random(leaf.shape)), variables)


def flat(tree):
    return np.concatenate([np.zeros(0), *map(np.ravel, jax.tree.leaves(tree))])


def computed(name, variables):
    """Outputs in training and at inference, updated statistics, and the gradient, flat."""
    module, inputs, options = modules()[name]

    def value(params):
        outputs, updated = module.apply(
            {**variables, "params": params},
            *inputs,
            use_running_average=False,
            mutable=["batch_stats"],
            **options,
        )
        return jnp.sum(jnp.sin(outputs)), (outputs, updated)

    def infer(variables):
        return module.apply(variables, *inputs, use_running_average=True, **options)

    gradient, (outputs, updated) = jax.jit(jax.grad(value, has_aux=True))(variables["params"])
    inference = jax.jit(infer)(variables)
    return np.concatenate([flat(tree) for tree in (outputs, inference, updated, gradient)])


def write():
    variables = {name: randomized(initialized(name)) for name in modules()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(DATA / "checkpoint", {name: variables[name] for name in RESTORED})
    found = {name: computed(name, variables[name]) for name in variables}
    initial = {f"initial_{name}": flat(initialized(name)) for name in variables}
    np.savez_compressed(DATA / "outputs.npz", **found, **initial)


@pytest.fixture(scope="module")
def outputs():
    with np.load(DATA / "outputs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", modules())
def test_initial_values_are_the_same(name, outputs):
    np.testing.assert_allclose(flat(initialized(name)), outputs[f"initial_{name}"], **CLOSE)


@pytest.mark.parametrize("name", modules())
def test_outputs_statistics_and_gradients_are_the_same(name, outputs):
    found = computed(name, randomized(initialized(name)))
    np.testing.assert_allclose(found, outputs[name], **CLOSE)


def test_restores_a_checkpoint(outputs):
    trees = jax.eval_shape(lambda: {name: initialized(name) for name in RESTORED})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(DATA / "checkpoint", trees)
    for name in RESTORED:
        np.testing.assert_allclose(computed(name, restored[name]), outputs[name], **CLOSE)
