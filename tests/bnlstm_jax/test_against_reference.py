"""The layer against the NumPy loop of tests/reference.py.

Outputs, final states, statistics and all gradients are compared in double precision, so that a
wrong formula cannot hide behind rounding; single precision and bfloat16 have tests of their own.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnlstm_jax
from tests import reference
from tests.reference import TERMS

# Double precision: one normalisation multiplies a rounding error (1e-16) by at most
# 1 / sqrt(epsilon) = 316, and a handful of steps follow each other.
VALUES = dict(rtol=1e-9, atol=1e-10)
# Central differences: rounding gives about 1e-15 * 10 / 1e-6 = 1e-8, and up to 316 times that at
# the first step, where equal rows are normalised. The truncation error is h^2 / 6 times third
# derivatives, which stay below 1e6 where variances are not small.
GRADIENTS = dict(rtol=1e-6, atol=2e-6)
# Single precision: 316 * 6e-8 = 2e-5 where the variance vanishes, much less elsewhere.
SINGLE = dict(rtol=2e-5, atol=2e-5)

SUBSETS = [tuple(t for k, t in enumerate(TERMS) if bits >> k & 1) for bits in range(8)]


@pytest.fixture(autouse=True)
def full_precision_products():
    with jax.default_matmul_precision("float32"):
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 5
    time: int = 4
    inputs: int = 3
    features: int = 2
    max_steps: int | None = None  # None for `time`
    lengths: tuple[int, ...] | None = None
    train: bool = True
    carry: bool = False  # initial states are given, one for each row
    plain: bool = False  # LSTM in place of BNLSTM
    normalize: tuple[str, ...] = TERMS
    input_statistics: str = "per_step"
    mask_statistics: bool = True
    reverse: bool = False
    keep_order: bool = False
    momentum: float = 0.9

    @property
    def terms(self):
        return () if self.plain else self.normalize

    @property
    def rows(self):
        return self.max_steps or self.time

    @property
    def usual_shapes(self):
        return (self.batch, self.time, self.inputs, self.features) == (5, 4, 3, 2)

    def layer(self, **options):
        options = {"param_dtype": jnp.float64, "return_carry": True, **options}
        options = {"reverse": self.reverse, "keep_order": self.keep_order, **options}
        if self.plain:
            return bnlstm_jax.LSTM(self.features, **options)
        return bnlstm_jax.BNLSTM(
            self.features,
            max_steps=self.rows,
            normalize=self.normalize,
            input_statistics=self.input_statistics,
            mask_statistics=self.mask_statistics,
            momentum=self.momentum,
            **options,
        )

    def shapes(self):
        """The expected shapes of the layer's parameters and statistics."""
        d, h = self.inputs, self.features
        params = {
            "input_kernel": (d, 4 * h),
            "recurrent_kernel": (h, 4 * h),
            "bias": (4 * h,),
            "cell_bias": (h,),
            "initial_hidden": (h,),
            "initial_cell": (h,),
        }
        width = {"input": 4 * h, "recurrent": 4 * h, "cell": h}
        params |= {f"{term}_scale": (width[term],) for term in self.terms}
        stats = {}
        for term in self.terms:
            whole = term == "input" and self.input_statistics == "sequence"
            for kind in ("mean", "var"):
                stats[f"{term}_{kind}"] = (width[term],) if whole else (self.rows, width[term])
        return params, stats

    def draw(self, seed=0):
        """Random float64 arrays: parameters, inputs and any carry; statistics; output weights."""
        rng = np.random.default_rng(seed)
        params, stats = self.shapes()
        values = {name: 0.7 * rng.normal(size=shape) for name, shape in params.items()}
        for term in self.terms:
            scale = values[f"{term}_scale"]
            scale[...] = rng.uniform(0.5, 1.5, scale.shape)
        values["inputs"] = rng.normal(size=(self.batch, self.time, self.inputs))
        if self.carry:
            values["c"], values["h"] = 0.7 * rng.normal(size=(2, self.batch, self.features))
        stats = {
            name: rng.uniform(0.5, 2.0, shape) if name.endswith("var") else rng.normal(size=shape)
            for name, shape in stats.items()
        }
        weights = {
            "outputs": rng.normal(size=(self.batch, self.time, self.features)),
            "c": rng.normal(size=(self.batch, self.features)),
            "h": rng.normal(size=(self.batch, self.features)),
        }
        return values, stats, weights


def split_values(values):
    """Parameters, inputs and initial states (or None) from the dict that holds them all."""
    params = dict(values)
    inputs = params.pop("inputs")
    carry = (params.pop("c"), params.pop("h")) if "c" in params else None
    return params, inputs, carry


def functional(weights, outputs, carry):
    total = (weights["outputs"] * outputs).sum()
    return total + (weights["c"] * carry[0]).sum() + (weights["h"] * carry[1]).sum()


def run_reference(case, values, stats, lengths=None, **options):
    params, inputs, carry = split_values(values)
    return reference.bn_lstm(
        params,
        inputs,
        normalize=case.terms,
        statistics=None if case.train else stats,
        seq_lengths=case.lengths if lengths is None else lengths,
        input_statistics=case.input_statistics,
        mask_statistics=case.mask_statistics,
        initial_carry=carry,
        reverse=case.reverse,
        keep_order=case.keep_order,
        **options,
    )


@functools.cache
def differentiated(layer, train):
    """Value and gradient of the functional, and all that the layer returns."""

    def value(values, stats, weights, lengths):
        params, inputs, carry = split_values(values)
        options = {} if train is None else {"use_running_average": not train}
        (carry, outputs), updates = layer.apply(
            {"params": params, "batch_stats": stats},
            inputs,
            initial_carry=carry,
            seq_lengths=lengths,
            mutable=["batch_stats"],
            **options,
        )
        return functional(weights, outputs, carry), (outputs, carry, updates)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def run_library(case, values, stats, weights, lengths=None, **options):
    lengths = case.lengths if lengths is None else lengths
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    values, stats, weights = jax.tree.map(jnp.asarray, (values, stats, weights))
    function = differentiated(case.layer(**options), None if case.plain else case.train)
    (_, (outputs, carry, updates)), gradients = function(values, stats, weights, lengths)
    return outputs, carry, updates.get("batch_stats", {}), gradients


def assert_trees_close(found, expected, **tolerance):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerance)


def assert_forward_equal(case, values, stats, got, lengths=None, **tolerance):
    outputs, carry, updates = got
    expected, expected_carry, found = run_reference(case, values, stats, lengths)
    np.testing.assert_allclose(outputs, expected, **tolerance)
    np.testing.assert_allclose(carry[0], expected_carry[0], err_msg="c", **tolerance)
    np.testing.assert_allclose(carry[1], expected_carry[1], err_msg="h", **tolerance)
    after = reference.running_average(stats, found, case.momentum) if case.train else stats
    assert_trees_close(updates, after, **tolerance)


def expected_gradients(case, values, stats, weights):
    def value(values):
        outputs, carry, _ = run_reference(case, values, stats)
        return functional(weights, outputs, carry)

    return reference.finite_differences(value, values)


def check(case, change=None):
    """Everything that the layer returns, and all gradients, against the reference."""
    values, stats, weights = case.draw()
    if change is not None:
        change(values)
    # Most cases have the same shapes: without jit, they share nearly all compiled operations.
    eager = jax.disable_jit(case.usual_shapes)
    with jax.enable_x64(True), eager:
        *got, gradients = run_library(case, values, stats, weights)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((got, gradients)))
        assert_forward_equal(case, values, stats, got, **VALUES)
    expected = expected_gradients(case, values, stats, weights)
    assert_trees_close(gradients, expected, **GRADIENTS)


# Rows of length one, a last step with one valid row, and rows that are never padded.
RAGGED = (4, 1, 3, 2, 1)
# A step with two valid rows, one with one, one with none at all.
SPARSE = (3, 1, 2, 1, 1)
# A row without any valid step, with given initial states.
IDLE = dict(lengths=(2, 1, 0, 2, 1), carry=True)

CASES = {
    "training": Case(),
    "training, given carry": Case(carry=True),
    "training, fewer steps than max_steps": Case(max_steps=6),
    "training, beyond max_steps": Case(max_steps=2),
    "masks, beyond max_steps": Case(max_steps=2, lengths=SPARSE),
    "sequence, beyond max_steps": Case(max_steps=1, lengths=RAGGED, input_statistics="sequence"),
    "training, one step": Case(time=1, carry=True),
    "training, two rows": Case(batch=2),
    "training, odd sizes": Case(batch=7, time=5, inputs=1, features=3, lengths=(*RAGGED, 5, 2)),
    "inference": Case(train=False),
    "inference, given carry": Case(train=False, carry=True),
    "inference, fewer steps than max_steps": Case(train=False, max_steps=6),
    "inference, one row, beyond max_steps": Case(train=False, batch=1, time=7, max_steps=3),
    "inference, beyond max_steps = 1": Case(train=False, max_steps=1),
    "masks": Case(lengths=RAGGED),
    "masks, given carry": Case(lengths=RAGGED, carry=True),
    "masks, steps without valid rows": Case(lengths=SPARSE),
    "masks, row without valid steps": Case(**IDLE),
    "masks, inference": Case(train=False, lengths=RAGGED),
    "masks, inference, beyond max_steps": Case(train=False, max_steps=2, lengths=(4, 1, 0, 2, 1)),
    "masks, not recurrent, row without valid steps": Case(
        lengths=(2, 1, 0, 2, 1), normalize=("input", "cell")
    ),
    "all rows counted": Case(lengths=RAGGED, mask_statistics=False),
    "all rows counted, steps without valid rows": Case(lengths=SPARSE, mask_statistics=False),
    "all rows counted, row without valid steps": Case(**IDLE, mask_statistics=False),
    "reverse": Case(reverse=True),
    "reverse, keep_order": Case(reverse=True, keep_order=True),
    "reverse, masks": Case(reverse=True, lengths=RAGGED),
    "reverse, masks, keep_order": Case(reverse=True, lengths=RAGGED, keep_order=True),
    "reverse, row without valid steps, keep_order": Case(**IDLE, reverse=True, keep_order=True),
    "reverse, all rows counted": Case(
        reverse=True, lengths=RAGGED, mask_statistics=False, keep_order=True
    ),
    "reverse, masks, inference, beyond max_steps": Case(
        train=False, reverse=True, keep_order=True, max_steps=2, lengths=RAGGED
    ),
    "sequence": Case(input_statistics="sequence"),
    "sequence, masks": Case(input_statistics="sequence", lengths=RAGGED),
    "sequence, steps without valid rows": Case(input_statistics="sequence", lengths=SPARSE),
    "sequence, row without valid steps": Case(input_statistics="sequence", **IDLE),
    "sequence, all positions counted": Case(
        input_statistics="sequence", lengths=RAGGED, mask_statistics=False
    ),
    "sequence, reverse, masks": Case(
        input_statistics="sequence", lengths=RAGGED, reverse=True, keep_order=True
    ),
    "sequence, inference, beyond max_steps": Case(
        input_statistics="sequence", train=False, max_steps=2, lengths=RAGGED
    ),
    "no valid row at all": Case(lengths=(0, 0, 0, 0, 0), carry=True),
    "sequence, no valid row at all": Case(
        input_statistics="sequence", lengths=(0, 0, 0, 0, 0), carry=True
    ),
    "LSTM": Case(plain=True),
    "LSTM, given carry": Case(plain=True, carry=True),
    "LSTM, masks": Case(plain=True, lengths=(2, 1, 0, 2, 1)),
    "LSTM, reverse, masks": Case(plain=True, reverse=True, lengths=RAGGED, carry=True),
    "LSTM, reverse, masks, keep_order": Case(
        plain=True, reverse=True, keep_order=True, lengths=RAGGED
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layer_matches_the_reference(case):
    check(case)


@pytest.mark.parametrize("normalize", SUBSETS, ids=lambda terms: "+".join(terms) or "none")
def test_each_subset_of_terms_matches_the_reference(normalize):
    check(Case(normalize=normalize, lengths=RAGGED))


@pytest.mark.parametrize("normalize", SUBSETS, ids=lambda terms: "+".join(terms) or "none")
@pytest.mark.parametrize("input_statistics", ["per_step", "sequence"])
def test_variables_have_expected_names_and_shapes(normalize, input_statistics):
    case = Case(normalize=normalize, input_statistics=input_statistics, max_steps=6)
    params, stats = case.shapes()
    layer = case.layer(param_dtype=jnp.float32)
    init = functools.partial(layer.init, use_running_average=True)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 3, 3)))
    assert {name: leaf.shape for name, leaf in variables["params"].items()} == params
    found = variables.get("batch_stats", {})
    assert {name: leaf.shape for name, leaf in found.items()} == stats


def test_initial_statistics_have_zero_mean_and_unit_variance():
    layer = Case().layer(param_dtype=jnp.float32)
    inputs = jnp.ones((5, 4, 3))  # initialising must not count as a batch
    found = layer.init(jax.random.key(0), inputs, use_running_average=False)["batch_stats"]
    assert set(found) == set(Case().shapes()[1])
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, 1.0 if name.endswith("var") else 0.0)


def test_lstm_has_the_bnlstm_parameters_without_scales():
    case = Case(plain=True)
    layer = case.layer(param_dtype=jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 3, 3)))
    assert set(variables) == {"params"}
    shapes = {name: leaf.shape for name, leaf in variables["params"].items()}
    assert shapes == case.shapes()[0]


@pytest.mark.parametrize(
    "case",
    [
        Case(momentum=0.0, max_steps=6),
        Case(momentum=0.0, lengths=SPARSE),
        Case(momentum=0.0, lengths=SPARSE, mask_statistics=False),
        Case(momentum=0.0, input_statistics="sequence", lengths=RAGGED),
    ],
    ids=["plain", "masks", "all rows counted", "sequence"],
)
def test_zero_momentum_stores_the_batch_statistics(case):
    values, stats, weights = case.draw()
    with jax.enable_x64(True), jax.disable_jit():
        _, _, updates, _ = run_library(case, values, stats, weights)
    _, _, found = run_reference(case, values, stats)
    assert_trees_close(updates, reference.running_average(stats, found, 0.0), **VALUES)
    if not case.mask_statistics or case.lengths is None:
        for name, new in found.items():  # no step without rows here
            np.testing.assert_allclose(updates[name][: len(new)], new, err_msg=name, **VALUES)


@pytest.mark.parametrize("options", [{}, {"input_statistics": "sequence"}], ids=["step", "whole"])
def test_arbitrary_lengths_match_the_reference(options):
    case = Case(batch=4, **options)
    values, stats, weights = case.draw(1)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, case.time), min_size=case.batch, max_size=case.batch))
    def equals_the_reference(lengths):
        *got, gradients = run_library(case, values, stats, weights, lengths)
        assert_forward_equal(case, values, stats, got, lengths, **VALUES)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))

    with jax.enable_x64(True):
        equals_the_reference()


def test_training_beyond_inferred_max_steps_raises():
    layer = bnlstm_jax.BNLSTM(2)
    inputs = jnp.ones((5, 4, 3))
    variables = layer.init(jax.random.key(0), inputs[:, :3], use_running_average=True)
    with pytest.raises(ValueError, match=r"max_steps.* 3 time steps.* got 4"):
        layer.apply(variables, inputs, use_running_average=False, mutable=["batch_stats"])
    layer.apply(variables, inputs, use_running_average=True)  # inference goes on


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_layer_accepts_numpy_arrays(train):
    """As in a restored checkpoint."""
    case = Case(train=train, lengths=RAGGED)
    values, stats, _ = jax.tree.map(np.float32, case.draw())
    params, inputs, _ = split_values(values)
    (_, outputs), _ = case.layer(param_dtype=jnp.float32).apply(
        {"params": params, "batch_stats": stats},
        inputs,
        seq_lengths=np.asarray(RAGGED),
        use_running_average=not train,
        mutable=["batch_stats"],
    )
    np.testing.assert_allclose(outputs, run_reference(case, values, stats)[0], **SINGLE)


# Degenerate statistics


CONSTANT = {"per step": {}, "sequence": {"input_statistics": "sequence"}}


@pytest.mark.parametrize("options", CONSTANT.values(), ids=CONSTANT.keys())
def test_columns_with_zero_variance_match_the_reference(options):
    """One input is constant; a column of the input term and one of the recurrent term are zero."""

    def change(values):
        values["inputs"][:, :, 1] = 3.0
        values["input_kernel"][:, 4] = 0.0
        values["recurrent_kernel"][:, 1] = 0.0

    check(Case(lengths=RAGGED, **options), change)


@pytest.mark.parametrize("options", CONSTANT.values(), ids=CONSTANT.keys())
def test_identical_rows_match_the_reference_with_finite_gradients(options):
    """The same input in all rows: every term of every step has variance zero.

    The derivative of N is 316 there, three times a time step, so no change is small enough for
    finite differences. Of gradients, the test only checks that they are finite.
    """
    case = Case(**options)
    values, stats, weights = case.draw()
    values["inputs"][...] = 3.0
    with jax.enable_x64(True), jax.disable_jit():
        *got, gradients = run_library(case, values, stats, weights)
        # A rounding error of 1e-17 times 316^3.
        assert_forward_equal(case, values, stats, got, rtol=1e-7, atol=1e-8)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "options",
    [{}, {"lengths": (4, 4, 4, 4)}, {"input_statistics": "sequence"}],
    ids=["per step", "masks", "sequence"],
)
def test_float32_variance_is_accurate_far_from_zero(options):
    """Values near 8192 that differ in the sixth digit: E[x^2] - E[x]^2 would lose them.

    The kernel is the identity, and inputs are multiples of 2^-6, which are exact in single
    precision up to 2^18: products, sums over all the sixteen positions and means are exact. Only
    the variance can lose digits, so the tolerance is that of a well-conditioned case.
    """
    case = Case(batch=4, inputs=12, features=3, momentum=0.0, **options)
    values, stats, _ = case.draw()
    steps = np.random.default_rng(3).integers(-1, 2, size=values["inputs"].shape)
    values["inputs"] = 8192.0 + steps / 64.0
    values["input_kernel"] = np.eye(12)

    single = values["inputs"].astype(np.float32)
    naive, true = (single**2).mean(0) - single.mean(0) ** 2, values["inputs"].var(0)
    assert 0.005 < np.sqrt(true.mean()) < 0.02
    assert np.abs(naive - true).max() > 0.5 * true.max()  # squares are spaced by 4 or 8

    layer = case.layer(param_dtype=jnp.float32, return_carry=False)
    lengths = None if case.lengths is None else jnp.asarray(case.lengths)
    apply = functools.partial(layer.apply, use_running_average=False, mutable=["batch_stats"])
    params, inputs, _ = split_values(jax.tree.map(jnp.float32, values))
    variables = {"params": params, "batch_stats": jax.tree.map(jnp.float32, stats)}
    outputs, updates = jax.jit(apply)(variables, inputs, seq_lengths=lengths)
    updates = updates["batch_stats"]
    expected, _, found = run_reference(case, values, stats)
    np.testing.assert_allclose(outputs, expected, **SINGLE)
    np.testing.assert_allclose(updates["input_mean"], found["input_mean"], rtol=1e-7)
    np.testing.assert_allclose(updates["input_var"], found["input_var"], rtol=1e-6)


# The first step


@pytest.mark.parametrize(
    "batch, features, options",
    [(7, 50, {}), (67, 17, {}), (5, 2, {"lengths": (1, 1, 1, 1, 0)})],
    ids=["7 rows", "67 rows", "masks"],
)
def test_first_step_ignores_the_recurrent_term_exactly(batch, features, options):
    """All rows start from the same state, so N(h_0 W_h) is exactly zero."""
    case = Case(batch=batch, time=1, features=features, **options)
    values, stats, _ = jax.tree.map(jnp.float32, case.draw())
    values["recurrent_kernel"] = 3.0 * values["recurrent_kernel"]
    layer = case.layer(param_dtype=jnp.float32)
    lengths = None if case.lengths is None else jnp.asarray(case.lengths)

    @jax.jit
    def first_outputs(values):
        params, inputs, _ = split_values(values)
        (_, outputs), _ = layer.apply(
            {"params": params, "batch_stats": stats},
            inputs,
            seq_lengths=lengths,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return outputs[: batch - 1]  # the last row may be one without valid steps

    outputs = first_outputs(values)
    changes = {
        "initial_hidden": jnp.full(features, 0.3),
        "recurrent_kernel": values["recurrent_kernel"][::-1],
        "recurrent_scale": 3.0 * values["recurrent_scale"],
    }
    for name, value in changes.items():
        np.testing.assert_array_equal(first_outputs({**values, name: value}), outputs)
    assert (first_outputs({**values, "bias": values["bias"] + 1e-3}) != outputs).any()


@pytest.mark.parametrize("lengths", [None, RAGGED])
def test_initial_hidden_gradient_is_exactly_zero_in_training(lengths):
    case = Case(lengths=lengths)
    values, _stats, weights = case.draw()

    def gradients(**changes):
        now = dataclasses.replace(case, **changes)
        _, stats, _ = now.draw()
        kept = {name: values[name] for name in now.draw()[0]}
        with jax.enable_x64(True), jax.disable_jit():
            return run_library(now, kept, stats, weights)[3]

    training = gradients()
    np.testing.assert_array_equal(training["initial_hidden"], 0.0)
    assert (np.asarray(training["initial_cell"]) != 0.0).all()
    for changes in ({"train": False}, {"normalize": ("input", "cell")}):
        assert (np.asarray(gradients(**changes)["initial_hidden"]) != 0.0).all()


# Precision


SINGLE_CASES = {
    "masks": Case(lengths=RAGGED, carry=True),
    "sequence": Case(lengths=SPARSE, input_statistics="sequence"),
    "LSTM": Case(plain=True, lengths=RAGGED),
}
COARSE_CASES = {
    "training": Case(lengths=RAGGED, carry=True),
    "inference": Case(train=False, max_steps=2),
    "LSTM": Case(plain=True, lengths=RAGGED),
}


@pytest.mark.parametrize("case", SINGLE_CASES.values(), ids=SINGLE_CASES.keys())
def test_float32_layer_matches_the_reference(case):
    values, stats, weights = case.draw()
    *got, gradients = run_library(case, values, stats, weights, param_dtype=jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((got, gradients)))
    assert_forward_equal(case, values, stats, got, **SINGLE)
    # Derivatives of the first step's recurrent term, which vanishes, have the factor 316 once more
    # than the values.
    expected = expected_gradients(case, values, stats, weights)
    assert_trees_close(gradients, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", COARSE_CASES.values(), ids=COARSE_CASES.keys())
def test_bfloat16_layer_matches_the_reference(case):
    """Only the factors of the products are rounded; the reference can round them too."""
    values, stats, weights = case.draw()
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    outputs, carry, updates, gradients = run_library(case, values, stats, weights, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves((carry, updates))} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype(np.float32)}
    assert outputs.dtype == jnp.bfloat16
    outputs = np.asarray(outputs, np.float64)

    # A factor off by up to 2^-9 = 0.002 gives a term of order one that is off by about as much;
    # normalisation divides by standard deviations of about 0.2 and more at these sizes.
    expected, expected_carry, found = run_reference(case, values, stats)
    np.testing.assert_allclose(outputs, expected, atol=0.05)
    np.testing.assert_allclose(carry, expected_carry, atol=0.05)
    if case.train:
        after = reference.running_average(stats, found, case.momentum)
        assert_trees_close(updates, after, rtol=0.02, atol=0.02)

    # With the same roundings in the reference, only single precision differs, as long as no state
    # is so close to a rounding boundary that the two round it to different sides.
    def rounded(x):
        return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)

    same, same_carry, _ = run_reference(case, values, stats, operand=rounded)
    assert np.abs(same - expected).max() > 1e-4  # the roundings are there
    np.testing.assert_allclose(carry, same_carry, **SINGLE)
    np.testing.assert_allclose(outputs, same, rtol=2.0**-8, atol=SINGLE["atol"])

    # Gradients have the roundings of both passes: a few per cent of each array's norm.
    for name, wanted in expected_gradients(case, values, stats, weights).items():
        error = np.linalg.norm(np.asarray(gradients[name], np.float64) - wanted)
        assert error <= 0.05 * np.linalg.norm(wanted) + 1e-3, name


# Options of the call


@pytest.mark.parametrize("plain", [False, True], ids=["BNLSTM", "LSTM"])
def test_call_arguments_override_the_fields(plain):
    case = Case(plain=plain, lengths=RAGGED)
    values, stats, _ = case.draw()
    params, inputs, _ = split_values(values)
    lengths = jnp.asarray(RAGGED)
    fixed = {} if plain else {"use_running_average": True}

    def apply(layer, inputs, **options):
        variables = jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})
        return layer.apply(variables, inputs, seq_lengths=lengths, **options)

    def expected(**options):
        now = dataclasses.replace(case, train=False, **options)
        return run_reference(now, values, stats)

    with jax.enable_x64(True), jax.disable_jit():
        base = case.layer(return_carry=False, **fixed)
        opposite = case.layer(reverse=True, keep_order=True, time_major=True, **fixed)
        if not plain:
            opposite = opposite.clone(use_running_average=None)
        outputs, carry, _ = expected()
        np.testing.assert_allclose(apply(base, inputs), outputs, **VALUES)
        call = {"reverse": False, "keep_order": False, "time_major": False, **fixed}
        got_carry, got = apply(opposite, inputs, **call)
        np.testing.assert_allclose(got, outputs, **VALUES)
        np.testing.assert_allclose(got_carry, carry, **VALUES)
        np.testing.assert_allclose(
            apply(opposite, inputs, return_carry=False, **call), outputs, **VALUES
        )
        outputs, carry, _ = expected(reverse=True, keep_order=True)
        by_time = np.swapaxes(inputs, 0, 1)
        call = {"reverse": True, "keep_order": True, "time_major": True, "return_carry": True}
        for got_carry, got in (apply(base, by_time, **call), apply(opposite, by_time, **fixed)):
            np.testing.assert_allclose(np.swapaxes(got, 0, 1), outputs, **VALUES)
            np.testing.assert_allclose(got_carry, carry, **VALUES)


# Statistics over several shards


SHARDED = {
    "given carry": Case(batch=6, carry=True),
    # The shards have unequal counts at every step, and the second none from the third step on.
    "masks": Case(batch=6, lengths=(4, 3, 4, 2, 1, 1)),
    "all rows counted": Case(batch=6, lengths=(4, 3, 4, 2, 1, 1), mask_statistics=False),
    "sequence": Case(batch=6, lengths=(4, 3, 4, 2, 1, 1), input_statistics="sequence"),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("case", SHARDED.values(), ids=SHARDED.keys())
def test_sharded_batch_matches_the_reference(case, implementation):
    values, stats, weights = case.draw()
    layer = case.layer(axis_name="batch", implementation=implementation)
    lengths = None if case.lengths is None else np.asarray(case.lengths, np.int32)
    rows = {name: value for name, value in values.items() if name in ("inputs", "c", "h")}
    rows["lengths"] = lengths
    rows["weights"] = weights
    rows = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), rows)
    lengths, weights_of_shards = rows.pop("lengths"), rows.pop("weights")
    params = {name: value for name, value in values.items() if name not in rows}

    def shard(params, rows, weights, lengths):
        _, inputs, carry = split_values(rows)
        (carry, outputs), updates = layer.apply(
            {"params": params, "batch_stats": stats},
            inputs,
            initial_carry=carry,
            seq_lengths=lengths,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return functional(weights, outputs, carry), (outputs, carry, updates["batch_stats"])

    def of_one_shard(params, rows, weights, lengths):
        gradients, _ = jax.grad(shard, argnums=(0, 1), has_aux=True)(params, rows, weights, lengths)
        return jax.lax.psum(gradients[0], "batch"), gradients[1]

    def gathered(params, rows):
        mapped = jax.vmap(shard, in_axes=(None, 0, 0, 0), axis_name="batch")
        return mapped(params, rows, weights_of_shards, lengths)

    with jax.enable_x64(True):
        _, (outputs, carry, updates) = jax.jit(gathered)(params, rows)
        for name, leaf in updates.items():  # the same on both shards
            np.testing.assert_array_equal(leaf[0], leaf[1], err_msg=name)
        updates = {name: leaf[0] for name, leaf in updates.items()}
        outputs, *carry = (np.concatenate(leaf) for leaf in (outputs, *carry))
        assert_forward_equal(case, values, stats, (outputs, carry, updates), **VALUES)

        # The usual order in data-parallel training: gradient on each shard, then the sum.
        inside = jax.vmap(of_one_shard, in_axes=(None, 0, 0, 0), axis_name="batch")
        summed, by_rows = jax.jit(inside)(params, rows, weights_of_shards, lengths)
        summed = {name: leaf[0] for name, leaf in summed.items()}
        by_rows = {name: np.concatenate(leaf) for name, leaf in by_rows.items()}
        expected = expected_gradients(case, values, stats, weights)
        assert_trees_close({**summed, **by_rows}, expected, **GRADIENTS)

        outside = jax.grad(lambda *args: gathered(*args)[0].sum(), argnums=(0, 1))
        if implementation == "xla":  # see `axis_name` of BNLSTM
            with pytest.raises(NameError, match="unbound axis name"):
                outside(params, rows)
        else:
            by_params, by_rows = jax.jit(outside)(params, rows)
            by_rows = {name: np.concatenate(leaf) for name, leaf in by_rows.items()}
            assert_trees_close({**by_params, **by_rows}, expected, **GRADIENTS)


# The reference itself


def test_reference_moments():
    values = np.array([[1.0, -2.0], [3.0, 2.0], [100.0, 100.0]])
    mean, var = reference.moments(values, np.array([True, True, False]))
    np.testing.assert_array_equal(mean, [2.0, 0.0])
    np.testing.assert_array_equal(var, [1.0, 4.0])
    assert np.isnan(reference.moments(values, np.zeros(3, bool))).all()


def test_reference_running_average():
    previous = {"cell_mean": np.array([[1.0], [2.0], [3.0]])}
    found = {"cell_mean": np.array([[5.0], [np.nan]])}
    updated = reference.running_average(previous, found, 0.75)
    np.testing.assert_array_equal(updated["cell_mean"], [[2.0], [2.0], [3.0]])
    np.testing.assert_array_equal(previous["cell_mean"], [[1.0], [2.0], [3.0]])


def test_reference_step_matches_hand_calculation():
    """Two rows, one unit: every normalised term is plus or minus one when epsilon is zero."""
    params = {
        "input_kernel": np.array([[1.0, 2.0, -1.0, 3.0]]),
        "recurrent_kernel": np.ones((1, 4)),
        "bias": np.array([0.1, 0.2, 0.3, 0.4]),
        "cell_bias": np.array([0.5]),
        "initial_hidden": np.array([7.0]),
        "initial_cell": np.array([2.0]),
        "input_scale": np.array([1.0, 2.0, 3.0, 4.0]),
        "recurrent_scale": np.ones(4),
        "cell_scale": np.array([0.6]),
    }
    # The hidden states differ here, so that the recurrent term is plus or minus one as well.
    carry = (np.array([[2.0], [2.0]]), np.array([[0.5], [-0.5]]))
    _, (c, h), found = reference.bn_lstm(
        params, np.array([[[4.0]], [[1.0]]]), initial_carry=carry, epsilon=0.0
    )
    logistic = [1 / (1 + np.exp(-a)) for a in (1 + 1 + 0.1, 1 + 2 + 0.2, 1 - 3 + 0.3)]
    above = logistic[0] * 2.0 + logistic[1] * np.tanh(1 + 4 + 0.4)
    np.testing.assert_allclose(c[0], above, rtol=1e-14)
    np.testing.assert_allclose(h[0], logistic[2] * np.tanh(0.6 + 0.5), rtol=1e-14)
    np.testing.assert_allclose(found["input_mean"], [[2.5, 5.0, -2.5, 7.5]])
    np.testing.assert_allclose(found["input_var"], [[2.25, 9.0, 2.25, 20.25]])


def test_reference_matches_flax_lstm():
    case = Case(plain=True, lengths=RAGGED, carry=True)
    values, _, _ = case.draw()
    values["cell_bias"][...] = 0.0  # flax has none
    params, inputs, carry = split_values(values)
    cell = {}
    for k, gate in enumerate("fiog"):
        block = slice(k * case.features, (k + 1) * case.features)
        cell["i" + gate] = {"kernel": params["input_kernel"][:, block]}
        cell["h" + gate] = {
            "kernel": params["recurrent_kernel"][:, block],
            "bias": params["bias"][block],
        }
    with jax.enable_x64(True):
        rnn = nn.RNN(nn.LSTMCell(case.features, param_dtype=jnp.float64), return_carry=True)
        for reverse in (False, True):
            flags = {"reverse": reverse, "keep_order": reverse}
            (c, h), outputs = rnn.apply(
                {"params": {"cell": cell}},
                inputs,
                initial_carry=carry,
                seq_lengths=jnp.asarray(RAGGED),
                **flags,
            )
            now = dataclasses.replace(case, **flags)
            expected, expected_carry, _ = run_reference(now, values, {})
            np.testing.assert_allclose(c, expected_carry[0], **VALUES)
            np.testing.assert_allclose(h, expected_carry[1], **VALUES)
            for b, n in enumerate(RAGGED):
                np.testing.assert_allclose(outputs[b, :n], expected[b, :n], **VALUES)


def test_reference_statistics_match_flax_batch_norm():
    case = Case(lengths=RAGGED, input_statistics="sequence")
    values, stats, _ = case.draw()
    projected = values["inputs"] @ values["input_kernel"]
    mask = np.arange(case.time) < np.array(RAGGED)[:, None]
    with jax.enable_x64(True):
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)
        before = {"mean": stats["input_mean"], "var": stats["input_var"]}
        params = {"scale": np.ones(8), "bias": np.zeros(8)}
        _, after = norm.apply(
            {"params": params, "batch_stats": before},
            projected,
            mask=mask[..., None],
            mutable=["batch_stats"],
        )
    _, _, found = run_reference(case, values, stats)
    updated = reference.running_average(stats, found, 0.9)
    for kind in ("mean", "var"):
        np.testing.assert_allclose(after["batch_stats"][kind], updated[f"input_{kind}"], **VALUES)


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_inference_processes_rows_independently(reverse):
    case = Case(
        train=False, time=5, max_steps=3, lengths=(5, 1, 3, 2, 0), reverse=reverse, carry=True
    )
    values, stats, _ = case.draw()
    params, inputs, (c, h) = split_values(values)
    outputs, carry, _ = run_reference(case, values, stats)
    for b, n in enumerate(case.lengths):
        row = inputs[b : b + 1, :n]
        row = row[:, ::-1] if reverse else row
        alone, (c_alone, h_alone), _ = reference.bn_lstm(
            params, row, statistics=stats, initial_carry=(c[b : b + 1], h[b : b + 1])
        )
        np.testing.assert_allclose(outputs[b, :n], alone[0], rtol=1e-12)
        np.testing.assert_allclose(carry[0][b], c_alone[0], rtol=1e-12)
        np.testing.assert_allclose(carry[1][b], h_alone[0], rtol=1e-12)
        np.testing.assert_array_equal(outputs[b, n:], np.tile(carry[1][b], (5 - n, 1)))


@pytest.mark.parametrize("options", [{}, {"mask_statistics": False}], ids=["valid", "all"])
def test_reference_inference_with_batch_statistics_equals_training(options):
    case = Case(lengths=(4, 1, 3, 4, 1), **options)
    values, _, _ = case.draw()
    outputs, _, found = run_reference(case, values, None)
    again, _, _ = run_reference(dataclasses.replace(case, train=False), values, found)
    np.testing.assert_allclose(again, outputs, rtol=1e-12, atol=1e-12)


def test_finite_differences_match_analytic_gradients():
    values = {"x": np.array([0.3, -1.2]), "y": np.array([[2.0]])}
    gradients = reference.finite_differences(
        lambda v: np.sin(v["x"]).sum() * v["y"][0, 0] ** 3, values
    )
    np.testing.assert_allclose(gradients["x"], 8.0 * np.cos(values["x"]), rtol=1e-9)
    np.testing.assert_allclose(gradients["y"], 12.0 * np.sin(values["x"]).sum(), rtol=1e-9)
