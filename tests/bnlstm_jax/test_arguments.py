"""What layers and cells do with unusual arguments: padding, lengths, dtypes, sizes, fields."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnlstm_jax import (
    BNLSTM,
    LNLSTM,
    LSTM,
    BatchNorm,
    BNLSTMCell,
    BNSimpleCell,
    LNLSTMCell,
    LSTMCell,
    estimate_population_statistics,
)
from bnlstm_jax.batch_norm import CURRENT_BATCH_STATS
from bnlstm_jax.recurrence.devices import emulation

LAYERS = {"LSTM": LSTM, "BNLSTM": BNLSTM, "LNLSTM": LNLSTM}
LENGTHS = (5, 2, 3)
VALID = np.arange(5) < np.array(LENGTHS)[:, None]
TRAINING = {"use_running_average": False, "mutable": ["batch_stats"]}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initialize(layer, x):
    return layer.init(jax.random.key(0), jnp.asarray(x), use_running_average=True)


def training_results(layer, variables, x, **options):
    """Outputs, updated statistics and gradients of a sum of squares."""

    def loss(params):
        y, updated = layer.apply({**variables, "params": params}, x, **options, **TRAINING)
        return jnp.sum(jnp.square(y)), (y, updated)

    gradients, (y, updated) = jax.grad(loss, has_aux=True)(variables["params"])
    return y, updated, gradients


def fields_of(module):
    names = (field.name for field in dataclasses.fields(module))
    return {name: getattr(module, name) for name in names if name not in ("parent", "name")}


def assert_equal(ours, theirs, rtol=0.0, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


# ---- Padding and lengths.


@pytest.mark.parametrize("padding", [np.nan, np.inf, 7.0])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_padding_has_no_effect(kind, implementation, padding):
    layer = kind(4, implementation=implementation)
    x = np.where(VALID[..., None], draw(3, 5, 2), 0)
    variables = initialize(layer, x)
    lengths = jnp.array(LENGTHS)
    expected = training_results(layer, variables, jnp.asarray(x), seq_lengths=lengths)
    padded = jnp.asarray(np.where(VALID[..., None], x, padding))
    assert_equal(training_results(layer, variables, padded, seq_lengths=lengths), expected)


@pytest.mark.parametrize("padding", [-1, 6, 1000])
def test_padding_with_out_of_range_symbols_has_no_effect(padding):
    layer = BNLSTM(4, vocab_size=6)
    symbols = np.random.default_rng(0).integers(0, 6, (3, 5))
    variables = initialize(layer, symbols)
    results = [
        training_results(
            layer, variables, jnp.asarray(np.where(VALID, symbols, other)), seq_lengths=LENGTHS
        )
        for other in (0, padding)
    ]
    assert_equal(*results)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_lengths_are_clipped_to_the_sequence(kind, reverse):
    layer = kind(4, reverse=reverse, keep_order=reverse)
    x = jnp.asarray(draw(3, 5, 2))
    variables = initialize(layer, x)
    results = [
        training_results(layer, variables, x, seq_lengths=lengths)
        for lengths in ((5, 0, 3), jnp.array([9, -2, 3]))
    ]
    assert_equal(*results)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_narrow_integer_lengths_match_int32_lengths(dtype):
    layer = LSTM(2)
    x = jnp.asarray(draw(3, 300, 1))
    variables = initialize(layer, x)
    lengths = np.array([120, 3, 0])
    outputs = [layer.apply(variables, x, seq_lengths=lengths.astype(d)) for d in (dtype, np.int32)]
    assert_equal(*outputs)


@pytest.mark.parametrize("module", [BNLSTM(2), BNLSTMCell(2), BNSimpleCell(2), BatchNorm()])
def test_non_boolean_use_running_average_raises(module):
    x = jnp.zeros((3, 2)) if "Cell" in type(module).__name__ else jnp.zeros((3, 5, 2))
    arguments = (x,)
    if isinstance(module, BNLSTMCell | BNSimpleCell):
        arguments = (module.initialize_carry(jax.random.key(0), x.shape), x)
    variables = module.init(jax.random.key(0), *arguments, True)

    def apply(flag):
        return module.apply(variables, *arguments, flag)

    message = rf"{type(module).__name__}: use_running_average: expected True or False, got "
    lengths = jnp.array(LENGTHS)
    by_keyword = "; pass lengths and masks by keyword"
    for wrong, got in (
        (LENGTHS, r"\(.*\)" + by_keyword),
        (lengths, r"int32\[3\]" + by_keyword),
        ("False", "'False'"),
        (1, "1"),
    ):
        with pytest.raises(TypeError, match=message + got):
            apply(wrong)
    with pytest.raises(TypeError, match=message + r"int32\[3\]" + by_keyword):
        jax.jit(apply)(lengths)
    with pytest.raises(TypeError, match=message + r"bool\[\]; make it static"):
        jax.jit(apply)(True)
    for flag in (np.True_, jnp.array(True)):
        jax.tree.map(np.testing.assert_array_equal, apply(flag), apply(True))


def test_mask_by_position_raises_if_the_field_is_set():
    x = jnp.zeros((3, 2))
    with pytest.raises(TypeError, match=r"BatchNorm: .* got bool\[3, 1\]; pass .* by keyword"):
        BatchNorm(use_running_average=False).init(jax.random.key(0), x, jnp.ones((3, 1), bool))


def test_inputs_that_are_no_array_raise():
    for inputs, got in (({"x": 1}, "a dict"), ([[[1.0]]], "a list")):
        with pytest.raises(TypeError, match=rf"BNLSTM: .* \[batch, time, features\], got {got}"):
            BNLSTM(2).init(jax.random.key(0), inputs, True)


def test_missing_or_misshaped_statistics_of_cells_raise():
    cell, x = BNLSTMCell(2, use_running_average=True), jnp.zeros((3, 4))
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    with pytest.raises(ValueError, match=r"no batch_stats/input_mean; .* variable_axes="):
        nn.RNN(cell).init(jax.random.key(0), jnp.zeros((3, 5, 4)))
    variables = cell.init(jax.random.key(0), carry, x)
    with pytest.raises(ValueError, match="BNLSTMCell: the variables have no batch_stats/input_m"):
        cell.apply({"params": variables["params"]}, carry, x)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), variables["batch_stats"])
    with pytest.raises(ValueError, match=r"input_mean of the shape \[8\], got \[5, 8\]"):
        cell.apply({**variables, "batch_stats": stacked}, carry, x)


@pytest.mark.parametrize(
    "largest",
    [np.int64(2**63 - 1), np.uint32(2**32 - 1), np.int32(2**31 - 1), jnp.uint32(2**32 - 1)],
)
def test_lengths_are_clipped_before_conversion_to_int32(largest):
    layer = LSTM(2)
    x = jnp.asarray(draw(2, 5, 1))
    variables = initialize(layer, x)
    outputs = layer.apply(variables, x, seq_lengths=largest[None].repeat(2))
    assert_equal(outputs, layer.apply(variables, x))


@pytest.mark.parametrize("layer", [LSTM(2), LNLSTM(2), BNLSTM(2, normalize=())], ids=repr)
def test_lengths_by_position_raise_also_without_batch_statistics(layer):
    x = jnp.asarray(draw(2, 5, 1))
    variables = layer.init(jax.random.key(0), x)
    for lengths in (jnp.array([5, 3]), [5, 3]):
        with pytest.raises(TypeError, match="pass lengths and masks by keyword"):
            layer.apply(variables, x, lengths)
    # A flag has no effect here, so it may be traced.
    got = jax.jit(lambda flag: layer.apply(variables, x, flag))(True)
    np.testing.assert_allclose(got, layer.apply(variables, x), rtol=1e-6)


def test_lengths_may_be_a_list_of_traced_numbers():
    layer = LSTM(2)
    x = jnp.asarray(draw(2, 5, 1))
    variables = initialize(layer, x)
    outputs = jax.jit(lambda n: layer.apply(variables, x, seq_lengths=[n, 3]))(2)
    assert_equal(outputs, layer.apply(variables, x, seq_lengths=[2, 3]))


def test_boxed_statistics_may_have_another_number_of_steps():
    layer = BNLSTM(4, use_running_average=True)
    x = jnp.asarray(draw(3, 6, 2))
    variables = layer.init(jax.random.key(0), x)
    boxed = jax.tree.map(lambda s: nn.Partitioned(s, (None, None)), variables["batch_stats"])
    y = layer.apply({**variables, "batch_stats": boxed}, x[:, :4])
    assert_equal(y, layer.apply(variables, x[:, :4]))


def test_boxed_statistics_stay_boxed():
    layer = BNLSTM(4, max_steps=6)
    x = jnp.asarray(draw(3, 6, 2))
    variables = initialize(layer, x)
    boxed = jax.tree.map(lambda s: nn.Partitioned(s, (None, None)), variables["batch_stats"])
    boxed = {**variables, "batch_stats": boxed}

    def trained(variables):
        return layer.apply(variables, x, **TRAINING)[1]["batch_stats"]

    def estimated(variables):
        return estimate_population_statistics(layer, variables, [x], use_running_average=False)

    for function in (trained, estimated):
        found = function(boxed)
        assert jax.tree.structure(found) == jax.tree.structure(boxed["batch_stats"])
        assert_equal(nn.unbox(found), function(variables))


def test_zero_length_sequence_passes_gradient_to_initial_hidden():
    """That sequence outputs its initial state. In the others, normalisation removes it."""
    layer = BNLSTM(3, initial_hidden_init=nn.initializers.normal(0.5))
    x = jnp.asarray(draw(4, 5, 2))
    variables = initialize(layer, x)
    lengths = jnp.array([0, 5, 3, 5])

    def loss(hidden):
        params = {**variables["params"], "initial_hidden": hidden}
        variables_here = {**variables, "params": params}
        return layer.apply(variables_here, x, seq_lengths=lengths, **TRAINING)[0].sum()

    hidden = variables["params"]["initial_hidden"]
    # Five outputs of the first sequence are h0 itself.
    np.testing.assert_allclose(jax.grad(loss)(hidden), np.full(3, 5.0), rtol=1e-6)


UNMASKED = [False, ("input", "cell")]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("masked, lengths, pooled", [
    *((masked, (3, 2, 3, 0), pooled) for masked in UNMASKED for pooled in (False, True)),
    (True, (3, 2, 3, 0), False),
    (True, None, False),
])  # fmt: skip
def test_initial_hidden_gradient_matches_finite_differences(
    masked, lengths, pooled, implementation
):
    """A sequence without steps outputs h0, and counts in the others' moments if not masked."""
    with jax.enable_x64(True):
        layer = BNLSTM(
            3,
            mask_statistics=masked,
            initial_hidden_init=nn.initializers.normal(0.5),
            axis_name="shards" if pooled else None,
            implementation=implementation,
            param_dtype=jnp.float64,
        )
        x, weights = (np.random.default_rng(k).normal(size=(4, 3, n)) for k, n in ((0, 2), (1, 3)))
        variables = initialize(layer, x)
        hidden = variables["params"]["initial_hidden"]

        def loss_of(hidden, x, weights, lengths):
            params = {**variables["params"], "initial_hidden": hidden}
            y, _ = layer.apply({**variables, "params": params}, x, seq_lengths=lengths, **TRAINING)
            return jnp.sum(weights * y)

        def gradient_of(function, hidden):
            """If `pooled`, with half of the batch on each of two shards."""
            arguments = x, weights, None if lengths is None else jnp.array(lengths)
            if not pooled:
                return function(hidden, *arguments)
            halves = [a.reshape(2, 2, *a.shape[1:]) for a in arguments]
            return jax.vmap(function, (None, 0, 0, 0), axis_name="shards")(hidden, *halves).sum(0)

        differences = [
            (gradient_of(loss_of, hidden + step) - gradient_of(loss_of, hidden - step)) / 2e-6
            for step in 1e-6 * np.eye(3)
        ]
        np.testing.assert_allclose(
            gradient_of(jax.grad(loss_of), hidden), differences, rtol=1e-6, atol=1e-8
        )


def test_inputs_without_steps_pass_gradient_to_initial_hidden():
    layer = BNLSTM(3, max_steps=5, return_carry=True)
    x = jnp.zeros((4, 0, 2))
    variables = initialize(layer, x)

    def loss(params):
        ((_, h), _), _ = layer.apply({**variables, "params": params}, x, **TRAINING)
        return h.sum()

    gradient = jax.grad(loss)(variables["params"])["initial_hidden"]
    np.testing.assert_array_equal(gradient, np.full(3, 4.0))


@pytest.mark.parametrize(
    "lengths", [3, jnp.array([[5], [2], [3]]), (5, 2), jnp.array([5.0, 2.0, 3.0])]
)
def test_lengths_of_wrong_shape_or_dtype_raise(lengths):
    layer = LSTM(4)
    x = jnp.asarray(draw(3, 5, 2))
    with pytest.raises(ValueError, match=r"seq_lengths: expected integers \[3\]"):
        layer.init(jax.random.key(0), x, seq_lengths=lengths)
    with pytest.raises(ValueError, match=r"seq_lengths: expected integers \[5\]"):
        layer.init(jax.random.key(0), x, seq_lengths=LENGTHS, time_major=True)


# ---- Dtypes and symbols.


@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_integer_inputs_are_not_rounded(kind):
    x = np.array([[[1001]], [[1002]], [[1003]], [[1005]]])
    layer = kind(4, normalize=("recurrent", "cell")) if kind is not LSTM else kind(4)
    variables = initialize(layer, x.astype(np.float32))
    variables["params"]["input_kernel"] /= 1000
    outputs = [layer.apply(variables, x.astype(d), **TRAINING) for d in (np.int32, np.float32)]
    assert_equal(*outputs)


@pytest.mark.parametrize("implementation", ["xla", "reference", "tpu", "gpu"])
@pytest.mark.parametrize("symbol", [-1, 6])
def test_out_of_range_symbol_gives_nan_from_its_step_on(implementation, symbol):
    layer = LSTM(3, vocab_size=6, implementation=implementation)
    symbols = jnp.array([[0, 5, 2], [1, symbol, 3]])
    with emulation():
        variables = layer.init(jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
        outputs = layer.apply(variables, symbols)
    is_nan = np.isnan(outputs).all(-1)
    np.testing.assert_array_equal(is_nan, [[False] * 3, [False, True, True]])


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_16_bit_parameters_match_rounded_float32_parameters(kind, param_dtype):
    """Statistics, state and outputs are those of a float32 layer with the rounded parameters."""
    x = jnp.asarray(draw(3, 5, 2))
    narrow, wide = (kind(4, param_dtype=d, return_carry=True) for d in (param_dtype, jnp.float32))
    variables, wide_variables = initialize(narrow, x), initialize(wide, x)
    rounded = jax.tree.map(lambda p: p.astype(param_dtype), wide_variables["params"])
    assert_equal(variables["params"], rounded)
    wide_variables["params"] = jax.tree.map(lambda p: p.astype(jnp.float32), rounded)
    found, expected = (
        layer.apply(of_layer, x, **TRAINING)
        for layer, of_layer in ((narrow, variables), (wide, wide_variables))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    # Products of kernels in 16 bits with a float32 state are in float32: only rounding differs.
    assert_equal(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_float64_inputs_are_computed_in_float64(kind, implementation):
    layer = kind(4, implementation=implementation)
    variables = initialize(layer, draw(3, 5, 2))
    with jax.enable_x64(True):
        x = jnp.asarray(draw(3, 5, 2), jnp.float64)
        y, updated, gradients = training_results(layer, variables, x)
        assert y.dtype == jnp.float64
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((updated, gradients))}
        assert dtypes == {jnp.dtype(jnp.float32)}  # as the variables
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        expected = training_results(kind(4, param_dtype=jnp.float64), wide, x)
        assert_equal(y, expected[0], rtol=1e-12)


def test_cuda_kernel_raises_on_float64_state():
    with jax.enable_x64(True), emulation():
        layer = LSTM(4, implementation="gpu")
        x = jnp.asarray(draw(3, 5, 2))
        variables = layer.init(jax.random.key(0), x)
        with pytest.raises(ValueError, match=r"supports only .* float32.*state float64"):
            layer.apply(variables, x.astype(jnp.float64))


# ---- Empty, single and mismatched batches.


@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 4, 2)])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_empty_inputs_keep_statistics_and_give_finite_gradients(kind, shape):
    layer = kind(4)
    variables = initialize(layer, draw(3, 5, 2))
    y, updated, gradients = training_results(layer, variables, jnp.ones(shape))
    assert y.shape == (*shape[:2], 4)
    assert_equal(updated.get("batch_stats", {}), variables.get("batch_stats", {}))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("module", [BNLSTM(4), BNLSTMCell(4), BNSimpleCell(4), BatchNorm()])
def test_batch_of_one_raises_under_batch_statistics(module):
    """Its variance is zero: outputs would be constant and gradients zero."""
    x = jnp.ones((1, 5, 2) if isinstance(module, BNLSTM) else (1, 2))
    arguments = (x,)
    if isinstance(module, nn.RNNCellBase):
        carry = module.initialize_carry(jax.random.key(0), x.shape)
        arguments = carry, x
    variables = module.init(jax.random.key(0), *arguments, use_running_average=False)
    with pytest.raises(ValueError, match=f"{type(module).__name__}: .* batch of at least 2"):
        module.apply(variables, *arguments, **TRAINING)
    module.apply(variables, *arguments, use_running_average=True)


def test_one_example_per_device_trains_with_pooled_statistics():
    layer = BNLSTM(4, axis_name="batch")
    x = jnp.asarray(draw(3, 1, 5, 2))
    variables = initialize(BNLSTM(4), x[0])

    def outputs(x):
        return layer.apply(variables, x, **TRAINING)[0]

    pooled = jax.vmap(outputs, axis_name="batch")(x)
    together = BNLSTM(4).apply(variables, x[:, 0], **TRAINING)[0]
    np.testing.assert_allclose(pooled[:, 0], together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", [BNLSTMCell(4), BNSimpleCell(4)])
def test_batch_normalised_cells_raise_on_unbatched_inputs(cell):
    carry = cell.initialize_carry(jax.random.key(0), (2,))
    with pytest.raises(ValueError, match=r"expected inputs \[batch, features\], got \[2\]"):
        cell.init(jax.random.key(0), carry, jnp.ones(2), use_running_average=True)


# ---- Fields.


FIELDS = [
    (LSTM, "features", 0),
    (BNLSTM, "features", -1),
    (LSTMCell, "features", 0),
    (BNLSTM, "max_steps", 0),
    (BNLSTM, "momentum", 1.5),
    (BNLSTMCell, "momentum", -0.1),
    (BNLSTM, "epsilon", 0.0),
    (LNLSTM, "epsilon", -1e-5),
    (BatchNorm, "epsilon", float("nan")),
    (BatchNorm, "momentum", 2.0),
    (LSTM, "initial_hidden_noise", -1.0),
    (LSTM, "dtype", "int32"),
    (BatchNorm, "dtype", "int8"),
    (LSTM, "vocab_size", 0),
    (BNLSTM, "vocab_size", -2),
    (BNLSTM, "normalize", 7),
]


@pytest.mark.parametrize("kind, field, value", FIELDS)
def test_invalid_field_values_raise(kind, field, value):
    module = kind(**({"features": 4} if kind is not BatchNorm else {}) | {field: value})
    arguments = (jnp.ones((2, 3, 1)),)
    if isinstance(module, nn.RNNCellBase):
        arguments = (jnp.zeros((2, 4)),) * 2, jnp.ones((2, 1))
    options = {} if kind in (LSTM, LNLSTM, LSTMCell) else {"use_running_average": True}
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value!r}"):
        module.init(jax.random.key(0), *arguments, **options)


@pytest.mark.parametrize("zero", [0, np.int64(0), np.zeros((), np.int32), jnp.array(0)])
def test_training_accepts_only_zero_as_first_step(zero):
    layer = BNLSTM(4)
    x = jnp.asarray(draw(3, 5, 2))
    variables = initialize(layer, x)
    assert_equal(
        layer.apply(variables, x, first_step=zero, **TRAINING),
        layer.apply(variables, x, **TRAINING),
    )
    with pytest.raises(ValueError, match="first_step"):
        layer.apply(variables, x, first_step=zero + 1, **TRAINING)


def test_invalid_arguments_raise():
    layer = BNLSTM(4)
    x = jnp.asarray(draw(3, 5, 2))
    variables = initialize(layer, x)
    with pytest.raises(ValueError, match="first_step: expected at least 0, got -1"):
        layer.apply(variables, x, first_step=-1, use_running_average=True)
    for wrong in (jnp.arange(5), 1.9, -1.0, np.float32(2)):
        with pytest.raises(ValueError, match="first_step: expected an integer, got"):
            layer.apply(variables, x, first_step=wrong, use_running_average=True)
    for carry in ((jnp.zeros((3, 4)),) * 3, (jnp.zeros((2, 4)),) * 2, [jnp.zeros(4)] * 2):
        with pytest.raises(ValueError, match=r"initial_carry: expected .* each \[3, 4\]"):
            layer.apply(variables, x, initial_carry=carry, use_running_average=True)
    with pytest.raises(ValueError, match="max_steps: expected a number"):
        initialize(layer, x[:, :0])
    with pytest.raises(ValueError, match=r"max_steps=7, .* batch_stats/\w+_mean of .* \[7, "):
        BNLSTM(4, max_steps=7).apply(variables, x, use_running_average=True)
    for fields in ({"shared_statistics": True}, {"input_statistics": "sequence"}):
        with pytest.raises(ValueError, match=r"expected batch_stats/input_mean .* got \[5, 16\]"):
            BNLSTM(4, **fields).apply(variables, x, use_running_average=True)
    with pytest.raises(ValueError, match=r"BNLSTM: expected inputs .*, got float32\[3, 5\](?!;)"):
        layer.apply(variables, x[..., 0], use_running_average=True)


@pytest.mark.parametrize("kind", [LSTMCell, BNSimpleCell])
def test_noise_without_a_key_raises(kind):
    with pytest.raises(ValueError, match="rng: expected a key"):
        kind(4, initial_hidden_noise=0.1).initialize_carry(None, (3, 2))


@pytest.mark.parametrize("options", [TRAINING, {"use_running_average": True}],
                         ids=["training", "inference"])  # fmt: skip
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_initial_hidden_noise_is_drawn_from_init_key(kind, options):
    layer = kind(3, initial_hidden_noise=0.3, initial_hidden_init=nn.initializers.normal(0.5))
    x, key = jnp.asarray(draw(4, 5, 2)), jax.random.key(5)
    variables = initialize(layer, x)
    c, h = (
        jnp.broadcast_to(variables["params"][f"initial_{name}"], (4, 3))
        for name in ("cell", "hidden")
    )
    carry = c, h + 0.3 * jax.random.normal(key, h.shape)
    assert_equal(
        layer.apply(variables, x, init_key=key, **options),
        layer.apply(variables, x, initial_carry=carry, **options),
    )


def test_cell_noise_is_constant_without_init_key():
    rnn = nn.RNN(LSTMCell(3, initial_hidden_noise=0.3))
    x = jnp.asarray(draw(4, 5, 2))
    variables = rnn.init(jax.random.key(0), x)
    first, second = (rnn.apply(variables, x) for _ in range(2))
    assert_equal(first, second)
    with_key = rnn.apply(variables, x, init_key=jax.random.key(5))
    assert np.abs(with_key - first).max() > 0.01


@pytest.mark.parametrize("vocab_size", [None, 7])
@pytest.mark.parametrize("kind", [LSTM, BNLSTM])
def test_float64_variables_of_a_float32_layer_widen_the_outputs(kind, vocab_size):
    x = draw(4, 5, 3) if vocab_size is None else np.arange(20).reshape(4, 5) % 7
    options = {"vocab_size": vocab_size}
    variables = initialize(kind(3, **options), jnp.asarray(x))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    arguments = {"use_running_average": True}
    expected = kind(3, **options).apply(variables, jnp.asarray(x), **arguments)
    # Without x64, JAX takes NumPy's float64 as float32, so that all kernels support it.
    assert_equal(kind(3, **options).apply(wide, jnp.asarray(x), **arguments), expected)
    with jax.enable_x64(True):
        got = kind(3, **options).apply(wide, jnp.asarray(x, x.dtype), **arguments)
        double = kind(3, param_dtype=jnp.float64, **options).apply(wide, x, **arguments)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, double, rtol=1e-12)


PARTITIONED = {kind.__name__: kind for kind in (LSTM, BNLSTM, LNLSTM, LSTMCell, BNLSTMCell,
                                                LNLSTMCell, BNSimpleCell)}  # fmt: skip


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", PARTITIONED.values(), ids=PARTITIONED.keys())
def test_partitioned_initialisers_keep_values_and_specs(kind, param_dtype):
    """Flax's sharding annotations stay with the parameters and do not change their values."""
    initialiser = nn.initializers.lecun_normal()
    x, options = jnp.asarray(draw(3, 5, 2)), {}
    if kind.__name__.startswith("BN"):
        options = {"use_running_average": True}
    arguments = (x,)
    if issubclass(kind, nn.RNNCellBase):
        carry = kind(4, param_dtype=param_dtype).initialize_carry(jax.random.key(0), (3, 2))
        arguments = carry, x[:, 0]
    plain, partitioned = (
        kind(4, input_kernel_init=each, param_dtype=param_dtype)
        for each in (initialiser, nn.with_partitioning(initialiser, (None, "model")))
    )
    variables = partitioned.init(jax.random.key(0), *arguments, **options)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["input_kernel"] == jax.sharding.PartitionSpec(None, "model")
    expected = plain.init(jax.random.key(0), *arguments, **options)
    assert_equal(nn.unbox(variables), expected)
    assert nn.unbox(variables)["params"]["input_kernel"].dtype == param_dtype
    assert_equal(
        partitioned.apply(variables, *arguments, **options),
        plain.apply(expected, *arguments, **options),
    )


@pytest.mark.parametrize("kind", PARTITIONED.values(), ids=PARTITIONED.keys())
def test_each_initialiser_sets_the_matching_parameter(kind):
    names = [f.name for f in dataclasses.fields(kind) if f.name.endswith("_init")]
    numbers = dict(zip(names, range(2, 2 + len(names)), strict=True))
    module = kind(4, **{name: nn.initializers.constant(n) for name, n in numbers.items()})
    x = jnp.asarray(draw(3, 5, 2))
    arguments = (x,)
    if issubclass(kind, nn.RNNCellBase):
        arguments = kind(4).initialize_carry(jax.random.key(0), (3, 2)), x[:, 0]
    options = {"use_running_average": True} if kind.__name__.startswith("BN") else {}
    params = module.init(jax.random.key(0), *arguments, **options)["params"]
    for name, number in numbers.items():
        own = name.removesuffix("_init")
        names = [key for key in params if key.endswith("_scale")] if own == "scale" else [own]
        found = [params[key] for key in names]
        assert found and all(np.all(leaf == number) for leaf in found), name


@pytest.mark.parametrize("kind", [BNLSTM, LNLSTM, BNLSTMCell, LNLSTMCell, BNSimpleCell])
def test_epsilon_changes_the_outputs(kind):
    options = TRAINING if kind.__name__.startswith("BN") else {}
    x = jnp.asarray(draw(3, 5, 2))
    small, large = (kind(4, epsilon=epsilon) for epsilon in (1e-5, 0.5))
    arguments = (x,)
    if issubclass(kind, nn.RNNCellBase):
        carry = jax.tree.map(lambda c: c + draw(3, 4), small.initialize_carry(None, (3, 2)))
        arguments = carry, x[:, 0]
    inference = {"use_running_average": True} if options else {}
    variables = small.init(jax.random.key(0), *arguments, **inference)
    outputs = [each.apply(variables, *arguments, **options) for each in (small, large)]
    first, second = (jax.tree.leaves(found)[0] for found in outputs)
    assert np.abs(first - second).max() > 1e-3


def test_bnlstm_cell_without_normalised_terms_equals_lstm_cell():
    cell = nn.RNN(BNLSTMCell(4, normalize=()))
    x = jnp.asarray(draw(3, 5, 2))
    variables = cell.init(jax.random.key(0), x)
    expected = nn.RNN(LSTMCell(4)).apply(variables, x)
    np.testing.assert_array_equal(cell.apply(variables, x), expected)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_kernels_support_axis_name_only_in_inference(implementation):
    layer = BNLSTM(4, axis_name="batch", implementation=implementation)
    x = jnp.asarray(draw(3, 2, 2))
    variables = initialize(BNLSTM(4), x)
    with emulation():
        outputs = layer.apply(variables, x, use_running_average=True)
        with pytest.raises(ValueError, match=r"axis_name.*'xla'"):
            jax.vmap(lambda x: layer.apply(variables, x, **TRAINING), axis_name="batch")(x[None])
    expected = BNLSTM(4).apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


# ---- JAX's strict modes, export, tabulate.

STRICT = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "leaks": jax.checking_leaks,
}


@pytest.mark.parametrize("mode", STRICT.values(), ids=STRICT.keys())
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_layers_run_in_strict_jax_modes(kind, implementation, mode):
    x = jnp.asarray(draw(3, 5, 2))
    with mode():
        layer = kind(4, implementation=implementation)
        variables = initialize(layer, x)
        y, _, gradients = training_results(layer, variables, x, seq_lengths=jnp.array(LENGTHS))
        inferred = layer.apply(variables, x, use_running_average=True)
    assert y.shape == inferred.shape == (3, 5, 4)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, variables["params"])


@pytest.mark.parametrize("mode", ["rank promotion", "dtype promotion"])
@pytest.mark.parametrize("implementation", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("vocab_size", [None, 6])
def test_kernels_run_in_strict_jax_modes(implementation, vocab_size, mode):
    x = draw(3, 5, 2) if vocab_size is None else np.random.default_rng(0).integers(0, 6, (3, 5))
    with emulation(), STRICT[mode]():
        layer = BNLSTM(4, vocab_size=vocab_size, implementation=implementation)
        variables = initialize(layer, x)
        y, _, gradients = training_results(
            layer, variables, jnp.asarray(x), seq_lengths=jnp.array(LENGTHS)
        )
    assert y.shape == (3, 5, 4) and gradients["recurrent_kernel"].shape == (4, 16)


@pytest.mark.parametrize("statistics", ["per_step", "sequence"])
@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_gpu_and_tpu_gradients_of_running_statistics_are_zero(implementation, statistics):
    x = jnp.asarray(draw(3, 5, 2))
    with emulation():
        layer = BNLSTM(4, input_statistics=statistics, implementation=implementation)
        variables = initialize(layer, x)

        def loss(statistics):
            y = layer.apply({**variables, "batch_stats": statistics}, x, use_running_average=True)
            return jnp.sum(y)

        gradients = jax.jit(jax.grad(loss))(variables["batch_stats"])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("implementation", ["xla", "cpu", "gpu", "tpu"])
@pytest.mark.parametrize("vocab_size", [256, 1000])
def test_uint8_symbols_match_int32_symbols(implementation, vocab_size):
    with emulation():
        layer = LSTM(4, vocab_size=vocab_size, implementation=implementation)
        symbols = jnp.array([[1, 255], [250, 0]])
        variables = initialize(layer, symbols)
        wide, narrow = (layer.apply(variables, symbols.astype(d)) for d in (jnp.int32, jnp.uint8))
    assert np.all(np.isfinite(wide))
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("implementation", ["xla", "cpu", "tpu"])  # gpu computes only in float32
def test_int64_symbols_do_not_wrap_around(implementation):
    with jax.enable_x64(True), emulation():
        layer = LSTM(4, vocab_size=6, implementation=implementation)
        symbols = np.array([[1, 2], [1, 2**32]])
        variables = initialize(layer, symbols)
        y = layer.apply(variables, jnp.asarray(symbols))
    assert np.all(np.isfinite(y[0])) and np.all(np.isnan(y[1, 1]))


@pytest.mark.parametrize("mode", STRICT.values(), ids=STRICT.keys())
def test_cells_and_batch_norm_run_in_strict_jax_modes(mode):
    x = jnp.asarray(draw(3, 5, 2))
    cell = BNLSTMCell(4, use_running_average=False)
    with mode():
        rnn = nn.RNN(cell, variable_axes={"batch_stats": 0}, split_rngs={"params": False})
        for module in (rnn, BatchNorm(use_running_average=False), nn.RNN(LSTMCell(4))):
            y, _ = module.init_with_output(jax.random.key(0), x)
            assert y.shape[:2] == (3, 5)


@pytest.mark.parametrize("options", [{}, {"shared_statistics": True}, {"reverse": True}])
def test_statistics_stay_float32_with_float64_and_strict_promotion(options):
    x = jnp.asarray(draw(3, 5, 2))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        layer = BNLSTM(4, **options)
        variables = initialize(layer, x)
        lengths = jnp.array(LENGTHS, jnp.int32)
        mutable = ["batch_stats", CURRENT_BATCH_STATS]
        _, updated = layer.apply(variables, x, False, seq_lengths=lengths, mutable=mutable)
        layer.apply(variables, x, True, seq_lengths=lengths)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(updated["batch_stats"])}
    current = updated[CURRENT_BATCH_STATS].items()
    dtypes |= {leaf.dtype for name, leaf in current if not name.endswith("count")}
    assert dtypes == {jnp.dtype(jnp.float32)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cell", [LSTMCell(4), BNLSTMCell(4, use_running_average=False)])
def test_cells_accept_float64_numpy_arrays(cell):
    x = np.random.default_rng(0).normal(size=(3, 2))
    carry = tuple(np.zeros((3, 4)) for _ in range(2))
    (_, y), _ = cell.init_with_output(jax.random.key(0), carry, x)
    assert y.dtype == jnp.float32


@pytest.mark.parametrize("module", [BatchNorm(), BNLSTM(4)])
def test_remat_with_static_argument_preserves_results(module):
    x = jnp.asarray(draw(3, 5, 2))
    variables = module.init(jax.random.key(0), x, True)
    again = nn.remat(type(module), static_argnums=(2,))(**fields_of(module))
    for use_running_average in (False, True):
        wanted, got = (
            each.apply(variables, x, use_running_average, mutable=["batch_stats"])
            for each in (module, again)
        )
        assert_equal(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axes", ["b, t, 2", "3, t, 2"])
@pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS.keys())
def test_training_can_be_exported_with_symbolic_axes(kind, axes):
    layer = kind(4, max_steps=8) if kind is BNLSTM else kind(4)
    x = jnp.asarray(draw(3, 5, 2))
    variables = initialize(layer, x)

    def train(variables, x):
        return training_results(layer, variables, x)

    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(axes), jnp.float32)
    exported = jax.export.export(jax.jit(train))(variables, shape)
    assert_equal(exported.call(variables, x), train(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LSTM, BNLSTM])
def test_bfloat16_training_can_be_exported_by_reference(kind):
    layer = kind(4, dtype=jnp.bfloat16, implementation="reference")
    x = jnp.asarray(draw(3, 5, 2))
    variables = initialize(layer, x)
    train = jax.jit(functools.partial(training_results, layer))
    exported = jax.export.export(train)(variables, x)
    assert_equal(exported.call(variables, x), train(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module", [LSTM(4), BNLSTM(4, use_running_average=True), nn.RNN(LSTMCell(4))]
)
def test_tabulate_reports_flops(module):
    assert "flops" in module.tabulate(jax.random.key(0), jnp.ones((2, 5, 3)), compute_flops=True)


@pytest.mark.parametrize("cell", [LSTMCell, BNLSTMCell, LNLSTMCell, BNSimpleCell])
def test_tabulate_omits_helper_methods_of_cells(cell):
    options = {"use_running_average": True} if "BN" in cell.__name__ else {}
    rnn = nn.RNN(cell(4, **options), variable_axes={"batch_stats": 0})
    table = rnn.tabulate(jax.random.key(0), jnp.ones((2, 5, 3)), console_kwargs={"width": 300})
    assert cell.__name__ in table
    assert "initialize_carry" not in table and "_param" not in table


# ---- Derivatives.


def gradient_of(layer, variables, x, lengths=None):
    """The gradient of a loss by the parameters, as a function of them."""

    def loss(params):
        y = layer.apply({**variables, "params": params}, x, seq_lengths=lengths, **TRAINING)[0]
        return jnp.sum(y**3)

    return jax.grad(loss)


def sum_of(gradient):
    return lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient(params)))


def random_direction(params):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), params)


def assert_forward_over_reverse(gradient, params):
    """Compares the derivative of a gradient in a random direction with finite differences."""
    direction, step = random_direction(params), 1e-6
    _, found = jax.jvp(gradient, (params,), (direction,))
    plus, minus = (
        gradient(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction))
        for sign in (1, -1)
    )
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), plus, minus)
    # Errors: step^2 times third derivatives, which are large, and rounding / step.
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert_equal(found, expected, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("lengths", [None, (4, 2, 3, 4, 1)])
@pytest.mark.parametrize("statistics", ["per_step", "sequence"])
def test_reference_supports_forward_over_reverse_differentiation(lengths, statistics):
    with jax.enable_x64(True):
        layer = BNLSTM(
            3, implementation="reference", input_statistics=statistics, param_dtype=jnp.float64
        )
        x = jnp.asarray(draw(5, 4, 3), jnp.float64)
        variables = initialize(layer, x)
        gradient = gradient_of(layer, variables, x, lengths)
        assert_forward_over_reverse(gradient, variables["params"])


def test_xla_batch_norm_raises_on_forward_mode_and_second_derivatives():
    layer = BNLSTM(3, implementation="xla")
    x = jnp.asarray(draw(5, 4, 3))
    variables = initialize(layer, x)
    params = variables["params"]
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(
            lambda p: layer.apply({**variables, "params": p}, x, **TRAINING)[0],
            (params,),
            (random_direction(params),),
        )
    with pytest.raises(NotImplementedError, match="second derivatives of batch normalisation"):
        jax.grad(sum_of(gradient_of(layer, variables, x)))(params)


@pytest.mark.parametrize("implementation", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("kind", [LSTM, BNLSTM])
def test_kernels_raise_on_second_derivatives(kind, implementation):
    with emulation():
        layer = kind(3, implementation=implementation)
        x = jnp.asarray(draw(5, 4, 3))
        variables = initialize(layer, x)
        gradient = gradient_of(layer, variables, x)
        with pytest.raises(NotImplementedError, match=f"of implementation '{implementation}' are"):
            jax.grad(sum_of(gradient))(variables["params"])


@pytest.mark.parametrize("kind", [LSTM, LNLSTM])
def test_xla_second_derivatives_match_reference_without_batch_statistics(kind):
    x = jnp.asarray(draw(5, 4, 3))
    variables = initialize(kind(3), x)
    found, expected = (
        jax.grad(sum_of(gradient_of(kind(3, implementation=name), variables, x)))(
            variables["params"]
        )
        for name in ("xla", "reference")
    )
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert scale > 0.1
    assert_equal(found, expected, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", [LSTMCell, BNLSTMCell, LNLSTMCell, BNSimpleCell])
def test_cells_support_forward_over_reverse_differentiation(kind):
    fields = {"use_running_average": False} if kind in (BNLSTMCell, BNSimpleCell) else {}
    with jax.enable_x64(True):
        cell = kind(3, param_dtype=jnp.float64, **fields)
        rnn = nn.RNN(cell, variable_axes={"batch_stats": 0}, split_rngs={"params": False})
        x = jnp.asarray(draw(5, 4, 2), jnp.float64)
        variables = rnn.init(jax.random.key(0), x)

        def loss(params):
            y, _ = rnn.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(y**3)

        assert_forward_over_reverse(jax.grad(loss), variables["params"])


@pytest.mark.parametrize("implementation", ["xla", "reference", "cpu", "gpu", "tpu"])
def test_updated_statistics_have_no_gradient(implementation):
    with emulation():
        layer = BNLSTM(3, implementation=implementation)
        x = jnp.asarray(draw(5, 4, 2))
        variables = initialize(layer, x)

        def total(params, x):
            _, updated = layer.apply({**variables, "params": params}, x, **TRAINING)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updated))

        gradients = jax.jit(jax.grad(total, (0, 1)))(variables["params"], x)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))
