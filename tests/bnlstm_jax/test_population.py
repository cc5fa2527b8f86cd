import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnlstm_jax
from bnlstm_jax.batch_norm import BatchNorm
from experiments.models.sequence_classifier import SequenceClassifier

STEPS = 6


def make(layer, shape=(4, STEPS, 3)):
    x = jax.random.normal(jax.random.key(1), shape)
    return layer.init(jax.random.key(0), x, use_running_average=True)


def batch_statistics(layer, variables, *args, **kwargs):
    """The plain statistics of one batch: a running average without memory."""
    forgetful = layer.clone(momentum=0.0)
    return forgetful.apply(
        variables, *args, **kwargs, use_running_average=False, mutable=["batch_stats"]
    )[1]["batch_stats"]


def test_estimate_is_the_mean_of_batch_statistics():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS, momentum=0.3)
    variables = make(layer)
    batches = [jax.random.normal(jax.random.key(k), (4 + k, STEPS, 3)) for k in range(3)]
    got = bnlstm_jax.estimate_population_statistics(
        layer, variables, batches, use_running_average=False
    )
    each = [batch_statistics(layer, variables, x) for x in batches]
    wanted = jax.tree.map(lambda *s: np.mean(s, axis=0), *each)
    assert got.keys() == variables["batch_stats"].keys()
    for name in wanted:
        # Float32 sums of three.
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_each_step_averages_over_batches_reaching_it():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    long, short = (jax.random.normal(jax.random.key(k), (4, t, 3)) for k, t in ((1, 5), (2, 2)))
    got = bnlstm_jax.estimate_population_statistics(
        layer, variables, [long, short], use_running_average=False
    )["cell_mean"]
    of_long, of_short = (batch_statistics(layer, variables, x)["cell_mean"] for x in (long, short))
    np.testing.assert_allclose(got[:2], (of_long[:2] + of_short[:2]) / 2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got[2:5], of_long[2:5], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[5], got[4])  # reached by no batch


def test_masked_steps_are_equivalent_to_truncated_steps():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    masked = bnlstm_jax.estimate_population_statistics(
        layer,
        variables,
        [x],
        seq_lengths=jnp.array([3, 3, 3, 3]),
        use_running_average=False,
    )
    cut = bnlstm_jax.estimate_population_statistics(
        layer, variables, [x[:, :3]], use_running_average=False
    )
    for name in cut:
        np.testing.assert_allclose(masked[name], cut[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("input_statistics", ["per_step", "sequence"])
@pytest.mark.parametrize("normalize", [("input", "recurrent", "cell"), ("input",), ("cell",)])
def test_inference_matches_training_on_a_single_batch(input_statistics, normalize):
    layer = bnlstm_jax.BNLSTM(
        5, max_steps=STEPS, normalize=normalize, input_statistics=input_statistics
    )
    model = SequenceClassifier(layer, 3)
    variables = make(model)
    x = jax.random.normal(jax.random.key(1), (8, STEPS, 3))
    training, _ = model.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    statistics = bnlstm_jax.estimate_population_statistics(
        model, variables, [x], use_running_average=False
    )
    inference = model.apply({**variables, "batch_stats": statistics}, x, use_running_average=True)
    # Standardising by small variances enlarges rounding errors of the statistics.
    np.testing.assert_allclose(inference, training, rtol=1e-4, atol=1e-5)


def test_inputs_function_drops_labels():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables, x = make(layer), jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    estimate = functools.partial(
        bnlstm_jax.estimate_population_statistics, layer, variables, use_running_average=False
    )
    plain, labelled = estimate([x]), estimate([(x, np.arange(4))], inputs=lambda batch: batch[0])
    jax.tree.map(np.testing.assert_array_equal, plain, labelled)
    with pytest.raises(TypeError, match="rngs: expected a dict of keys"):
        estimate([x], rngs=jax.random.key(0))
    with pytest.raises(TypeError, match="expected an argument of the model or a tuple, got a list"):
        estimate([[x, np.arange(4)]])


@pytest.mark.parametrize("terms", [("input", "cell"), ["input", "cell"]], ids=["tuple", "list"])
def test_equal_calls_share_a_compiled_program(terms):
    """Unhashable fields, such as lists, only prevent the sharing."""
    traced = []

    class Model(nn.Module):
        normalize: tuple[str, ...] | list[str]

        @nn.compact
        def __call__(self, x, train):
            traced.append(x)
            layer = bnlstm_jax.BNLSTM(5, normalize=tuple(self.normalize))
            return layer(x, use_running_average=not train)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    variables = Model(terms).init(jax.random.key(0), x, False)
    traced.clear()
    for scale, number in ((1, 1), (2, 1 if isinstance(terms, tuple) else 2)):
        stats = bnlstm_jax.estimate_population_statistics(
            Model(terms), variables, [scale * x], train=True
        )
        wanted = scale * np.mean(x @ variables["params"]["BNLSTM_0"]["input_kernel"], 0)
        np.testing.assert_allclose(stats["BNLSTM_0"]["input_mean"], wanted, rtol=1e-4, atol=1e-6)
        assert len(traced) == number


def test_tuple_batches_and_nested_layers_are_supported():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, train):
            layers = [
                bnlstm_jax.BNLSTM(4, max_steps=STEPS, use_running_average=not train)
                for _ in range(2)
            ]
            return nn.Bidirectional(*layers)(x, seq_lengths=lengths)

    x, lengths = jax.random.normal(jax.random.key(1), (3, STEPS, 2)), jnp.array([6, 2, 4])
    variables = Model().init(jax.random.key(0), x, lengths, train=False)
    got = bnlstm_jax.estimate_population_statistics(Model(), variables, [(x, lengths)], train=True)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, variables["batch_stats"])
    for name, reverse in (("BNLSTM_0", False), ("BNLSTM_1", True)):
        layer = bnlstm_jax.BNLSTM(4, max_steps=STEPS, reverse=reverse)
        own = {collection: variables[collection][name] for collection in variables}
        wanted = batch_statistics(layer, own, x, seq_lengths=lengths)
        for statistic, leaf in got[name].items():
            # Two of the sequences have four steps: one alone has no variance.
            np.testing.assert_allclose(leaf[:4], wanted[statistic][:4], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(leaf[4:], leaf[3:4].repeat(2, 0))


def test_estimation_without_batches_or_statistics_raises():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    x = jnp.zeros((4, STEPS, 3))
    with pytest.raises(ValueError, match="expected at least one batch"):
        bnlstm_jax.estimate_population_statistics(layer, variables, [], use_running_average=False)
    with pytest.raises(ValueError, match="use_running_average=False"):
        bnlstm_jax.estimate_population_statistics(layer, variables, [x], use_running_average=True)
    parameters = {"params": variables["params"]}
    with pytest.raises(ValueError, match="variables with the collection 'batch_stats'"):
        bnlstm_jax.estimate_population_statistics(layer, parameters, [x], use_running_average=False)


def test_updates_of_other_collections_are_discarded():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            calls = self.variable("ema", "calls", jnp.zeros, ())
            if train:
                calls.value += 1
            return BatchNorm(use_running_average=not train)(x + calls.value)

    model, x = Model(), jax.random.normal(jax.random.key(1), (6, 3))
    variables = model.init(jax.random.key(0), x, train=False)
    got = bnlstm_jax.estimate_population_statistics(model, variables, [x, 2 * x], train=True)
    # Each batch starts from the given variables: changes by other batches are discarded.
    np.testing.assert_allclose(got["BatchNorm_0"]["mean"], 1 + 1.5 * x.mean(0), **SINGLE)
    assert variables["ema"]["calls"] == 0


def test_transform_can_map_the_axis_of_pooled_statistics():
    layer, pooled = (bnlstm_jax.BNLSTM(3, max_steps=STEPS, axis_name=axis) for axis in (None, "b"))
    variables = make(layer)
    x = jax.random.normal(jax.random.key(1), (2, 4, STEPS, 3))
    got = bnlstm_jax.estimate_population_statistics(
        pooled,
        variables,
        [x],
        transform=lambda f: jax.vmap(f, (None, None, None, 0), out_axes=None, axis_name="b"),
        use_running_average=False,
    )
    together = x.reshape(8, STEPS, 3)
    wanted = bnlstm_jax.estimate_population_statistics(
        layer, variables, [together], use_running_average=False
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SINGLE), got, wanted)


def test_variables_that_are_no_dict_raise():
    with pytest.raises(TypeError, match=r"variables: expected \{'params': .*, got list"):
        bnlstm_jax.estimate_population_statistics(bnlstm_jax.BNLSTM(3), [], [])


def test_transformed_function_is_compiled_once():
    traced = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            traced.append(1)
            layer = bnlstm_jax.BNLSTM(3, axis_name="b", use_running_average=False)
            return layer(x)

    def transform(function):
        mapped = jax.vmap(function, (None, None, None, 0), out_axes=None, axis_name="b")
        return jax.jit(mapped)

    model, x = Model(), jax.random.normal(jax.random.key(1), (2, 4, STEPS, 3))
    variables = jax.vmap(model.init, (None, 0), axis_name="b")(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf[0], variables)
    for calls in (2, 2, 2):  # of init, and of the first estimate
        bnlstm_jax.estimate_population_statistics(model, variables, [x, x], transform=transform)
        assert len(traced) == calls


@pytest.mark.parametrize("masked", [False, True], ids=["cut", "masked"])
def test_late_steps_are_skipped_or_repeated(masked):
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    variables = make(layer)
    keys = jax.random.split(jax.random.key(1), 3)
    batches = [(jax.random.normal(keys[0], (4, STEPS, 3)), jnp.array([5, 2, 5, 3]))]
    for key in keys[1:]:
        x, lengths = jax.random.normal(key, (4, STEPS, 3)), jnp.array([2, 2, 1, 2])
        batches.append((x, lengths) if masked else (x[:, :2], lengths))

    class Model(nn.Module):  # that takes lengths by their position
        @nn.compact
        def __call__(self, x, lengths, **kwargs):
            return layer.clone(parent=self, name="layer")(x, seq_lengths=lengths, **kwargs)

    reached = [5, 2, 2]
    each = [batch_statistics(layer, variables, x, seq_lengths=lengths) for x, lengths in batches]
    for late_steps in ("skip", "repeat"):
        got = bnlstm_jax.estimate_population_statistics(
            Model(),
            {name: {"layer": leaves} for name, leaves in variables.items()},
            batches,
            late_steps=late_steps,
            use_running_average=False,
        )["layer"]
        for name, statistic in got.items():
            tables = [np.asarray(of[name])[:n] for of, n in zip(each, reached, strict=True)]
            if late_steps == "repeat":
                tables = [np.pad(t, ((0, STEPS - len(t)), (0, 0)), mode="edge") for t in tables]
            at = [[table[t] for table in tables if t < len(table)] for t in range(5)]
            wanted = np.stack([np.mean(rows, axis=0) for rows in at])
            # Float32 sums of three.
            np.testing.assert_allclose(statistic[:5], wanted, rtol=1e-5, atol=1e-7, err_msg=name)
            np.testing.assert_array_equal(statistic[5], statistic[4], err_msg=name)


@pytest.mark.parametrize("late_steps", ["skip", "repeat"])
def test_fully_masked_batch_has_no_effect(late_steps):
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS, input_statistics="sequence")
    norm = BatchNorm()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, **kwargs):
            valid = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
            y = layer.clone(parent=self, name="layer")(x, seq_lengths=lengths, **kwargs)
            return norm.clone(parent=self, name="norm")(y, mask=valid, **kwargs)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    some, none = jnp.array([3, 1, 2, 3]), jnp.zeros(4, int)
    variables = Model().init(jax.random.key(0), x, some, use_running_average=True)
    alone, both = (
        bnlstm_jax.estimate_population_statistics(
            Model(), variables, batches, late_steps=late_steps, use_running_average=False
        )
        for batches in ([(x, some)], [(x, some), (2 * x, none)])
    )
    jax.tree.map(np.testing.assert_array_equal, both, alone)


def test_batch_norm_weights_batches_equally():
    model = BatchNorm()
    batches = [jax.random.normal(jax.random.key(k), (4 + k, 3)) + k for k in range(3)]
    variables = model.init(jax.random.key(0), batches[0], use_running_average=True)
    for late_steps in ("skip", "repeat"):
        got = bnlstm_jax.estimate_population_statistics(
            model, variables, batches, late_steps=late_steps, use_running_average=False
        )
        # Batches have equal weights whatever their sizes, and variances are biased.
        mean = np.mean([x.mean(0) for x in batches], axis=0)
        var = np.mean([x.var(0) for x in batches], axis=0)
        np.testing.assert_allclose(got["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["var"], var, rtol=1e-5, atol=1e-6)


def test_unknown_late_steps_value_raises():
    layer = bnlstm_jax.BNLSTM(5, max_steps=STEPS)
    with pytest.raises(ValueError, match="'skip' or 'repeat'"):
        bnlstm_jax.estimate_population_statistics(
            layer, {}, [jnp.zeros((4, STEPS, 3))], late_steps="edge", use_running_average=False
        )


# ---- Modules within lifted transforms.

STACKED = {"batch_stats": 0, bnlstm_jax.CURRENT_BATCH_STATS: 0}
SINGLE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of a few


def average(tables):
    """Plain average by time step over tables `[t, F]` of batches of `t` steps; the last repeats."""
    steps = max(map(len, tables))
    rows = [np.mean([table[t] for table in tables if t < len(table)], axis=0) for t in range(steps)]
    return np.stack(rows + [rows[-1]] * (STEPS - steps))


class ScannedLayers(nn.Module):
    """Three stacked BNLSTMs."""

    variable_axes: dict

    @nn.compact
    def __call__(self, x, train=False):
        layer = bnlstm_jax.BNLSTM(3, max_steps=STEPS, use_running_average=not train, name="layer")
        stack = nn.scan(
            lambda layer, x: (layer(x), None),
            variable_axes={"params": 0, **self.variable_axes},
            split_rngs={"params": True},
            length=3,
        )
        return stack(layer, x)[0]


class MappedLayers(nn.Module):
    """Three BNLSTMs beside each other, as members of an ensemble."""

    variable_axes: dict

    @nn.compact
    def __call__(self, x, train=False):
        ensemble = nn.vmap(
            bnlstm_jax.BNLSTM,
            variable_axes={"params": 0, **self.variable_axes},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return ensemble(3, max_steps=STEPS, use_running_average=not train, name="layer")(x)


@pytest.mark.parametrize("late_steps", ["skip", "repeat"])
@pytest.mark.parametrize("stack", [ScannedLayers, MappedLayers])
def test_stacked_layers_match_separate_layers(stack, late_steps):
    model = stack(STACKED)
    lengths = (5, 2, 3)
    batches = [jax.random.normal(jax.random.key(t), (4 + t, t, 3)) for t in lengths]
    variables = model.init(jax.random.key(0), jnp.zeros((4, STEPS, 3)))
    got = bnlstm_jax.estimate_population_statistics(
        model, variables, batches, late_steps=late_steps, train=True
    )["layer"]
    layer = bnlstm_jax.BNLSTM(3, max_steps=STEPS)
    for i in range(3):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], {k: v["layer"] for k, v in variables.items()})
        each = [batch_statistics(layer, own, x) for x in batches]
        for name in own["batch_stats"]:
            tables = [np.asarray(of[name])[:t] for of, t in zip(each, lengths, strict=True)]
            if late_steps == "repeat":
                pad = [((0, 5 - t), (0, 0)) for t in lengths]
                tables = [np.pad(t, p, mode="edge") for t, p in zip(tables, pad, strict=True)]
            np.testing.assert_allclose(got[name][i], average(tables), **SINGLE, err_msg=name)
        if stack is ScannedLayers:
            train = functools.partial(layer.apply, own, use_running_average=False, mutable=True)
            batches = [train(x)[0] for x in batches]


class LoopOverTime(nn.Module):
    """A cell under `nn.scan` over time, whose statistics are stacked or carried."""

    cell: type
    lifted: dict

    @nn.compact
    def __call__(self, x, train=False):
        cell = self.cell(4, use_running_average=not train, name="cell")
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        if self.is_initializing() and "variable_carry" in self.lifted:
            return cell(carry, x[:, 0])[1]  # carried collections must exist
        loop = nn.scan(
            lambda cell, carry, x: cell(carry, x),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
            **self.lifted,
        )
        return loop(cell, carry, x)[1]


class Recurrent(nn.Module):
    """A cell under `nn.RNN`."""

    cell: type
    lifted: dict

    @nn.compact
    def __call__(self, x, train=False):
        cell = self.cell(4, use_running_average=not train, name="cell")
        return nn.RNN(cell, **self.lifted)(x)


def simple_moments(params, x):
    """Means and variances of the pre-activation of BNSimpleCell `[T, F]`, in double precision."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h, mean, var = np.zeros((len(x), 4)), [], []
    for t in range(x.shape[1]):
        total = h @ params["recurrent_kernel"] + x[:, t] @ params["input_kernel"]
        mean.append(total.mean(0))
        var.append(total.var(0))
        normalized = (total - mean[-1]) / np.sqrt(var[-1] + 1e-5)
        h = np.tanh(params["joint_scale"] * normalized + params["bias"])
    return np.stack(mean), np.stack(var)


@pytest.mark.parametrize("loop", [LoopOverTime, Recurrent])
def test_cells_over_time_match_numpy(loop):
    batches = [jax.random.normal(jax.random.key(k), (4 + k, STEPS, 3)) for k in range(3)]
    model = loop(bnlstm_jax.BNSimpleCell, {"variable_axes": STACKED})
    variables = model.init(jax.random.key(0), batches[0])
    got = bnlstm_jax.estimate_population_statistics(model, variables, batches, train=True)["cell"]
    each = [simple_moments(variables["params"]["cell"], np.asarray(x)) for x in batches]
    for name, tables in zip(("joint_mean", "joint_var"), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(got[name], np.mean(tables, axis=0), **SINGLE)


@pytest.mark.parametrize("loop", [LoopOverTime, Recurrent])
def test_cells_over_time_match_the_layer(loop):
    batches = [jax.random.normal(jax.random.key(k), (4 + k, STEPS, 3)) for k in range(3)]
    model, layer = loop(bnlstm_jax.BNLSTMCell, {"variable_axes": STACKED}), bnlstm_jax.BNLSTM(4)
    variables = model.init(jax.random.key(0), batches[0])
    got = bnlstm_jax.estimate_population_statistics(model, variables, batches, train=True)["cell"]
    own = {collection: leaves["cell"] for collection, leaves in variables.items()}
    each = [batch_statistics(layer, own, x) for x in batches]
    for name in own["batch_stats"]:
        wanted = np.mean([of[name] for of in each], axis=0)
        # Sums have another order, whose rounding errors reach later steps.
        np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_carried_statistics_average_over_time():
    collections = ["batch_stats", bnlstm_jax.CURRENT_BATCH_STATS]
    model = LoopOverTime(bnlstm_jax.BNSimpleCell, {"variable_carry": collections})
    batches = [jax.random.normal(jax.random.key(k), (4 + k, STEPS, 3)) for k in range(3)]
    variables = model.init(jax.random.key(0), batches[0])
    got = bnlstm_jax.estimate_population_statistics(model, variables, batches, train=True)["cell"]
    each = [simple_moments(variables["params"]["cell"], np.asarray(x)) for x in batches]
    for name, tables in zip(("joint_mean", "joint_var"), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(got[name], np.mean(tables, axis=(0, 1)), **SINGLE)


@pytest.mark.parametrize(
    "model",
    [
        ScannedLayers({"batch_stats": 0}),
        MappedLayers({"batch_stats": 0}),
        LoopOverTime(bnlstm_jax.BNLSTMCell, {"variable_axes": {"batch_stats": 0}}),
        LoopOverTime(bnlstm_jax.BNSimpleCell, {"variable_carry": ["batch_stats"]}),
        Recurrent(bnlstm_jax.BNLSTMCell, {"variable_axes": {"batch_stats": 0}}),
    ],
    ids=["layers", "ensemble", "scan", "carry", "RNN"],
)
@pytest.mark.parametrize("moving", [True, False])
def test_transforms_without_current_batch_stats_raise(model, moving, monkeypatch):
    if not moving:  # as with momentum 1
        monkeypatch.setattr(bnlstm_jax.batch_norm, "running_average", lambda running, *_: running)
    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    variables = model.init(jax.random.key(0), x)
    name = "layer" if "layer" in variables["batch_stats"] else "cell"
    with pytest.raises(ValueError, match=f"/{name}: .*'{bnlstm_jax.CURRENT_BATCH_STATS}': 0"):
        bnlstm_jax.estimate_population_statistics(model, variables, [x], train=True)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_remat_and_jit_need_no_variable_axes(lift):
    layer = bnlstm_jax.BNLSTM(4, max_steps=STEPS)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            lifted = lift(bnlstm_jax.BNLSTM)
            return lifted(4, max_steps=STEPS, use_running_average=not train, name="layer")(x)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    variables = Model().init(jax.random.key(0), x)
    own = {collection: leaves["layer"] for collection, leaves in variables.items()}
    got = bnlstm_jax.estimate_population_statistics(Model(), variables, [x], train=True)["layer"]
    wanted = batch_statistics(layer, own, x)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], **SINGLE, err_msg=name)


# ---- Modules called several times.


def test_repeated_calls_are_weighted_by_rows():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, y, train=False):
            norm = BatchNorm(use_running_average=not train, name="norm")
            return norm(x), norm(y)

    draws = [jax.random.normal(jax.random.key(k), (4 + 2 * k, 3)) + k for k in range(4)]
    batches = [(draws[0], draws[1]), (draws[2], draws[3])]
    variables = Model().init(jax.random.key(0), *batches[0])
    got = bnlstm_jax.estimate_population_statistics(Model(), variables, batches, train=True)["norm"]
    for name, moment in (("mean", np.mean), ("var", np.var)):
        # Weighted by rows within a batch, equally over batches; variances about each call's mean.
        each = [
            np.average([moment(x, axis=0) for x in pair], axis=0, weights=[len(x) for x in pair])
            for pair in batches
        ]
        np.testing.assert_allclose(got[name], np.mean(each, axis=0), **SINGLE)


def test_repeated_layer_calls_are_weighted_by_rows_per_step():
    layer = bnlstm_jax.BNLSTM(4, max_steps=STEPS)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, passage, question, train=False):
            shared = layer.clone(parent=self, name="layer")
            for x, lengths in (passage, question):
                shared(x, seq_lengths=lengths, use_running_average=not train)

    draw = [jax.random.normal(jax.random.key(k), (4, 5, 3)) for k in range(2)]
    lengths = [jnp.array([5, 2, 5, 4]), jnp.array([1, 3, 4, 2])]
    batch = tuple(zip(draw, lengths, strict=True))
    variables = Model().init(jax.random.key(0), *batch)
    got = bnlstm_jax.estimate_population_statistics(Model(), variables, [batch], train=True)
    own = {collection: leaves["layer"] for collection, leaves in variables.items()}
    each = [batch_statistics(layer, own, x, seq_lengths=n) for x, n in batch]
    rows = np.array([[np.sum(np.asarray(n) > t) for t in range(5)] for n in lengths])
    rows[rows == 1] = 0  # no variance
    weights = (rows / rows.sum(0))[..., None]
    for name, statistic in got["layer"].items():
        wanted = sum(w * of[name][:5] for w, of in zip(weights, each, strict=True))
        np.testing.assert_allclose(statistic[:5], wanted, **SINGLE, err_msg=name)
        np.testing.assert_array_equal(statistic[5], statistic[4], err_msg=name)


def test_current_statistics_of_earlier_calls_are_ignored():
    model = BatchNorm()
    x, other = (jax.random.normal(jax.random.key(k), (4 + k, 3)) + k for k in range(2))
    variables = model.init(jax.random.key(0), x, use_running_average=True)
    _, left = model.apply(variables, other, use_running_average=False, mutable=True)
    assert bnlstm_jax.CURRENT_BATCH_STATS in left
    got = bnlstm_jax.estimate_population_statistics(model, left, [x], use_running_average=False)
    np.testing.assert_allclose(got["mean"], np.mean(x, axis=0), **SINGLE)
    np.testing.assert_allclose(got["var"], np.var(x, axis=0), **SINGLE)


# ---- Models with other modules, and models of other kinds.


class Mixed(nn.Module):
    """A BNLSTM and Flax's BatchNorm, SpectralNorm and Dropout, all driven by `train`."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = bnlstm_jax.BNLSTM(4, max_steps=STEPS, use_running_average=not train, name="layer")(x)
        x = nn.BatchNorm(use_running_average=not train, name="flax_norm")(x)
        return nn.SpectralNorm(nn.Dense(3), name="spectral")(x, update_stats=train)


def test_other_modules_keep_their_statistics_and_warn():
    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    variables = Mixed().init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="/flax_norm, /spectral") as warned:
        got = bnlstm_jax.estimate_population_statistics(Mixed(), variables, [x], train=True)
    assert len(warned) == 1 and warned[0].filename == __file__
    old = variables["batch_stats"]
    for name in ("flax_norm", "spectral"):
        jax.tree.map(np.testing.assert_array_equal, got[name], old[name])
    own = {collection: leaves.get("layer") for collection, leaves in variables.items()}
    wanted = batch_statistics(bnlstm_jax.BNLSTM(4, max_steps=STEPS), own, x)
    for name in wanted:
        np.testing.assert_allclose(got["layer"][name], wanted[name], **SINGLE, err_msg=name)


def test_subclass_with_other_arguments_is_estimated():
    class Layer(bnlstm_jax.BNLSTM):
        def setup(self):
            super().setup()
            self.norm = bnlstm_jax.BatchNorm()

        def __call__(self, x, use_running_average=None, train=False):
            return self.norm(super().__call__(x, not train), not train)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    layer, options = bnlstm_jax.BNLSTM(3), {"train": True}
    variables = Layer(3).init(jax.random.key(0), x)
    got = bnlstm_jax.estimate_population_statistics(Layer(3), variables, [x], **options)
    assert np.any(got.pop("norm")["mean"] != 0)
    expected = bnlstm_jax.estimate_population_statistics(
        layer,
        {name: {k: v for k, v in each.items() if k != "norm"} for name, each in variables.items()},
        [x],
        use_running_average=False,
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.filterwarnings("error")
def test_frozen_modules_keep_their_statistics_without_warning():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
            x = bnlstm_jax.BNLSTM(3, use_running_average=True, name="frozen_layer")(x)
            return bnlstm_jax.BNLSTM(4, use_running_average=not train)(x)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    variables = Model().init(jax.random.key(0), x)
    statistics = variables["batch_stats"]["frozen_layer"]
    statistics["cell_mean"] = statistics["cell_mean"].at[0, 0].set(jnp.nan)
    got = bnlstm_jax.estimate_population_statistics(Model(), variables, [x], train=True)
    for name in ("frozen", "frozen_layer"):
        jax.tree.map(np.testing.assert_array_equal, got[name], variables["batch_stats"][name])


def test_fully_masked_module_keeps_its_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, **kwargs):
            for name, n in (("some", lengths), ("none", jnp.zeros_like(lengths))):
                layer = bnlstm_jax.BNLSTM(3, max_steps=STEPS, name=name)
                x = layer(x, seq_lengths=n, **kwargs)

    x, lengths = jax.random.normal(jax.random.key(1), (3, STEPS, 2)), jnp.array([6, 2, 4])
    variables = Model().init(jax.random.key(0), x, lengths, use_running_average=True)
    got = bnlstm_jax.estimate_population_statistics(
        Model(), variables, [(x, lengths)], use_running_average=False
    )
    old = variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, got["none"], old["none"])
    assert all(np.any(got["some"][name] != old["some"][name]) for name in old["some"])


def test_fully_masked_ensemble_member_keeps_its_statistics():
    axes = {"params": 0, "batch_stats": 0, bnlstm_jax.CURRENT_BATCH_STATS: 0}

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x, masks, use_running_average=False):
            member = nn.vmap(
                lambda module, x, mask: module(x, use_running_average, mask=mask),
                variable_axes=axes,
                split_rngs={"params": True},
                in_axes=(None, 0),
            )
            return member(bnlstm_jax.BatchNorm(name="norm"), x, masks)

    x = jax.random.normal(jax.random.key(1), (5, 2))
    masks = jnp.stack([jnp.ones((5, 1), bool), jnp.zeros((5, 1), bool)])
    variables = Ensemble().init(jax.random.key(0), x, masks, True)
    got = bnlstm_jax.estimate_population_statistics(Ensemble(), variables, [(x, masks)])["norm"]
    np.testing.assert_allclose(got["mean"][0], x.mean(0), rtol=1e-5, atol=1e-6)
    old = variables["batch_stats"]["norm"]
    for name in ("mean", "var"):
        np.testing.assert_array_equal(got[name][1], old[name][1])


@pytest.mark.parametrize("late_steps", ["skip", "repeat"])
@pytest.mark.parametrize("shared", [True, False])
def test_fully_masked_recurrent_ensemble_member_keeps_its_statistics(shared, late_steps):
    axes = {"params": 0, "batch_stats": 0, bnlstm_jax.CURRENT_BATCH_STATS: 0}
    layer = bnlstm_jax.BNLSTM(3, shared_statistics=shared, input_statistics="sequence")

    class Member(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, use_running_average=False):
            mask = (lengths > 0)[:, None, None]
            y = layer.clone(parent=self, name="layer")(x, use_running_average, seq_lengths=lengths)
            return bnlstm_jax.BatchNorm(name="norm")(y, use_running_average, mask=mask)

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x, lengths, use_running_average=False):
            member = nn.vmap(
                Member,
                variable_axes=axes,
                split_rngs={"params": True},
                in_axes=(None, 0, None),
            )
            return member(name="members")(x, lengths, use_running_average)

    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    lengths = jnp.stack([jnp.full(4, STEPS), jnp.zeros(4, int)])
    variables = Ensemble().init(jax.random.key(0), x, lengths, True)
    got = bnlstm_jax.estimate_population_statistics(
        Ensemble(), variables, [(x, lengths)], late_steps=late_steps
    )["members"]
    first = jax.tree.map(lambda leaf: leaf[0], variables)["params"]["members"]
    alone = bnlstm_jax.estimate_population_statistics(
        Member(),
        {"params": first, "batch_stats": jax.tree.map(lambda leaf: leaf[0], got)},
        [(x, lengths[0])],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, **SINGLE), got, alone)
    old = variables["batch_stats"]["members"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), got, old)


@pytest.mark.filterwarnings("ignore:/flax_norm")
def test_dropout_key_is_required_and_folded_per_batch():
    model, x = Mixed(0.5), jax.random.normal(jax.random.key(1), (8, STEPS, 3))
    variables = model.init(jax.random.key(0), x)
    batches, key = [x, 2 * x], jax.random.key(2)
    got = bnlstm_jax.estimate_population_statistics(
        model, variables, batches, train=True, rngs={"dropout": key}
    )["layer"]["input_mean"]
    kernel = np.asarray(variables["params"]["layer"]["input_kernel"])
    each = []
    for index, batch in enumerate(batches):  # with masks drawn by the key and the batch's index
        _, seen = model.apply(
            variables,
            batch,
            train=True,
            rngs={"dropout": jax.random.fold_in(key, index)},
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
            mutable=["batch_stats", "intermediates"],
        )
        (dropped,) = seen["intermediates"]["Dropout_0"]["__call__"]
        assert np.any(dropped == 0)
        each.append(np.mean(np.asarray(dropped) @ kernel, axis=0))
    np.testing.assert_allclose(got[:STEPS], np.mean(each, axis=0), **SINGLE)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        bnlstm_jax.estimate_population_statistics(model, variables, batches, train=True)


def test_models_without_statistics_raise():
    layer, x = bnlstm_jax.LSTM(5), jnp.zeros((4, STEPS, 3))
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average=False"):
        bnlstm_jax.estimate_population_statistics(layer, variables, [x])


def test_class_instead_of_module_raises():
    with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
        bnlstm_jax.estimate_population_statistics(bnlstm_jax.BNLSTM, {}, [])


@pytest.mark.filterwarnings("ignore:/flax_norm")
def test_nnx_wrapper_raises_and_suggested_code_works():
    x = jax.random.normal(jax.random.key(1), (4, STEPS, 3))
    model = nnx.bridge.ToNNX(Mixed(), rngs=nnx.Rngs(0)).lazy_init(x)
    with pytest.raises(TypeError, match=r"model\.to_nnx__module.*nnx\.BatchStat.*nnx\.update"):
        bnlstm_jax.estimate_population_statistics(model, {}, [x], train=True)
    # The code that the error suggests.
    variables = {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
    }
    linen = model.to_nnx__module
    stats = bnlstm_jax.estimate_population_statistics(linen, variables, [x], train=True)
    nnx.update(model, stats)
    wanted = linen.apply({**variables, "batch_stats": stats}, x)
    np.testing.assert_array_equal(model(x), wanted)
    assert np.any(stats["layer"]["input_mean"] != 0)


@pytest.mark.parametrize("late_steps", ["skip", "repeat"])
def test_scalar_statistics_of_other_modules_are_unchanged(late_steps):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            ema = self.variable("batch_stats", "ema_mean", jnp.zeros, ())
            if not self.is_initializing() and not use_running_average:
                ema.value = ema.value + 1
            return bnlstm_jax.BNLSTM(2)(x, use_running_average=use_running_average)

    model, x = Model(), jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
    variables = model.init(jax.random.key(0), x, True)
    with pytest.warns(UserWarning, match="not re-estimated"):
        stats = bnlstm_jax.estimate_population_statistics(
            model, variables, [x], late_steps=late_steps, use_running_average=False
        )
    assert stats["ema_mean"].shape == () and stats["ema_mean"] == 0
