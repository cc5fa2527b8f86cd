"""Several devices compute what one does. tests/conftest.py makes eight virtual CPU devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import text
from experiments import evaluate, parallel, tasks, train, train_step
from experiments.models.attentive_reader import FORMS, AttentiveReader, Quirks
from experiments.records import workdir
from experiments.runtime import files
from experiments.runtime.errors import UserError

NOISE = jax.random.key(0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A BN-LSTM on a text; an epoch has six batches of 32 segments and one of 7."""
    book = tmp_path_factory.mktemp("text") / "book.txt"
    book.write_text("".join(np.random.default_rng(0).choice(list("one, two."), 6000)))
    config = text.get_config()
    config.text_file = str(book)
    config.split = (4000, 980, 1000)
    config.segment_length = 20
    config.batch_size = 32
    config.model.kind = "bn_lstm"
    config.model.features = 12
    return config


def on(config, devices, statistics_devices=0):
    config = config.copy_and_resolve_references()
    config.parallel.devices = devices
    config.parallel.statistics_devices = statistics_devices
    return config, parallel.make(config)


def trained(config, devices, updates=20):
    task = tasks.load(config, devices)
    state = devices.replicate(train_step.create_state(task, config))
    step = train_step.make_train_step(task, NOISE)
    for update in range(updates):
        batch, sharding = train.placed_batch(task, devices, update)
        state = step(state, batch, sharding=sharding)
    return task, state


def assert_close(ours, theirs, atol):
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=atol, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def alone(config):
    return trained(*on(config, 1))


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.long), 8])
def test_global_statistics_on_several_devices_match_one_device(config, alone, number):
    # 20 updates of Adam, two with a short batch, differ only by rounding (measured: 2e-7).
    config, devices = on(config, number)
    task, state = trained(config, devices)
    for part in ("params", "batch_stats", "window"):
        assert_close(getattr(state, part), getattr(alone[1], part), 1e-5 if part != "window" else 1)
    norms = (s.window["gradient_norm"] for s in (state, alone[1]))
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert int(state.step) == 20

    # Evaluation agrees too: on 49 segments in batches of 16, the last of one, and on one sequence.
    config.population_batch_size = 64
    ours = evaluate.Evaluator(task, config, NOISE, devices), train_step.variables_of(state)
    theirs = evaluate.Evaluator(alone[0], config, NOISE), train_step.variables_of(alone[1])
    segments, whole = task.readings[0], task.readings[-1]
    for reading, statistics, size in (
        (segments, "running", 16),
        (segments, "batch", 16),
        (whole, "running", 1),
    ):
        found, expected = (
            evaluator.evaluate(variables, reading, reading.splits[0], statistics, size)
            for evaluator, variables in (ours, theirs)
        )
        assert_close(found, expected, 1e-5)
    found, expected = (
        evaluator.population_statistics(variables) for evaluator, variables in (ours, theirs)
    )
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("members", [1, 2])
def test_each_device_group_uses_its_own_statistics(config, members):
    config, devices = on(config, 4, members)
    _, state = trained(config, devices, updates=1)

    # On one device, each group's part of the batch in turn; gradients and statistics are averaged.
    groups, rows = 4 // members, config.batch_size * members // 4
    alone = tasks.load(config)
    start = train_step.create_state(alone, config)
    batch = alone.train_batch(0)
    gradients, statistics = [], []
    for group in range(groups):
        part = {**batch, "start": batch["start"][group * rows : (group + 1) * rows]}

        def loss_of(params, part=part):
            outputs, updated = alone.model.apply(
                {"params": params, "batch_stats": start.batch_stats},
                *alone.inputs(part),
                use_running_average=False,
                mutable=["batch_stats"],
            )
            total, count = alone.metrics(outputs, part)["loss"]
            return total / count, updated["batch_stats"]

        gradient, updated = jax.grad(loss_of, has_aux=True)(start.params)
        gradients.append(gradient)
        statistics.append(updated)
    mean_of = lambda trees: jax.tree.map(lambda *leaves: sum(leaves) / groups, *trees)  # noqa: E731
    expected = start.apply_gradients(grads=mean_of(gradients), batch_stats=mean_of(statistics))
    assert_close(state.batch_stats, expected.batch_stats, 1e-6)
    # Adam's first moments are a tenth of the gradients: its steps would hide their size.
    assert_close(state.opt_state[1].mu, expected.opt_state[1].mu, 1e-8)
    # Statistics of the whole batch would give other gradients.
    whole = trained(*on(config, 1), updates=1)[1]
    difference = np.max(
        np.abs(
            state.opt_state[1].mu["layer"]["recurrent_scale"]
            - whole.opt_state[1].mu["layer"]["recurrent_scale"]
        )
    )
    assert difference > 1e-6


def subprograms(equation):
    """The jaxprs in the parameters of an equation."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr"))
    jaxprs = (getattr(value, "jaxpr", value) for value in values)
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]


def sums_over_devices(jaxpr, in_scan=False):
    """For each sum over devices, whether it is in a scan over time, and its number of elements."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "psum":
            yield in_scan, sum(variable.aval.size for variable in equation.invars)
        for inner in subprograms(equation):
            yield from sums_over_devices(inner, in_scan or equation.primitive.name == "scan")


def sums_in_an_update(config, devices):
    """Sizes of the sums over devices in one update: in the scans over time, and outside."""
    task = tasks.load(config, devices)
    state = jax.eval_shape(lambda: train_step.create_state(task, config))
    sharding = devices.sharding(config.batch_size, task.shared)
    assert sharding.split
    batch = sharding.place(task.train_batch(0))
    step = train_step.make_train_step(task, NOISE)
    program = jax.make_jaxpr(lambda s, b: step(s, b, sharding=sharding))(state, batch).jaxpr
    found = list(sums_over_devices(program))
    return [[size for in_scan, size in found if in_scan == each] for each in (True, False)]


def test_time_steps_sum_only_statistics_over_devices(config):
    in_steps, outside = sums_in_an_update(*on(config, 8))
    # Forward, a time step sums three arrays for each normalised term: means, deviations from the
    # pooled mean, and squares. Backward it sums two arrays of gradients. The terms have 4H, 4H and
    # H units. The kernel's gradient has 4 H^2.
    units = config.model.features
    assert sum(in_steps) == (3 + 2) * 9 * units
    assert max(outside) == 4 * units**2

    in_steps, _ = sums_in_an_update(*on(config, 8, statistics_devices=1))
    assert in_steps == []


def test_sharded_readers_use_the_longest_passage_of_the_batch():
    """If padding counts, statistics depend on the longest passage of the whole batch."""
    rng = np.random.default_rng(0)
    passages, questions = rng.integers(3, 20, (4, 9)), rng.integers(3, 20, (4, 5))
    lengths, question_lengths = np.array([4, 3, 8, 6]), np.array([5, 4, 3, 5])
    batch = passages, questions, lengths, question_lengths

    def reader(axis_name):
        return AttentiveReader(
            20,
            6,
            **FORMS["bn_e_star"],
            quirks=Quirks(count_padding=True),
            axis_name=axis_name,
            passage_steps=9,
            question_steps=5,
            dropout_rate=0.0,
        )

    variables = reader(None).init(jax.random.key(1), *batch, use_running_average=True)

    def outputs(axis_name, *batch):
        return reader(axis_name).apply(
            variables, *batch, use_running_average=False, mutable=["batch_stats"]
        )

    expected, updated = jax.jit(lambda *b: outputs(None, *b))(*batch)
    shards = [jnp.reshape(x, (2, 2, *x.shape[1:])) for x in batch]
    found, each = jax.jit(jax.vmap(lambda *b: outputs("shards", *b), axis_name="shards"))(*shards)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)
    assert_close(jax.tree.map(lambda x: x[1], each), updated, 1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"devices": 8, "statistics_devices": 1, "batch_size": 8},
            "one example of config.batch_size 8: batch statistics need",
        ),
        ({"devices": 3}, "config.batch_size is 32: it must be divisible by the 3 devices"),
        ({"devices": 9}, "config.parallel.devices is 9: it must be at most 8"),
        (
            {"devices": 8, "statistics_devices": 3},
            "config.parallel.statistics_devices is 3: it must divide the 8 devices",
        ),
    ],
)
def test_invalid_device_counts_raise(config, fields, message):
    config = config.copy_and_resolve_references()
    config.batch_size = fields.pop("batch_size", config.batch_size)
    config.parallel.update(fields)
    with pytest.raises(UserError, match=re.escape(message)):
        parallel.make(config)


@pytest.mark.parametrize(
    "devices, statistics_devices, rows, splits",
    [
        (4, 1, 8, True),
        (4, 1, 6, False),  # not divisible
        (4, 1, 4, False),  # one row cannot have batch statistics
        (4, 2, 4, True),
        (4, 4, 4, True),
    ],
)
def test_rows_are_split_if_each_group_has_two(config, devices, statistics_devices, rows, splits):
    config = config.copy_and_resolve_references()
    config.parallel.update({"devices": devices, "statistics_devices": statistics_devices})
    assert parallel.make(config).splits(rows) == splits


@pytest.mark.parametrize("split, keys", [(True, 4), (False, 1)])
def test_devices_with_separate_rows_draw_independent_noise(config, split, keys):
    _, devices = on(config, 4)
    sharding = parallel.BatchSharding(devices.mesh, split)

    def own_key(noise):
        return jax.random.key_data(sharding.fold_in(noise))[None]

    mapped = jax.shard_map(
        own_key,
        mesh=devices.mesh,
        in_specs=parallel.REPLICATED,
        out_specs=parallel.BY_ROWS,
        check_vma=False,
    )
    assert len(np.unique(mapped(NOISE), axis=0)) == keys


def test_population_statistics_draw_independent_noise_per_device(small_config):
    small_config.model.initial_hidden_noise = 0.1
    small_config.population_batch_size, small_config.population_batches = 2, 1
    config, devices = on(small_config, 2)
    task = tasks.load(config, devices)
    variables = devices.replicate(train_step.variables_of(train_step.create_state(task, config)))
    evaluator = evaluate.Evaluator(task, config, NOISE, devices)
    found = evaluator.population_statistics(variables)
    # The first recurrent term is of the initial state, which only noise varies between examples.
    assert np.all(flatten_dict(found, sep="/")["layer/recurrent_var"][0] > 1e-6)


def test_resuming_with_other_statistics_rows_raises(config, tmp_path, caplog):
    """The number of devices may change, but not the number of examples that share statistics."""
    config = config.copy_and_resolve_references()
    config.num_updates = config.eval_every = config.checkpoint_every = 1
    config.parallel.update({"devices": 2, "statistics_devices": 1})
    train.train(config, tmp_path)
    config.num_updates = 2
    for devices, rows in ((4, "8"), (1, "None")):
        config.parallel.devices = devices
        message = f"other batch statistics: statistics_rows is 16 in that run, {rows} now;"
        with pytest.raises(UserError, match=message):
            train.train(config, tmp_path)
    config.parallel.devices = 1
    with caplog.at_level("WARNING"):
        train.evaluate_run(config, tmp_path)
    rows = f"over {config.batch_size} examples in this evaluation, over 16 in training"
    assert rows in caplog.text
    config.parallel.devices = 2
    assert train.train(config, tmp_path)["updates"] == 2
    record = workdir.read_record(tmp_path)
    rows = record.pop("statistics_rows")  # earlier versions did not record it
    files.write_json(tmp_path / "run.json", record)
    workdir.check_record({"statistics_rows": rows // 2}, tmp_path)


def test_models_without_batch_statistics_record_no_statistics_rows(small_config, tmp_path):
    small_config.model.kind = "lstm"
    config, _ = on(small_config, 4, 1)
    assert "statistics_rows" not in train.Setup.load(config, tmp_path).record


def test_several_updates_per_call_match_single_updates(config):
    own, devices = on(config, 4)
    task, one_by_one = trained(own, devices, updates=3)
    state = devices.replicate(train_step.create_state(task, own))
    sharding = devices.sharding(own.batch_size, task.shared)
    assert sharding.split
    batches = [sharding.place(task.train_batch(u)) for u in range(3)]
    state = train_step.make_train_step(task, NOISE)(state, *batches, sharding=sharding)
    assert_close(state.params, one_by_one.params, 1e-6)
    assert int(state.step) == 3
