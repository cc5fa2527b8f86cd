import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from bnlstm_jax.batch_norm import CURRENT_BATCH_STATS, BatchNorm

FEATURES = 3
# Values of order one through a handful of operations in single precision.
SINGLE = dict(rtol=1e-5, atol=1e-6)


def draw(shape=(4, 5, FEATURES), seed=0):
    rng = np.random.default_rng(seed)
    x = (2 * rng.normal(size=shape) + 3).astype(np.float32)
    where = rng.random((*shape[:-1], 1)) < 0.6
    variables = {
        "params": {"scale": rng.uniform(0.5, 1.5, FEATURES).astype(np.float32)},
        "batch_stats": {
            "mean": rng.normal(size=FEATURES).astype(np.float32),
            "var": rng.uniform(0.5, 2, FEATURES).astype(np.float32),
        },
    }
    return variables, x, where


def by_hand(variables, x, where=None):
    """Normalised values and moments in double precision, over the chosen rows."""
    rows = x.reshape(-1, FEATURES).astype(np.float64)
    chosen = rows if where is None else rows[where.ravel()]
    mean, var = chosen.mean(axis=0), chosen.var(axis=0)
    return variables["params"]["scale"] * (x - mean) / np.sqrt(var + 1e-5), mean, var


def train(module, variables, x, where=None):
    mutable = ["batch_stats", CURRENT_BATCH_STATS]
    return module.apply(variables, x, use_running_average=False, mask=where, mutable=mutable)


@pytest.mark.parametrize("shape", [(6, FEATURES), (4, 5, FEATURES)], ids=["rows", "steps"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_outputs_and_statistics_match_numpy(shape, masked):
    variables, x, where = draw(shape)
    where = where if masked else None
    y, updated = train(BatchNorm(momentum=0.7), variables, x, where)
    wanted, mean, var = by_hand(variables, x, where)
    counted = np.broadcast_to(True if where is None else where, x.shape)
    np.testing.assert_allclose(y[counted], wanted[counted], **SINGLE)
    running, current = updated["batch_stats"], updated[CURRENT_BATCH_STATS]
    for name, moment in (("mean", mean), ("var", var)):
        average = 0.7 * variables["batch_stats"][name] + 0.3 * moment
        np.testing.assert_allclose(running[name], average, **SINGLE)
        np.testing.assert_allclose(current[name], moment, **SINGLE)
    assert current["count"] == (x[..., 0].size if where is None else where.sum())


def test_inference_normalises_all_rows_by_running_statistics():
    variables, x, where = draw()
    stats = variables["batch_stats"]
    wanted = variables["params"]["scale"] * (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    module = BatchNorm(use_running_average=True)
    for mask in (None, where):
        mutable = ["batch_stats", CURRENT_BATCH_STATS]
        y, updated = module.apply(variables, x, mask=mask, mutable=mutable)
        np.testing.assert_allclose(y, wanted, **SINGLE)
        jax.tree.map(np.testing.assert_array_equal, dict(updated["batch_stats"]), stats)
        assert CURRENT_BATCH_STATS not in updated


def test_initial_variables_match_the_paper():
    variables = BatchNorm().init(jax.random.key(0), draw()[1], use_running_average=False)
    np.testing.assert_array_equal(variables["params"]["scale"], np.full(FEATURES, np.float32(0.1)))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(FEATURES))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(FEATURES))
    assert variables.keys() == {"params", "batch_stats"}
    assert variables["params"].keys() == {"scale"}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_results_and_gradients_match_flax_batch_norm(masked):
    variables, x, where = draw()
    mask = where if masked else None
    # Flax standardises the rows that do not count too: they are left out of the comparison.
    weights = np.random.default_rng(1).normal(size=x.shape) * (where if masked else 1)

    def value(params, x, module, **kwargs):
        y, updated = module.apply(
            {**variables, "params": params}, x, **kwargs, mutable=["batch_stats"]
        )
        return (weights * y).sum(), updated["batch_stats"]

    ours = BatchNorm(momentum=0.7, epsilon=1e-3, use_running_average=False)
    flax = nn.BatchNorm(
        momentum=0.7,
        epsilon=1e-3,
        use_running_average=False,
        use_bias=False,
        use_fast_variance=False,
    )
    gradient = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    got = gradient(variables["params"], x, ours, mask=mask)
    wanted = gradient(variables["params"], x, flax, mask=mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def test_masked_out_rows_have_no_effect():
    variables, x, where = draw()
    other = np.where(where, x, np.float32(1e6))
    # Padding may hold NaN.
    nothing = np.where(where, x, np.float32(np.nan))
    results = [train(BatchNorm(), variables, values, where) for values in (x, other, nothing)]
    for y, updated in results[1:]:
        np.testing.assert_array_equal(y, results[0][0])
        jax.tree.map(np.testing.assert_array_equal, dict(updated), dict(results[0][1]))


def test_fully_masked_batch_is_finite_and_keeps_statistics():
    variables, x, where = draw()

    def value(params, x):
        y, updated = train(
            BatchNorm(momentum=0.7), {**variables, "params": params}, x, np.zeros_like(where)
        )
        return y.sum(), (y, updated)

    (_, (y, updated)), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
        variables["params"], x
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))
    stats = dict(updated["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    assert updated[CURRENT_BATCH_STATS]["count"] == 0


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_statistics_are_pooled_over_a_mapped_axis(masked):
    variables, x, where = draw()
    where[0] = False  # a shard without a row that counts
    where = where if masked else None
    weights = np.random.default_rng(1).normal(size=x.shape)

    def value(x, where, weights, axis_name=None):
        y, updated = train(BatchNorm(momentum=0.7, axis_name=axis_name), variables, x, where)
        return (weights * y).sum(), updated

    def sharded(x):
        mapped = jax.vmap(lambda *shard: value(*shard, "shards"), axis_name="shards")
        total, updated = mapped(x, where, weights)
        return total.sum(), updated

    got, of_shards = jax.grad(sharded, has_aux=True)(x)
    wanted, of_all = jax.grad(lambda x: value(x, where, weights), has_aux=True)(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    for shard in range(len(x)):
        mine = jax.tree.map(lambda leaf, shard=shard: leaf[shard], dict(of_shards))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SINGLE), mine, dict(of_all))


def test_use_running_average_is_required_as_field_or_argument():
    variables, x, _ = draw()
    inference = BatchNorm(use_running_average=True).apply(variables, x)
    only_called = BatchNorm().apply(variables, x, use_running_average=True)
    np.testing.assert_array_equal(only_called, inference)
    training = train(BatchNorm(), variables, x)[0]
    assert not np.allclose(inference, training, atol=0.1)
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().apply(variables, x)


def test_bfloat16_inputs_are_normalised_in_float32():
    variables, x, _ = draw()
    half = jnp.asarray(x, jnp.bfloat16)
    y, updated = train(BatchNorm(momentum=0.0), variables, half)
    wanted, mean, var = by_hand(variables, np.asarray(half, np.float64))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, wanted, **SINGLE)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, **SINGLE)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, **SINGLE)


def test_dtype_field_sets_the_output_dtype():
    variables, x, _ = draw()
    module = BatchNorm(dtype=jnp.bfloat16)
    for y, wanted in (
        (train(module, variables, x)[0], train(BatchNorm(), variables, x)[0]),
        (
            module.apply(variables, x, use_running_average=True),
            BatchNorm().apply(variables, x, use_running_average=True),
        ),
    ):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))


def test_mask_is_broadcast_to_the_inputs():
    variables, x, _ = draw()
    mask = np.array([True, False, True, True])[:, None, None]
    _, updated = train(BatchNorm(momentum=0.0), variables, x, mask)
    counted = x[[0, 2, 3]].reshape(-1, FEATURES)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], counted.mean(0), **SINGLE)
    np.testing.assert_allclose(updated["batch_stats"]["var"], counted.var(0), **SINGLE)


def test_mask_may_be_a_list():
    variables, x, where = draw()
    jax.tree.map(
        np.testing.assert_array_equal,
        train(BatchNorm(), variables, x, where.tolist()),
        train(BatchNorm(), variables, x, where),
    )


@pytest.mark.parametrize("kind", [BatchNorm, lambda **fields: bnlstm_jax.BNLSTM(2, **fields)])
def test_momentum_may_be_a_traced_array(kind):
    x = draw()[1]
    variables = kind().init(jax.random.key(0), x, True)

    @jax.jit
    def updated(momentum):
        module = kind(momentum=momentum)
        return module.apply(variables, x, False, mutable=["batch_stats"])[1]

    wanted = kind(momentum=0.7).apply(variables, x, False, mutable=["batch_stats"])[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **SINGLE), updated(jnp.float32(0.7)), wanted
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_masks_of_wrong_dtype_or_rank_raise(compiled):
    variables, x, where = draw()

    def outputs(mask):
        return train(BatchNorm(), variables, x, mask)[0]

    for mask in (where.astype(np.int32), where.astype(np.float32), where[..., 0]):
        with pytest.raises(ValueError, match="mask: expected booleans with 3 axes, got"):
            (jax.jit(outputs) if compiled else outputs)(mask)


MODULES = {
    "BatchNorm": (BatchNorm(axis_name="batch"), (jnp.ones((3, 2)),)),
    "BNLSTM": (bnlstm_jax.BNLSTM(2, axis_name="batch"), (jnp.ones((3, 4, 1)),)),
    "BNLSTMCell": (
        bnlstm_jax.BNLSTMCell(2, axis_name="batch"),
        ((jnp.ones((3, 2)), jnp.ones((3, 2))), jnp.ones((3, 1))),
    ),
    "BNSimpleCell": (
        bnlstm_jax.BNSimpleCell(2, axis_name="batch"),
        (jnp.ones((3, 2)), jnp.ones((3, 1))),
    ),
}


@pytest.mark.parametrize("module, inputs", MODULES.values(), ids=MODULES.keys())
def test_only_training_needs_the_mapped_axis(module, inputs):
    variables = module.init(jax.random.key(0), *inputs, use_running_average=False)
    module.apply(variables, *inputs, use_running_average=True)
    with pytest.raises(NameError, match="batch"):
        module.apply(variables, *inputs, use_running_average=False, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="use_running_average"):
        module.clone(use_running_average=True).apply(variables, *inputs, use_running_average=True)


@pytest.mark.parametrize("module, inputs", MODULES.values(), ids=MODULES.keys())
def test_statistics_are_equal_along_an_axis_of_one_device(module, inputs):
    inputs = jax.tree.map(lambda x: x * jnp.arange(1.0, 4).reshape(3, *[1] * (x.ndim - 1)), inputs)
    variables = module.init(jax.random.key(0), *inputs, use_running_average=False)
    alone = module.clone(axis_name=None)

    def updated(module, inputs):
        _, changed = module.apply(
            variables, *inputs, use_running_average=False, mutable=["batch_stats"]
        )
        return changed["batch_stats"]

    one = jax.tree.map(lambda x: x[None], inputs)
    mapped = jax.vmap(functools.partial(updated, module), out_axes=None, axis_name="batch")
    wanted = updated(alone, inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SINGLE), mapped(one), wanted)


@pytest.mark.parametrize("kind", [bnlstm_jax.BNLSTMCell, bnlstm_jax.BNSimpleCell])
def test_cell_statistics_are_pooled_over_a_mapped_axis(kind):
    random = np.random.default_rng(0)
    x, c, h = (random.normal(size=(6, n)).astype(np.float32) for n in (2, 3, 3))
    carry = (c, h) if kind is bnlstm_jax.BNLSTMCell else h
    alone, pooled = (kind(3, momentum=0.0, axis_name=name) for name in (None, "shards"))
    variables = alone.init(jax.random.key(0), carry, x, use_running_average=False)

    def outputs(cell, carry, x):
        (carry, _), updated = cell.apply(
            variables, carry, x, use_running_average=False, mutable=["batch_stats"]
        )
        return carry, dict(updated["batch_stats"])

    def assert_close(ours, theirs):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SINGLE), ours, theirs)

    wanted, statistics = outputs(alone, carry, x)
    shards = jax.tree.map(lambda a: a.reshape(2, 3, -1), (carry, x))
    mapped = jax.vmap(lambda shard: outputs(pooled, *shard), axis_name="shards")
    found, of_shards = mapped(shards)
    assert_close(jax.tree.map(lambda a: a.reshape(6, -1), found), wanted)
    for shard in range(2):
        assert_close(jax.tree.map(lambda a, shard=shard: a[shard], of_shards), statistics)
