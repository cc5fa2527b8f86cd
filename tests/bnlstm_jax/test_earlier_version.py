"""The library reproduces the variables and outputs of an earlier version, in tests/data.

`write` wrote these files with the earlier version, on a CPU.
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
# Kernels of the reader that are uniform at first.
UNIFORM = ("embedding", "question_kernel", "attended_kernel", "mean_kernel", "['readout']")
# Float64 rounds by 1e-16. Each normalisation of a batch of four multiplies this by up to 316.
CLOSE = dict(rtol=1e-9, atol=1e-12)
CLOSE_AT_FIRST = dict(rtol=1e-4, atol=1e-6)  # float32


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


def randomized(name):
    """Random float32 variables, which do not depend on how a processor rounds."""
    random = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key.endswith("_var"):
            return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(random.normal(0, 0.5, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(lambda: initialized(name)))


def widened(tree):
    def widen(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

    return jax.tree.map(widen, tree)


def flat(tree):
    return np.concatenate([np.zeros(0), *map(np.ravel, jax.tree.leaves(tree))])


def computed(name, variables):
    """Outputs in training and at inference, updated statistics, and the gradient, flat.

    In float64, so that implementations and compilers differ only in the last digits.
    """
    module, inputs, options = modules()[name]
    module = module.clone(param_dtype=jnp.float64)
    variables, inputs = widened((variables, inputs))

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

    with jax.enable_x64(True):
        gradient, (outputs, updated) = jax.jit(jax.grad(value, has_aux=True))(variables["params"])
        inference = jax.jit(infer)(variables)
        found = np.concatenate([flat(tree) for tree in (outputs, inference, updated, gradient)])
    assert found.dtype == np.float64
    return found


def write():
    variables = {name: randomized(name) for name in modules()}
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
def test_initial_values_match_earlier_version(name, outputs):
    def is_same(path, leaf):
        """False for uniform kernels of `identical_blocks`, which started independent then."""
        path = jax.tree_util.keystr(path)
        changed = name == "reader_lstm" and any(kernel in path for kernel in UNIFORM)
        return np.full(leaf.shape, not changed)

    variables = initialized(name)
    same = flat(jax.tree.map_with_path(is_same, variables)) == 1
    assert same.mean() > 0.5
    found, expected = flat(variables), outputs[f"initial_{name}"]
    np.testing.assert_allclose(found[same], expected[same], **CLOSE_AT_FIRST)


@pytest.mark.parametrize("name", modules())
def test_outputs_statistics_and_gradients_match_earlier_version(name, outputs):
    found = computed(name, randomized(name))
    np.testing.assert_allclose(found, outputs[name], **CLOSE)


def test_restored_checkpoint_reproduces_earlier_outputs(outputs):
    trees = jax.eval_shape(lambda: {name: initialized(name) for name in RESTORED})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(DATA / "checkpoint", trees)
    for name in RESTORED:
        np.testing.assert_allclose(computed(name, restored[name]), outputs[name], **CLOSE)
