import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from experiments.models.language_model import LanguageModel
from experiments.models.sequence_classifier import SequenceClassifier


@pytest.mark.parametrize("layer", [bnlstm_jax.LSTM(6), bnlstm_jax.BNLSTM(6, max_steps=5)])
def test_classifier_reads_the_last_hidden_state(layer):
    model = SequenceClassifier(layer, num_classes=3)
    x = jax.random.normal(jax.random.key(0), (4, 5, 2))
    variables = model.init(jax.random.key(1), x, use_running_average=True)
    logits = model.apply(variables, x, use_running_average=True)

    inner = {name: collection["layer"] for name, collection in variables.items()}
    hidden = layer.apply(inner, x, use_running_average=True)
    readout = variables["params"]["readout"]
    np.testing.assert_allclose(
        logits, hidden[:, -1] @ readout["kernel"] + readout["bias"], atol=1e-6
    )
    assert logits.shape == (4, 3)


def test_readout_starts_with_orthonormal_columns_and_no_bias():
    model = SequenceClassifier(bnlstm_jax.LSTM(6), num_classes=3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2, 1)))["params"]["readout"]
    np.testing.assert_allclose(params["kernel"].T @ params["kernel"], np.eye(3), atol=1e-5)
    assert np.all(params["bias"] == 0)


@pytest.mark.parametrize(
    "layer",
    [bnlstm_jax.LSTM(6, vocab_size=4), bnlstm_jax.BNLSTM(6, max_steps=3, vocab_size=4)],
    ids=["lstm", "bn_lstm"],
)
def test_language_model_reads_every_hidden_state(layer):
    model = LanguageModel(layer)
    symbols = np.random.default_rng(0).integers(0, 4, (2, 5))
    variables = model.init(jax.random.key(1), symbols, use_running_average=True)
    logits = model.apply(variables, symbols, use_running_average=True)
    carry, alike = model.apply(variables, symbols, use_running_average=True, return_carry=True)
    np.testing.assert_array_equal(alike, logits)

    inner = {name: collection["layer"] for name, collection in variables.items()}
    expected_carry, hidden = layer.apply(
        inner, symbols, use_running_average=True, return_carry=True
    )
    readout = variables["params"]["readout"]
    np.testing.assert_allclose(logits, hidden @ readout["kernel"] + readout["bias"], atol=1e-6)
    assert logits.shape == (2, 5, 4)
    jax.tree.map(np.testing.assert_array_equal, carry, expected_carry)

    first, _ = model.apply(variables, symbols[:, :2], use_running_average=True, return_carry=True)
    rest = model.apply(variables, symbols[:, 2:], first, 2, use_running_average=True)
    np.testing.assert_allclose(rest, logits[:, 2:], atol=1e-6)


def test_bfloat16_rounds_operands_not_logits():
    model = LanguageModel(bnlstm_jax.LSTM(6, vocab_size=4, dtype="bfloat16"), dtype="bfloat16")
    symbols = np.random.default_rng(0).integers(0, 4, (2, 5))
    variables = model.init(jax.random.key(1), symbols)
    logits = model.apply(variables, symbols)
    assert logits.dtype == np.float32
    assert np.any(logits != logits.astype("bfloat16").astype(np.float32))
