"""The Attentive Reader against the plain loops of tests/reference_reader.py, and its properties.

Most tests are in double precision, so that rounding cannot hide a wrong formula.
"""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnlstm_jax
from experiments.models.attentive_reader import FORMS, AttentiveReader, Encoder, Quirks
from tests import reference_reader

WORDS, UNITS, BATCH, TIME, QUESTION = 11, 3, 4, 6, 4
ROWS = TIME - 1  # of the passage's tables; the last row serves the last two steps

NORMALISED = [form for form in FORMS if form != "lstm"]
SEQUENCE = ["bn_e_star", "bn_e_star_star"]
# Lengths of passages and questions: with padding after the longest; without; with an empty passage
# and an empty question; all empty.
LENGTHS = {
    "padded": ((4, 1, 3, 2), (3, 1, 2, 2)),
    "full": ((6, 1, 3, 2), (4, 1, 4, 2)),
    "empty": ((4, 0, 3, 2), (3, 1, 0, 2)),
    "all empty": ((0,) * BATCH, (0,) * BATCH),
}

# Double precision: one normalisation multiplies a rounding error (1e-16) by at most
# 1 / sqrt(epsilon) = 1000, and about a dozen follow each other.
VALUES = dict(rtol=1e-9, atol=1e-9)
# Central differences of functions of order 10: rounding gives 1e-15 * 10 / 1e-6 = 1e-8 and up to
# 316 times that where a normalised term varies little.
GRADIENTS = dict(rtol=1e-6, atol=5e-6)
# Logits of order one in single precision; small standard deviations amplify rounding.
SINGLE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def full_precision_products():
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def make_reader(form, mask=False, param_dtype=jnp.float64, quirks=None, **options):
    options = dict(passage_steps=ROWS, question_steps=QUESTION, momentum=0.0) | options
    options["param_dtype"] = param_dtype
    quirks = dataclasses.replace(quirks or Quirks(), count_padding=not mask)
    return AttentiveReader(WORDS, UNITS, quirks=quirks, **FORMS[form], **options)


def make_batch(lengths="padded", seed=0):
    rng = np.random.default_rng(seed)
    passages = rng.integers(0, WORDS, (BATCH, TIME))
    questions = rng.integers(0, WORDS, (BATCH, QUESTION))
    return passages, questions, *map(np.array, LENGTHS[lengths])


@functools.cache
def shapes(form, **steps):
    init = functools.partial(make_reader(form, **steps).init, use_running_average=True)
    with jax.enable_x64(True):
        return jax.eval_shape(init, jax.random.key(0), *make_batch())


def draw(form, seed=0, **steps):
    """Random parameters, statistics, and weights of a linear functional of the logits."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        if name.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape.shape)
        return 0.7 * rng.normal(size=shape.shape)

    variables = jax.tree.map_with_path(leaf, dict(shapes(form, **steps)))
    return variables["params"], variables.get("batch_stats", {}), rng.normal(size=(BATCH, WORDS))


def applied(reader, params, stats, batch, train, **kwargs):
    """Logits, attention and updated statistics."""
    logits, updated = reader.apply(
        {"params": params, "batch_stats": stats},
        *batch,
        use_running_average=not train,
        mutable=["batch_stats", "intermediates"],
        **kwargs,
    )
    (attention,) = updated["intermediates"]["attention"]
    return logits, attention, updated.get("batch_stats", {})


@functools.cache
def values(form, train, mask=False, **options):
    reader = make_reader(form, mask, **options)
    return jax.jit(lambda *arguments: applied(reader, *arguments, train))


@functools.cache
def gradients(form):
    """A compiled function: gradients of weighted logits in training; statistics mask padding."""
    reader = make_reader(form, mask=True)

    def value(params, stats, batch, weights):
        return (weights * applied(reader, params, stats, batch, True)[0]).sum()

    return jax.jit(jax.grad(value))


def run(form, train, mask, params, stats, batch):
    """Logits, attention and statistics."""
    return values(form, train, train and mask)(params, stats, batch)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_close(found, expected, **tolerance):
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, err_msg=path, **tolerance)


def statistics_after(stats, found):
    """Running averages with momentum 0: a batch replaces the rows of the steps that it reaches."""
    flat = dict(leaves(stats))
    for path, new in leaves(found).items():
        old = flat[path]
        if old.ndim == 2:
            new = np.concatenate([new[: len(old)], old[len(new) :]])
        flat[path] = np.where(np.isnan(new), old, new)
    return jax.tree.unflatten(jax.tree.structure(stats), flat.values())


# ---- The forms.


def test_parameter_shapes_match_the_paper():
    k, gates = 2 * UNITS, 4 * UNITS
    layer = {
        "input_kernel": (UNITS, gates),
        "recurrent_kernel": (UNITS, gates),
        "bias": (gates,),
        "initial_hidden": (UNITS,),
    }
    lstm = {
        "embedding": (WORDS, UNITS),
        **{f"{name}_kernel": (UNITS, UNITS) for name in reader_terms()},
        "bilinear_kernel": (UNITS, UNITS),
        "attention_kernel": (UNITS, 1),
        "attention_bias": (UNITS,),
        "readout_bias": (UNITS,),
        "passage": {"forward": layer},
        "question": {"forward": layer},
        "readout": {"kernel": (UNITS, WORDS), "bias": (WORDS,)},
    }
    of_shapes = {form: jax.tree.map(jnp.shape, shapes(form)) for form in FORMS}
    assert of_shapes["lstm"]["params"] == lstm
    assert of_shapes["lstm"].keys() == {"params"}

    layer |= {"cell_bias": (UNITS,), "cell_scale": (UNITS,)}
    layer |= {"input_scale": (gates,), "recurrent_scale": (gates,)}
    assert of_shapes["bn_lstm"]["params"] == lstm  # in which `layer` is now a BN-LSTM's

    norms = {f"{name}_norm": {"scale": (UNITS,)} for name in reader_terms()}
    assert of_shapes["bn_everywhere"]["params"] == lstm | norms
    assert of_shapes["bn_e_star"]["params"] == lstm | norms
    both = lstm | norms | {f"{name}_kernel": (k, UNITS) for name in reader_terms()}
    both |= {"bilinear_kernel": (k, k)}
    both |= {encoder: {"forward": layer, "backward": layer} for encoder in ("passage", "question")}
    assert of_shapes["bn_e_star_star"]["params"] == both


def test_statistics_tables_have_the_configured_steps():
    for form in NORMALISED:
        stats = jax.tree.map(jnp.shape, shapes(form)["batch_stats"])
        for encoder, rows in (("passage", ROWS), ("question", QUESTION)):
            for layer in stats[encoder].values():
                table = () if form in SEQUENCE else (rows,)
                assert layer["input_mean"] == layer["input_var"] == (*table, 4 * UNITS)
                assert layer["recurrent_mean"] == layer["recurrent_var"] == (rows, 4 * UNITS)
                assert layer["cell_mean"] == layer["cell_var"] == (rows, UNITS)


def reader_terms():
    return "passage", "question", "attended", "readout_question", "mean"


# Form, training or inference, and whether statistics mask padding. The authors' arrays
# (test_reader_against_authors.py) cover the other combinations.
RUNS = [
    *((form, True, False) for form in FORMS),
    ("bn_everywhere", True, True),
    ("bn_e_star_star", True, True),
    ("bn_everywhere", False, False),
    ("bn_e_star_star", False, False),
]


@pytest.mark.parametrize("form, train, mask", RUNS)
def test_reader_matches_the_reference(form, train, mask, double):
    params, stats, _ = draw(form)
    for lengths in LENGTHS:
        batch = make_batch(lengths)
        result = run(form, train, mask, params, stats, batch)
        logits, attention, found = reference_reader.read(
            form, params, *batch, mask_statistics=mask, statistics=None if train else stats
        )
        np.testing.assert_allclose(result[0], logits, err_msg=lengths, **VALUES)
        np.testing.assert_allclose(result[1], attention, err_msg=lengths, **VALUES)
        assert_close(result[2], statistics_after(stats, found) if train else stats, **VALUES)


@pytest.mark.parametrize("form", ["bn_everywhere", "bn_e_star_star"])
def test_gradients_match_finite_differences_of_the_reference(form, double):
    params, stats, weights = draw(form, seed=1)
    batch = make_batch()
    found = gradients(form)(params, stats, batch, weights)
    flat, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)

    def value(k, moved):
        moved = jax.tree.unflatten(structure, [*flat[:k], moved, *flat[k + 1 :]])
        return (weights * reference_reader.read(form, moved, *batch, mask_statistics=True)[0]).sum()

    for k, (path, gradient) in enumerate(leaves(found).items()):
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            ends = [value(k, flat[k] + step * direction) for step in (1e-6, -1e-6)]
            expected = (ends[0] - ends[1]) / 2e-6
            derivative = (gradient * direction).sum()
            np.testing.assert_allclose(derivative, expected, err_msg=path, **GRADIENTS)


def test_epsilon_is_configurable(double):
    params, stats, _ = draw("bn_e_star")
    logits, _, _ = values("bn_e_star", False, epsilon=0.2)(params, stats, make_batch())
    expected, _, _ = reference_reader.read(
        "bn_e_star", params, *make_batch(), statistics=stats, epsilon=0.2
    )
    np.testing.assert_allclose(logits, expected, **VALUES)


# ---- Padding.


def other_padding(batch):
    """The batch with other words in its padding."""
    passages, questions, *lengths = batch
    words = [
        np.where(np.arange(x.shape[1]) < n[:, None], x, (x + 1) % WORDS)
        for x, n in zip((passages, questions), lengths, strict=True)
    ]
    return *words, *lengths


def more_padding(batch):
    passages, questions, *lengths = batch
    words = [np.pad(x, ((0, 0), (0, 2)), constant_values=1) for x in (passages, questions)]
    return *words, *lengths


RUNS_BLIND_TO_PADDING = [
    ("lstm", True, False),
    ("bn_everywhere", True, True),
    ("bn_e_star", True, False),
    ("bn_e_star_star", True, True),
    ("bn_e_star_star", False, False),
]


@pytest.mark.parametrize("form, train, mask", RUNS_BLIND_TO_PADDING)
def test_padding_does_not_change_outputs_and_statistics(form, train, mask, double):
    params, stats, _ = draw(form)
    batch = make_batch()  # one step of padding after the longest passage may count
    logits, attention, updated = run(form, train, mask, params, stats, batch)
    longer = values(form, train, mask)(params, stats, more_padding(batch))
    for changed in (run(form, train, mask, params, stats, other_padding(batch)), longer):
        other, weights, statistics = changed
        np.testing.assert_allclose(other, logits, **VALUES)
        np.testing.assert_allclose(weights[:, :TIME], attention, **VALUES)
        assert np.all(weights[:, TIME:] == 0)
        last = ["passage_norm"] + [encoder for encoder in ("passage", "question") if mask]
        for name in set(last) & set(updated):
            assert_close(statistics[name], updated[name], **VALUES)


def test_padding_changes_outputs_unless_statistics_mask_it(double):
    form = "bn_everywhere"
    params, stats, _ = draw(form)
    batch = make_batch()
    for mask in (False, True):
        runs = [run(form, True, mask, params, stats, b) for b in (batch, other_padding(batch))]
        assert np.allclose(runs[0][0], runs[1][0], atol=1e-3) == mask


@pytest.mark.parametrize("form", ["bn_everywhere", "bn_e_star_star"])
def test_gradients_of_empty_passages_and_questions_are_finite(form, double):
    params, stats, weights = draw(form)
    for lengths in ("empty", "all empty"):
        found = gradients(form)(params, stats, make_batch(lengths), weights)
        for path, leaf in leaves(found).items():
            assert np.isfinite(leaf).all(), path


# ---- Statistics.


def test_population_statistics_are_averages_over_batches(double):
    form, mask, late_steps = "bn_everywhere", True, "repeat"
    steps = dict(passage_steps=TIME, question_steps=QUESTION + 1)
    params, stats, _ = draw(form, **steps)
    reader = make_reader(form, mask, **steps)
    # The longest passage and question have 6 and 4 words in one batch, 4 and 3 in the other. No
    # question reaches the last row of its table.
    batches = [make_batch("full"), make_batch("padded", 1)]
    got = bnlstm_jax.estimate_population_statistics(
        reader,
        {"params": params, "batch_stats": stats},
        batches,
        late_steps=late_steps,
        use_running_average=False,
    )
    each = [
        leaves(reference_reader.read(form, params, *batch, mask_statistics=mask)[2])
        for batch in batches
    ]
    assert leaves(got).keys() == each[0].keys()
    for path, statistic in leaves(got).items():
        found = [moments[path] for moments in each]
        if statistic.ndim == 2:
            # Rows are NaN only at masked steps, which are the last ones.
            found = [moment[~np.isnan(moment).any(axis=1)] for moment in found]
            steps = max(map(len, found))
            found = [np.pad(m, ((0, steps - len(m)), (0, 0)), mode="edge") for m in found]
            table = np.mean(found, axis=0)
            expected = np.pad(table, ((0, len(statistic) - steps), (0, 0)), mode="edge")
        else:
            expected = np.mean(found, axis=0)
        np.testing.assert_allclose(statistic, expected, err_msg=path, **VALUES)


def test_inference_with_statistics_of_one_batch_matches_training(double):
    form, mask = "bn_everywhere", True
    params, stats, _ = draw(form)
    words = make_batch()[:2]
    # No longer than the tables. At least two sequences reach each step: one has no variance.
    batch = *words, np.array((4, 1, 3, 4)), np.array((3, 1, 3, 2))
    training = run(form, True, mask, params, stats, batch)
    found = bnlstm_jax.estimate_population_statistics(
        make_reader(form, mask),
        {"params": params, "batch_stats": stats},
        [batch],
        use_running_average=False,
    )
    inference = values(form, False)(params, found, batch)
    for mine, wanted in zip(inference[:2], training[:2], strict=True):
        # At the first step inference subtracts a mean from values equal to it, up to rounding.
        np.testing.assert_allclose(mine, wanted, rtol=1e-8, atol=1e-8)


def test_inference_needs_no_mapped_axis(double):
    form = "bn_e_star_star"
    params, stats, _ = draw(form)
    expected = run(form, False, False, params, stats, make_batch())
    found = values(form, False, axis_name="devices")(params, stats, make_batch())
    np.testing.assert_array_equal(found[0], expected[0])


# ---- Dropout.


def dropped(reader, params, batch, key=None, **kwargs):
    """Logits, and the inputs of the encoders."""
    given = {}
    key = None if key is None else jax.random.key(key)

    def spy(call, args, kwargs, context):
        if isinstance(context.module, Encoder) and context.method_name == "__call__":
            given[context.module.name] = jnp.stack(args[0])
        return call(*args, **kwargs)

    def both(params, key):
        rngs = None if key is None else {"dropout": key}
        with nn.intercept_methods(spy):
            return reader.apply({"params": params}, *batch, rngs=rngs, **kwargs), given

    return jax.jit(both)(params, key)


def single_reader(**options):
    """A bidirectional reader without statistics, in single precision, its parameters and words."""
    reader = AttentiveReader(WORDS, UNITS, bidirectional=True, **options)
    batch = make_batch()
    params = jax.eval_shape(reader.init, jax.random.key(0), *batch)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.uniform(0.1, 0.4, x.shape).astype(np.float32), params)
    return reader, params, batch


def test_dropout_is_off_without_a_key_or_if_deterministic():
    reader, params, batch = single_reader(dropout_rate=0.25)
    plain, _ = dropped(reader.clone(dropout_rate=0.0), params, batch)
    first, second = (dropped(reader, params, batch, key)[0] for key in (1, 3))
    np.testing.assert_array_equal(dropped(reader, params, batch)[0], plain)
    np.testing.assert_array_equal(dropped(reader, params, batch, 1, deterministic=True)[0], plain)
    np.testing.assert_array_equal(dropped(reader, params, batch, 1)[0], first)
    # Each example has its own mask.
    assert np.all(np.any(first != second, axis=1)) and np.all(np.any(first != plain, axis=1))


def test_dropout_applies_to_embeddings_and_the_answer():
    keep = 0.75
    reader, params, batch = single_reader(dropout_rate=1 - keep)
    _, given = dropped(reader, params, batch, 1)
    masks = []
    for name, words in zip(("passage", "question"), batch, strict=False):
        embedded = params["embedding"][words]
        for of_direction in given[name]:
            mask = of_direction != 0  # embeddings are positive
            np.testing.assert_allclose(of_direction, np.where(mask, embedded / keep, 0), rtol=1e-6)
            masks.append(mask)
    # Independent in every element, direction and sequence: 240 draws, a standard deviation of 3%.
    assert abs(np.concatenate(masks, axis=None).mean() - keep) < 0.12
    same = [np.mean(a == b) for a, b in (masks[:2], masks[2:])]
    assert max(same) < 0.9  # of 72 and 48; 0.625 by chance
    assert all(len(np.unique(mask[b], axis=0)) > 1 for mask in masks for b in range(BATCH))

    # An identity read-out shows the answer vector g. Zero embeddings leave only the dropout of g.
    params["embedding"] *= 0
    params["readout"] = {"kernel": np.eye(UNITS, WORDS, dtype=np.float32), "bias": np.zeros(WORDS)}
    whole, _ = dropped(reader.clone(dropout_rate=0.0), params, batch)
    answers = jax.jit(
        jax.vmap(lambda key: reader.apply({"params": params}, *batch, rngs={"dropout": key}))
    )(jax.random.split(jax.random.key(3), 1000))[..., :UNITS]
    whole = whole[:, :UNITS]
    mask = answers != 0
    np.testing.assert_allclose(answers, np.where(mask, whole / keep, 0), rtol=1e-5)
    # Inference gives the mean over keys. The mean of 1000 keys has a standard deviation of 2%.
    inference = dropped(reader, params, batch)[0][:, :UNITS]
    np.testing.assert_allclose(answers.mean(0), inference, rtol=0.1)
    np.testing.assert_allclose(inference, whole, rtol=1e-6)


def test_unscaled_dropout_matches_scaled_dropout_of_smaller_weights():
    keep = 0.75
    reader, params, batch = single_reader(dropout_rate=1 - keep)
    smaller = params | {
        "embedding": keep * params["embedding"],
        "readout": params["readout"] | {"kernel": keep * params["readout"]["kernel"]},
    }
    for key in (None, 1):  # at inference, in training
        unscaled, _ = dropped(
            reader.clone(quirks=Quirks(unscaled_dropout=True)), params, batch, key
        )
        scaled, _ = dropped(reader, smaller, batch, key)
        np.testing.assert_allclose(unscaled, scaled, **SINGLE)
        assert not np.allclose(unscaled, dropped(reader, params, batch, key)[0], atol=1e-2)


# ---- Initial values and precision.


def blocks(params, units):
    """All square blocks with orthogonal initial values, of a reader in one or two directions.

    The bilinear kernel is among them if it has the same size.
    """
    layers = [layer for name in ("passage", "question") for layer in params[name].values()]
    kernels = [layer[name] for layer in layers for name in ("input_kernel", "recurrent_kernel")]
    if len(layers) == 2:
        kernels += [params["bilinear_kernel"], params["passage_kernel"]]
    return np.concatenate([np.split(k, k.shape[1] // units, axis=1) for k in kernels])


@pytest.mark.parametrize("form, identical", [("bn_lstm", False), ("bn_e_star_star", True)])
def test_initial_values_have_the_expected_distributions(form, identical):
    units, words = 8, 50
    scale = 0.2 if identical else 0.1  # 0.1 is the default
    options = dict(scale_init=nn.initializers.constant(scale)) if identical else {}
    reader = AttentiveReader(
        words, units, quirks=Quirks(identical_blocks=identical), **FORMS[form], **options
    )
    init = jax.jit(functools.partial(reader.init, use_running_average=True))
    params = init(jax.random.key(1), *make_batch())["params"]
    squares = blocks(params, units)
    assert len(squares) == (32 if form == "bn_e_star_star" else 18)
    for a, b in itertools.combinations(squares, 2):
        assert np.array_equal(a, b) == identical
    for matrix in [*squares, params["bilinear_kernel"]]:
        np.testing.assert_allclose(matrix @ matrix.T, 0.0025 * np.eye(len(matrix)), atol=1e-8)

    uniform = {name: params[f"{name}_kernel"] for name in reader_terms()[1:]}
    uniform |= {"embedding": params["embedding"], "readout": params["readout"]["kernel"]}
    if form == "bn_e_star_star":  # not square
        uniform["passage"] = params["passage_kernel"]
    for name, matrix in uniform.items():
        bound = np.sqrt(6 / (sum(matrix.shape) + 1))
        # The largest of at least 64 draws is below 0.9 of the bound once in 800 times.
        assert 0.9 * bound < np.abs(matrix).max() <= bound, name
        assert abs(matrix.mean()) < 0.3 * bound, name
    alike = [matrix for matrix in uniform.values() if matrix.shape == uniform["question"].shape]
    assert len(alike) == (5 if form == "bn_e_star_star" else 4)
    for a, b in itertools.combinations(alike, 2):
        assert np.array_equal(a, b) == identical
    width = np.abs(params["attention_kernel"]).max() * np.sqrt(units)
    assert 0.5 < width <= 1

    for path, leaf in leaves(params).items():
        if path.endswith(("bias']", "initial_hidden']")):
            assert np.all(leaf == 0), path
        if path.endswith("scale']"):
            assert np.all(leaf == np.float32(scale)), path


def test_float32_and_bfloat16_are_close_to_the_reference():
    params, stats, _ = jax.tree.map(np.float32, draw("bn_e_star"))
    batch = make_batch()
    exact = jax.tree.map(np.float64, params)
    expected, _, _ = reference_reader.read("bn_e_star", exact, *batch)
    single = make_reader("bn_e_star", param_dtype=jnp.float32)

    def read(params, reader):
        return applied(reader, params, stats, batch, True)[0]

    logits = jax.jit(functools.partial(read, reader=single))(params)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, **SINGLE)

    logits = jax.jit(functools.partial(read, reader=single.clone(dtype=jnp.bfloat16)))(params)
    assert logits.dtype == jnp.float32
    # Products round their factors by 2^-9; normalisation over four rows amplifies that.
    assert 1e-4 < np.abs(logits - expected).max() < 0.3


def test_matrix_products_have_bfloat16_operands():
    params, stats, _ = jax.tree.map(np.float32, draw("bn_e_star"))
    reader = make_reader("bn_e_star", param_dtype=jnp.float32, dtype=jnp.bfloat16)
    program = jax.jit(lambda params: applied(reader, params, stats, make_batch(), True)[0])
    pairs = re.findall(r"dot_general.*: \((.*)\) -> ", program.lower(params).as_text())
    # Two for each encoder, five terms, three for the bilinear term, attention, answer.
    coarse = [pair for pair in pairs if pair.count("bf16") == 2]
    assert len(coarse) == 4 + 5 + 3 + 1 + 1
    # The others are sums over the batch for statistics, as products with a row of weights.
    sums = [pair for pair in pairs if pair.startswith(f"tensor<1x{BATCH}xf32>")]
    assert sums and len(coarse) + len(sums) == len(pairs)
