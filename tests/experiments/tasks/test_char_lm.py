import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ptb, text
from experiments import evaluate, tasks, train
from experiments.records.checkpoints import read_best
from experiments.runtime.errors import UserError
from experiments.tasks import char_lm
from tests import reference

NOISE = jax.random.key(0)
SIZES = {"train": 613, "valid": 205, "test": 231}
LENGTH = 10
LETTERS = "abcdefg \n"


def write_text(path, seed=0):
    letters = np.random.default_rng(seed).choice(list(LETTERS), sum(SIZES.values()))
    path.write_text("".join(letters))
    return path.read_text()


@pytest.fixture
def config(tmp_path):
    """A small BN-LSTM on a short text of random letters."""
    config = text.get_config()
    config.text_file = str(tmp_path / "letters.txt")
    write_text(tmp_path / "letters.txt")
    config.split = tuple(SIZES.values())
    config.segment_length = LENGTH
    config.batch_size = 16
    config.eval_batch_size = 7
    config.population_batch_size = 20
    config.num_updates = 4
    config.log_every = 2
    config.eval_every = 2
    config.checkpoint_every = 2
    config.model.features = 5
    return config


def random_variables(task):
    """Random parameters and statistics, which differ between time steps."""
    symbols = jnp.zeros((1, LENGTH - 1), jnp.int32)
    shapes = jax.eval_shape(
        lambda: task.model.init(jax.random.key(0), symbols, use_running_average=True)
    )
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key.endswith("_var"):
            return rng.uniform(0.2, 2, leaf.shape).astype(np.float32)
        return (0.7 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def by_hand(variables, symbols, batch_statistics=False):
    """Nats of each prediction, and whether it is right, for symbols `[batch, time]`."""
    params = variables["params"]
    statistics = variables.get("batch_stats", {}).get("layer", {})
    inputs = np.eye(params["layer"]["input_kernel"].shape[0])[symbols[:, :-1]]
    hidden, _, _ = reference.bn_lstm(
        params["layer"],
        inputs,
        normalize=reference.TERMS if statistics else (),
        statistics=None if batch_statistics else statistics,
    )
    logits = hidden @ params["readout"]["kernel"] + params["readout"]["bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, symbols[:, 1:, None], axis=-1)[..., 0]
    return nats, logits.argmax(-1) == symbols[:, 1:]


def test_epochs_cut_the_text_without_overlap_at_every_offset(config):
    task = tasks.load(config)
    updates = math.ceil((SIZES["train"] // LENGTH - 1) / config.batch_size)
    offsets, orders = set(), set()
    for epoch in range(80):
        batches = [task.train_batch(updates * epoch + n) for n in range(updates)]
        sizes = [len(batch["start"]) for batch in batches]
        assert sizes == [16, 16, 16, 12]  # the last batch is short: 60 segments
        starts = np.concatenate([batch["start"] for batch in batches])
        positions = np.sort((starts[:, None] + batches[0]["steps"]).ravel())
        # Segments cover a part of the text without gaps, from an offset of less than a segment.
        np.testing.assert_array_equal(positions, positions[0] + np.arange(60 * LENGTH))
        assert 0 <= positions[0] < LENGTH and positions[-1] < SIZES["train"]
        offsets.add(int(positions[0]))
        orders.add(tuple((starts - positions[0]).tolist()))
    assert offsets == set(range(LENGTH)) and len(orders) == 80


def test_batches_are_segments_of_the_text(config, tmp_path):
    task = tasks.load(config)
    whole = (tmp_path / "letters.txt").read_text()
    vocabulary = task.record["vocabulary"]
    assert vocabulary == "".join(sorted(LETTERS)) + "\ufffd"

    def texts(split, batch, start):
        end = start + SIZES[split]
        segments = [whole[start:end][s : s + LENGTH] for s in batch["start"]]
        got = np.asarray(char_lm.gather(batch))
        assert ["".join(vocabulary[i] for i in row) for row in got] == segments

    texts("train", task.train_batch(3), 0)
    batches = list(task.batches("valid", 7, task.readings[0]))
    assert [len(batch["start"]) for batch in batches] == [7, 7, 6]
    texts("valid", batches[1], SIZES["train"])
    starts = np.concatenate([batch["start"] for batch in batches])
    np.testing.assert_array_equal(np.sort(starts), LENGTH * np.arange(20))
    np.testing.assert_array_equal(task.train_batch(9)["start"], task.train_batch(9)["start"])
    assert np.any(task.train_batch(9)["start"] != task.train_batch(5)["start"])


def test_text_is_stored_on_the_device_as_uint8(config):
    task = tasks.load(config)
    batch = task.train_batch(0)
    assert isinstance(batch["text"], jax.Array) and batch["text"].dtype == jnp.uint8
    assert batch["text"] is task.train_batch(1)["text"]
    from_host = [value for value in batch.values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in from_host) == 4 * (16 + LENGTH)


@pytest.mark.parametrize("kind", ["lstm", "bn_lstm"])
def test_whole_text_evaluation_does_not_depend_on_chunk_length(config, kind):
    config.model.kind = kind
    results = []
    for length in (1, 7, 64, 230, 1000):
        config.chunk_length = length
        task = tasks.load(config)
        reading = task.readings[-1]
        assert reading.name == "one sequence" and reading.continued
        assert task.num_examples("test", reading) == math.ceil(230 / length)
        variables = random_variables(task)
        evaluator = evaluate.Evaluator(task, config, NOISE)
        results.append(evaluator.evaluate(variables, reading, "test", "population", 1))
    symbols = np.asarray(task.text["test"])[None]
    nats, right = by_hand(variables, symbols)
    assert nats.shape == (1, SIZES["test"] - 1)
    for result in results:
        np.testing.assert_allclose(result["loss"], nats.mean(), rtol=1e-5)
        np.testing.assert_allclose(result["bits_per_character"], nats.mean() / np.log(2), rtol=1e-5)
        assert result["accuracy"] == right.mean()


@pytest.mark.parametrize("statistics", ["population", "batch"])
@pytest.mark.parametrize("length", [LENGTH, 4, 33])
def test_segment_evaluation_matches_the_reference_at_any_length(config, length, statistics):
    batch_statistics = statistics == "batch"
    config.eval_lengths = (length,)
    task = tasks.load(config)
    reading = next(r for r in task.readings if r.name == f"segments of {length}")
    variables = random_variables(task)
    evaluator = evaluate.Evaluator(task, config, NOISE)
    got = evaluator.evaluate(variables, reading, "test", statistics, 7)

    count = SIZES["test"] // length
    segments = np.asarray(task.text["test"])[: count * length].reshape(count, length)
    segments = segments[tasks.evaluation_order(count)]
    count -= batch_statistics and count % 7 == 1  # a last batch of one is left out
    parts = [
        by_hand(variables, segments[first : min(first + 7, count)], batch_statistics)
        for first in range(0, count, 7)
    ]
    nats, right = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert nats.shape == (count, length - 1)
    np.testing.assert_allclose(got["loss"], nats.mean(), rtol=1e-4)
    np.testing.assert_allclose(got["accuracy"], right.mean(), rtol=1e-6)


def test_evaluation_rows_name_statistics_reading_and_split(config):
    config.eval_lengths = (5, LENGTH, 20)
    config.whole_text = ("valid, test",)  # as the command line gives it
    segments = [f"segments of {n}" for n in (LENGTH, 5, 20)]
    for kind in ("lstm", "bn_lstm"):
        config.model.kind = kind
        task = tasks.load(config)
        variables = random_variables(task)
        evaluator = evaluate.Evaluator(task, config, NOISE)
        population = evaluator.population_statistics(variables) if kind == "bn_lstm" else None
        rows = list(evaluator.evaluate_all(variables, population))
        ways = {(row["statistics"], row["reading"], row["split"]): row["loss"] for row in rows}
        everywhere = {(segments[0], s) for s in ("valid", "test")}
        longer = {(name, "test") for name in segments[1:]}
        whole = {("one sequence", s) for s in ("valid", "test")}
        if kind == "lstm":
            expected = {("none", *way) for way in everywhere | longer | whole}
        else:
            expected = {("batch", *way) for way in everywhere | longer}
            expected |= {("running", *way) for way in everywhere}
            expected |= {("population", *way) for way in everywhere | longer | whole}
        assert set(ways) == expected and len(set(ways.values())) == len(rows)


def test_only_validation_uses_the_training_batch_size(config):
    """The paper's results by length use one batch size, also at the length of training."""
    config.model.kind, config.batch_size, config.eval_batch_size = "bn_lstm", 16, 7
    task = tasks.load(config)
    variables = random_variables(task)
    evaluator = evaluate.Evaluator(task, config, NOISE)
    rows = list(evaluator.evaluate_all(variables, evaluator.population_statistics(variables)))
    validated = functools.partial(evaluator.evaluate, variables, task.readings[0])
    for split, size in (("valid", 16), ("test", 7)):
        (row,) = (r for r in rows if (r["split"], r["statistics"]) == (split, "batch"))
        assert row["loss"] == validated(split, "batch", size)["loss"]
        other = validated(split, "batch", 23 - size)["loss"]
        assert abs(row["loss"] - other) > 1e-4


@pytest.mark.parametrize("most, used", [(0, 3), (2, 2)])
def test_population_statistics_are_means_over_training_segments(config, most, used):
    config.population_batches = most
    task = tasks.load(config)
    variables = random_variables(task)
    got = evaluate.Evaluator(task, config, NOISE).population_statistics(variables)["layer"]
    segments = np.asarray(task.text["train"])[:610].reshape(61, LENGTH)
    found = []
    for batch in np.split(tasks.evaluation_order(61)[:60], 3)[:used]:  # one segment is left over
        inputs = np.eye(len(LETTERS) + 1)[segments[batch, :-1]]
        found.append(reference.bn_lstm(variables["params"]["layer"], inputs)[2])
    for name, values in got.items():
        expected = np.mean([f[name] for f in found], axis=0)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_metrics_are_means_over_predictions(config):
    task = tasks.load(config)
    batch = task.train_batch(0)
    logits = np.random.default_rng(0).normal(size=(16, LENGTH - 1, len(LETTERS) + 1))
    metrics = task.metrics(jnp.asarray(logits, jnp.float32), batch)
    targets = np.asarray(char_lm.gather(batch))[:, 1:]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, targets[..., None], -1))
    values = {name: float(total / count) for name, (total, count) in metrics.items()}
    np.testing.assert_allclose(values["loss"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(values["bits_per_character"], nats.mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(values["accuracy"], (logits.argmax(-1) == targets).mean())


def test_run_saves_population_statistics_and_data_description(config, tmp_path):
    folder = tmp_path / "run"
    results = train.train(config, folder)
    assert results["data"] == "letters.txt (613 / 205 / 231 characters)"
    record = json.loads((folder / "run.json").read_text())
    assert record["dataset"] == results["data"] and record["characters"] == SIZES
    assert record["vocabulary"] == "".join(sorted(LETTERS)) + "\ufffd"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["split"] == "valid"]
    assert {row["reading"] for row in valid} == {"segments of 10"}

    # The best checkpoint has the fewest bits, and its evaluation uses the batches of validation.
    best = min(valid, key=lambda row: row["bits_per_character"])
    assert results["update"] == best["update"]
    again = next(row for row in results["rows"] if row["statistics"] == "batch")
    assert again["bits_per_character"] == best["bits_per_character"]

    # The results were computed with the saved statistics.
    with np.load(folder / "population_statistics.npz") as file:
        assert int(file["update"]) == results["update"]
        saved = {name.removeprefix("layer/"): file[name] for name in file if name != "update"}
    assert saved["recurrent_mean"].shape == (LENGTH - 1, 20) and len(saved) == 6
    task = tasks.load(config)
    _, variables, _ = read_best(folder)
    np.testing.assert_array_equal(variables["batch_stats"]["layer"]["cell_var"], saved["cell_var"])
    nats, _ = by_hand(variables, np.asarray(task.text["test"])[None])
    row = next(r for r in results["rows"] if r["reading"] == "one sequence")
    np.testing.assert_allclose(row["loss"], nats.mean(), rtol=1e-4)


@pytest.mark.parametrize("change", ["vocabulary", "text"])
def test_resuming_with_other_data_raises(config, tmp_path, change):
    folder = tmp_path / "run"
    train.train(config, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    letters = write_text(tmp_path / "letters.txt", seed=1)
    if change == "vocabulary":
        (tmp_path / "letters.txt").write_text(letters.replace("a", "x"))
    what = {"vocabulary": "vocabulary", "text": "dataset_sha256"}[change]
    for run in (train.train, train.evaluate_run):
        with pytest.raises(UserError, match=f"other data: {what} is '.*choose another workdir"):
            run(config, folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segment_length": 1}, r"config\.segment_length is 1: .* whole number, at least 2"),
        ({"chunk_length": 0}, r"config\.chunk_length is 0: .* whole number, at least 1"),
        ({"eval_lengths": (20, 1)}, r"config\.eval_lengths is 1: .* whole number, at least 2"),
        ({"eval_lengths": (20.5,)}, r"config\.eval_lengths is 20\.5: .* whole number"),
        ({"eval_lengths": ("abc",)}, r"config\.eval_lengths is 'abc': .* whole number"),
        ({"eval_lengths": (300,)}, r"config\.eval_lengths has 300: it must be at most 231"),
        ({"whole_text": ("tset",)}, r"config\.whole_text is 'tset'.*did you mean test"),
        ({"selection": "loss"}, r"config\.selection is 'loss'"),
        ({"segment_length": 206}, r"the valid text of letters\.txt .* has 205 characters"),
        ({"segment_length": 307}, r"the train text of letters\.txt .* at least 614"),
        ({"batch_size": 61}, r"config\.batch_size is 61: it must be at most 60, "),
        ({"batch_size": 1}, r"config\.batch_size is 1: batch statistics need"),
        (
            {"eval_batch_size": 1, "eval_lengths": (20,)},
            r"config\.eval_batch_size is 1: batch statistics need",
        ),
    ],
    ids=str,
)
def test_invalid_fields_raise(config, changes, message):
    config.update(changes)
    with pytest.raises(UserError, match=message):
        tasks.load(config)


def test_last_batch_of_one_is_reported_for_each_reading(config):
    config.batch_size, config.eval_batch_size, config.eval_lengths = 10, 3, (33, 55)
    notes = tasks.load(config).notes  # 231 characters to test: 7 segments of 33, 4 of 55
    assert [note.partition(";")[0] for note in notes] == [
        "the last batch of the 7 test segments of 33 has one example",
        "the last batch of the 4 test segments of 55 has one example",
    ]


def test_renamed_text_file_counts_as_the_same_data(config, tmp_path):
    folder = tmp_path / "run"
    results = train.train(config, folder)
    config.text_file = str((tmp_path / "letters.txt").rename(tmp_path / "renamed.txt"))
    assert train.train(config, folder) == results  # finished, and not evaluated again


@pytest.mark.parametrize("field", ["segment_length", "split", "selection", "dataset"])
def test_changing_data_or_selection_fields_of_a_run_raises(config, tmp_path, field):
    config.num_updates = 1
    train.train(config, tmp_path / "run")
    other = {"segment_length": 9, "split": (0.5, 0.2, 0.2), "selection": "accuracy"}
    config.update({field: other.get(field, "text8")})
    with pytest.raises(UserError, match=f"another config: config.{field} is"):
        train.train(config, tmp_path / "run")


def test_evaluation_of_a_finished_run_can_be_extended(config, tmp_path):
    folder = tmp_path / "run"

    def readings(results):
        assert json.loads((folder / "results.json").read_text()) == results
        return {row["reading"] for row in results["rows"]}

    before = train.train(config, folder)
    segments = "segments of 10", "one sequence"
    assert readings(before) == {*segments}
    config.eval_lengths = (20,)
    extended = train.train(config, folder)
    assert readings(extended) == {*segments, "segments of 20"}
    config.eval_lengths, config.whole_text = (30,), ()
    more = train.evaluate_run(config, folder)
    assert readings(more) == {*segments, "segments of 20", "segments of 30"}
    # Rows of the same checkpoint stay, unless population statistics are re-estimated differently.
    assert all(row in more["rows"] for row in before["rows"])
    config.population_batch_size = 30
    assert readings(train.evaluate_run(config, folder)) == {"segments of 10", "segments of 30"}

    config.num_updates = 3
    saved = (folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"config\.num_updates is 3, and the run .* at update 4"):
        train.train(config, folder)
    assert (folder / "config.json").read_text() == saved


@pytest.mark.parametrize("first", ["", "\ufffd"], ids=["none", "one in training"])
def test_characters_absent_from_training_are_reported(config, tmp_path, caplog, first):
    letters = (tmp_path / "letters.txt").read_text()
    letters = first + letters[len(first) : -100] + "ü" * 100
    (tmp_path / "letters.txt").write_text(letters)
    config.batch_size = 30
    with caplog.at_level("WARNING"):
        task = tasks.load(config)
    messages = [record.getMessage() for record in caplog.records]
    share = f"{100 * 100 / SIZES['test']:.3f}% of the test text of letters.txt"
    assert len(messages) == 2 and "has 20 segments, fewer than a batch" in messages[0]
    assert messages[1].startswith(share)
    assert np.sum(np.asarray(task.text["test"]) == len(LETTERS)) == 100


def test_penn_treebank_matches_the_paper(data_dir):
    if not (data_dir / "ptb").is_dir():
        pytest.skip("needs original data: BNLSTM_DATA_DIR has no ptb")
    config = ptb.get_config()
    config.data_dir = str(data_dir)
    task = tasks.load(config)
    assert task.record["characters"] == {"train": 5_059_550, "valid": 396_412, "test": 446_184}
    assert len(task.record["vocabulary"]) == 50
    assert tasks.updates_per_epoch(task.num_segments, config.batch_size) == ptb.UPDATES_PER_EPOCH
    assert len(task.train_batch(790)["start"]) == 34 and len(task.train_batch(791)["start"]) == 64
    assert task.num_examples("test", task.readings[0]._replace(length=1000)) == 446
