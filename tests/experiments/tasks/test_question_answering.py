import copy
import itertools

import jax
import numpy as np
import pytest

import bnlstm_jax
from configs import cnn_qa
from experiments import config as shared
from experiments import evaluate, tasks, train, train_step
from experiments.datasets import prepared
from experiments.datasets.question_arrays import Question, pack
from experiments.records import workdir
from experiments.runtime.errors import UserError
from experiments.tasks import question_answering
from experiments.tasks.question_answering import make_model
from tests import reference_reader

COUNTS = {"train": 50, "valid": 9, "test": 7}
ENTITIES = [f"@entity{i}" for i in range(6)]


def make_questions(count, seed):
    """Random passages of a few sentences, some long; a question has the word before its answer."""
    random = np.random.default_rng(seed)
    plain = [f"word{i}" for i in range(12)]
    for number in range(count):
        passage = []
        for _ in range(random.integers(2, 9)):
            passage += [*random.choice(plain, random.integers(1, 5)), random.choice(ENTITIES), "."]
        answer = random.choice([word for word in passage if word in ENTITIES])
        asked = [passage[passage.index(answer) - 1], "@placeholder"]
        yield Question(
            f"q{number}", list(map(str, passage)), list(map(str, asked)), str(answer), []
        )


@pytest.fixture(scope="session")
def questions_dir(tmp_path_factory):
    """A data_dir with a small prepared data set in the format of the CNN questions."""
    folder = tmp_path_factory.mktemp("data")
    splits = {s: list(make_questions(n, i)) for i, (s, n) in enumerate(COUNTS.items())}
    info = {"counts": COUNTS, "complete": False, "skipped": {"train": {"empty": ["a", "b"]}}}
    prepared.write(folder / "prepared" / "cnn", pack(splits), info, {})
    return folder


@pytest.fixture
def config(questions_dir):
    config = cnn_qa.get_config()
    config.data_dir = str(questions_dir)
    config.batch_size = 8
    config.sorted_batches = 1
    config.num_lengths = 3
    config.min_count = 1
    config.model.features = 6
    config.num_updates = 4
    config.eval_every = 4
    config.population_batches = 2
    return config


def test_entity_permutation_preserves_the_answer(config):
    plain = tasks.load(config)
    permuting = tasks.load(with_fields(config, permute_entities=True))
    entities = set(plain.vocabulary.entities.tolist())
    maps = []
    for update in range(12):
        before, after = plain.train_batch(update), permuting.train_batch(update)
        pairs = set()
        for name in ("passage", "question", "answer"):
            pairs |= set(
                zip(before[name].ravel().tolist(), after[name].ravel().tolist(), strict=True)
            )
        mapped = dict(pairs)
        assert len(mapped) == len(pairs) == len(set(mapped.values()))  # one map per batch
        assert all((a in entities and b in entities) or a == b for a, b in pairs)
        for row in range(8):
            found = after["passage"][row] == after["answer"][row]
            assert found.any()
            np.testing.assert_array_equal(found, before["passage"][row] == before["answer"][row])
        maps.append(tuple(mapped.get(e) for e in sorted(entities)))
    assert len(set(maps)) > 8  # each batch has its own map
    again = permuting.train_batch(5)
    assert all(np.array_equal(again[k], permuting.train_batch(5)[k]) for k in again)
    reading = permuting.readings[0]
    for a, b in zip(
        permuting.batches("valid", 4, reading), plain.batches("valid", 4, reading), strict=True
    ):
        np.testing.assert_array_equal(a["passage"], b["passage"])


def with_fields(config, **fields):
    config = config.copy_and_resolve_references()
    config.update(fields)
    return config


def spell(task, batch, row):
    words = np.array(task.vocabulary.words)
    return " ".join(words[batch["passage"][row, : batch["passage_length"][row]]])


def test_batches_have_the_dataset_words_and_zero_padding(config):
    task = tasks.load(config)
    originals = list(make_questions(COUNTS["valid"], 1))
    order = tasks.evaluation_order(len(originals))
    rows = 0
    for batch in task.batches("valid", 4, task.readings[0]):
        words = np.array(task.vocabulary.words)
        for row in range(len(batch["answer"])):
            original = originals[order[rows]]
            assert spell(task, batch, row) == " ".join(original.passage)
            asked = batch["question"][row, : batch["question_length"][row]]
            assert " ".join(words[asked]) == " ".join(original.question)
            assert words[batch["answer"][row]] == original.answer
            assert (batch["passage"][row, batch["passage_length"][row] :] == 0).all()
            assert (batch["question"][row, batch["question_length"][row] :] == 0).all()
            rows += 1
        assert batch["passage"].shape[1] in task.passage_lengths
        assert (batch["passage_length"] < batch["passage"].shape[1]).all()
        assert (batch["question_length"] < batch["question"].shape[1]).all()
    assert rows == COUNTS["valid"]


def test_epochs_have_full_shuffled_batches_of_few_shapes(config):
    task = tasks.load(config)
    assert task.updates_per_epoch == 6  # with 48 of 50 questions
    epochs = []
    for epoch in range(2):
        batches = [task.train_batch(6 * epoch + i) for i in range(6)]
        assert len({b["passage"].shape for b in batches}) <= 3
        epochs.append([spell(task, b, row) for b in batches for row in range(8)])
        assert len(set(epochs[-1])) == 48
    assert epochs[0] != epochs[1]


def test_sorted_batches_start_with_the_longest_passages(config):
    task = tasks.load(with_fields(config, sorted_batches=3))
    lengths = [task.train_batch(i)["passage_length"] for i in range(6)]
    for group in (lengths[:3], lengths[3:]):
        joined = np.concatenate(group)
        np.testing.assert_array_equal(joined, np.sort(joined)[::-1])
    plain = tasks.load(config)
    rows = [plain.train_batch(i)["passage_length"] for i in range(3)]
    assert sorted(np.concatenate(rows)) == sorted(np.concatenate(lengths[:3]))
    evaluated = [b["passage_length"] for b in task.batches("valid", 2, task.readings[0])]
    assert sorted(np.concatenate(evaluated)) == sorted(task.splits["valid"].passages.lengths)
    joined = np.concatenate(evaluated[:3])
    np.testing.assert_array_equal(joined, np.sort(joined)[::-1])


def test_metrics_match_hand_computed_values(config):
    task = tasks.load(config)
    words = task.vocabulary.words
    one, two, plain = words.index("@entity1"), words.index("@entity2"), words.index("word3")
    unknown = words.index("<unk>")
    passage = [[one, plain, 0], [two, plain, one], [plain, 0, 0], [two, one, 0], [unknown, one, 0]]
    batch = {"passage": np.array(passage), "passage_length": np.array([2, 2, 1, 2, 2])}
    batch["answer"] = np.array([one, two, plain, one, unknown])
    logits = np.full((5, len(words)), -3.0, np.float32)
    logits[0, one] = 1  # right in both metrics
    logits[1, one], logits[1, two] = 5, 1  # the likelier word is after the end of the passage
    logits[2, plain] = 2  # right, but not an entity
    logits[3, two] = 60  # wrong in both metrics, with certainty
    logits[4, unknown] = 3  # <unk> is never a right answer
    p = np.exp(logits - logits.max(1, keepdims=True, initial=0).astype(float))
    p = (p / p.sum(1, keepdims=True))[np.arange(5), batch["answer"]]
    metrics = jax.tree.map(float, task.metrics(logits, batch))
    assert metrics["error"] == (3, 5) and metrics["entity_error"] == (3, 5)
    assert metrics["loss"] == (pytest.approx(-np.log(p + 1e-8).sum(), rel=1e-6), 5)


def test_sentence_selection_reports_the_share_of_answers_kept(config):
    config.num_sentences = 2
    task = tasks.load(config)
    for split, share in task.record["answers_kept"].items():
        part = task.splits[split]
        kept = [spelled_answer(part, i) for i in range(COUNTS[split])]
        assert share == np.mean(kept)
    assert 0 < task.record["answers_kept"]["train"] < 1
    assert f"{task.record['answers_kept']['valid']:.1%} of valid" in " ".join(task.notes)
    assert "2 sentences" in task.data and len(task.splits["train"].answers) == 50


def spelled_answer(part, index):
    return part.answers[index] in part.passages[index].tolist()


def test_skipped_questions_and_unknown_answers_are_reported(config):
    config.max_passage_length = 30
    config.min_count = 40
    task = tasks.load(config)
    lengths = [len(q.passage) for q in make_questions(COUNTS["train"], 0)]
    left_out = sum(n > 30 for n in lengths)
    assert 0 < left_out < 40 and task.record["too_long"]["train"] == left_out
    assert f"left out {left_out} of 50 train questions" in " ".join(task.notes)
    assert len(task.splits["train"].answers) == 50 - left_out
    assert task.record["skipped_in_preparation"] == {"train": 2, "valid": 0, "test": 0}
    answers = task.vocabulary.table[task.splits["train"].answers]
    unknown = sum(task.vocabulary.words[i] == "<unk>" for i in answers)
    assert 0 < unknown < 50 - left_out
    told = f"the answers of {unknown} of {50 - left_out} train questions are rarer"
    assert told in " ".join(task.notes)


def test_vocabulary_excludes_words_of_skipped_passages(config):
    config.max_passage_length, config.batch_size, config.model.kind = 9, 6, "lstm"
    task = tasks.load(config)
    part, words = task.splits["train"], task.questions.words
    kept = {words[i] for i in np.concatenate([part.passages.words, part.questions.words])}
    kept |= {words[i] for i in part.answers}
    assert not {f"word{i}" for i in range(12)} <= kept  # others are only in skipped passages
    specials = {"<nil>", "<unk>", "<num>"}
    assert set(task.vocabulary.words) - specials <= kept


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("max_passage_length", 1, r"config\.max_passage_length is 1: .* no train passage"),
        ("batch_size", 51, r"config\.batch_size is 51: .* of part of CNN \(50 / 9 / 7 questions\)"),
        ("batch_size", 1, r"config\.batch_size is 1: batch statistics need"),
        ("population_batch_size", 1, r"config\.population_batch_size is 1"),
        ("num_lengths", 0, r"config\.num_lengths is 0: it must be at least 1"),
        ("sentence_rule", "wrods", r"config\.sentence_rule.*did you mean words"),
        ("sentence_ties", "last", r"config\.sentence_ties"),
        ("model.dropout_rate", 1.0, r"config\.model\.dropout_rate is 1\.0"),
        ("model.max_steps", 2000, r"config\.model\.max_steps is 2000"),
        ("dataset", "mnist", r"config\.dataset"),
    ],
)
def test_invalid_fields_raise(config, field, value, message):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        tasks.load(config)


def test_last_validation_batch_of_one_example_is_reported(config):
    for size, kind, told in ((5, "bn_lstm", False), (4, "bn_lstm", True), (4, "lstm", False)):
        config.batch_size, config.model.kind = size, kind  # of nine validation questions
        notes = tasks.load(config).notes
        assert any("leaves it out" in note for note in notes) == told


def test_statistics_cover_the_longest_training_sequences(config):
    train = list(make_questions(COUNTS["train"], 0))
    passage, question = (max(len(q[i]) for q in train) for i in (1, 2))
    model = tasks.load(config).model  # a step of padding counts
    assert (model.passage_steps, model.question_steps) == (passage + 1, question + 1)
    config.model.count_padding = False
    model = tasks.load(config).model
    assert (model.passage_steps, model.question_steps) == (passage, question)
    config.model.max_steps = 5
    model = tasks.load(config).model
    assert (model.passage_steps, model.question_steps) == (5, min(5, question))


def test_reader_kinds_raise_in_other_tasks(config, small_config):
    small_config.model.kind = "bn_e_star"
    with pytest.raises(UserError, match=r"config\.model\.kind"):
        shared.check(small_config)
    config.model.kind = ",".join(shared.READER_KINDS)
    shared.check(config)


def test_released_code_options_are_passed_to_the_model(config):
    config.model.kind = "bn_e_star"
    reader = make_model(config.model, 20, 30, 10)
    quirks = reader.quirks
    assert quirks.count_padding and quirks.identical_blocks and quirks.double_bias
    assert reader.input_statistics == "sequence" and not reader.bidirectional
    for name in ("count_padding", "identical_blocks", "double_bias", "bilinear", "mean_passage"):
        config.model[name] = False
    config.model.unscaled_dropout = True
    reader = make_model(config.model, 20, 30, 10)
    quirks = reader.quirks
    assert not (quirks.count_padding or quirks.identical_blocks or quirks.double_bias)
    assert not quirks.bilinear and not quirks.mean_passage and quirks.unscaled_dropout


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("lstm", "bn_everywhere")),
        "bn_e_star_star",
    ],
)
def test_readers_train_and_are_evaluated(config, kind, tmp_path, capsys):
    config.model.kind = kind
    config.num_lengths = 1
    results = train.train(config, tmp_path / kind)
    ways = {(row["split"], row["statistics"]) for row in results["rows"]}
    expected = {"none"} if kind == "lstm" else {"batch", "running", "population"}
    if kind == "bn_e_star_star":
        expected |= {"population_batch_inputs"}
    assert ways == {(split, way) for split in ("valid", "test") for way in expected}
    assert all(np.isfinite(row["loss"]) for row in results["rows"])
    record = workdir.read_record(tmp_path / kind)
    assert record["padded_lengths"] == sorted(record["padded_lengths"])
    told = " ".join(capsys.readouterr().out.split())
    assert "training questions, passages padded to" in told


def test_only_sequence_statistics_use_the_evaluated_batch(config):
    for kind in shared.READER_KINDS:
        config.model.kind = kind
        assert (tasks.load(config).batch_inputs is not None) == kind.startswith("bn_e_star")


def test_population_batch_inputs_row_mixes_batch_and_population_statistics(config):
    config.model.kind = "bn_e_star"
    config.batch_size = 4  # of nine: the last batch has one question, which is left out
    config.num_lengths = 1
    task = tasks.load(config)
    variables = train_step.variables_of(train_step.create_state(task, config))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.7, x.shape), variables["params"])
    population = jax.tree.map(lambda x: random.uniform(0.5, 1.5, x.shape), variables["batch_stats"])
    evaluator = evaluate.Evaluator(task, config, jax.random.key(0))
    rows = evaluator.evaluate_all({**variables, "params": params}, population)
    losses = {row["statistics"]: row["loss"] for row in rows if row["split"] == "valid"}

    batches = list(task.batches("valid", 4, task.readings[0]))[:2]
    of_batches = [copy.deepcopy(population) for _ in batches]
    for statistics, batch in zip(of_batches, batches, strict=True):
        _, _, moments = reference_reader.read("bn_e_star", params, *task.inputs(batch))
        for encoder in ("passage", "question"):
            for name in ("input_mean", "input_var"):
                statistics[encoder]["forward"][name] = moments[encoder]["forward"][name]

    def loss(statistics, batch):
        inputs = task.inputs(batch)
        logits, _, _ = reference_reader.read("bn_e_star", params, *inputs, statistics=statistics)
        p = np.exp(logits)[np.arange(4), batch["answer"]] / np.exp(logits).sum(1)
        return -np.log(p + 1e-8).mean()

    wanted = np.mean(list(map(loss, of_batches, batches)))
    np.testing.assert_allclose(losses["population_batch_inputs"], wanted, rtol=1e-4)
    assert abs(np.mean([loss(population, batch) for batch in batches]) - wanted) > 0.01


@pytest.mark.parametrize("late_steps", ["repeat", "skip"])
def test_late_steps_of_population_statistics_follow_the_config(config, late_steps, monkeypatch):
    monkeypatch.setattr(question_answering, "ROUNDING", 4)  # the passages of this test are short
    config.model.kind = "bn_lstm"
    config.population_late_steps = late_steps
    config.batch_size = config.population_batch_size = 2
    config.population_batches = 6
    task = tasks.load(config)
    variables = train_step.variables_of(train_step.create_state(task, config))
    found = evaluate.Evaluator(task, config, jax.random.key(0)).population_statistics(variables)

    batches = list(itertools.islice(task.batches("train", 2, task.readings[0]), 6))
    alone = [  # of one batch: steps that it does not reach repeat its last one
        bnlstm_jax.estimate_population_statistics(
            task.model, variables, [batch], inputs=task.inputs, use_running_average=False
        )
        for batch in batches
    ]
    lengths = np.array([batch["passage"].shape[1] for batch in batches])
    assert len(set(lengths)) > 1
    for name, got in found["passage"]["forward"].items():
        values = np.stack([each["passage"]["forward"][name] for each in alone])
        reached = (np.arange(len(got)) < lengths[:, None]) | (late_steps == "repeat")
        weights = np.broadcast_to(reached[..., None], values.shape)
        np.testing.assert_allclose(got, np.average(values, 0, weights), rtol=1e-5, atol=1e-7)


def test_configs_match_the_paper():
    full, four = cnn_qa.get_config(), cnn_qa.get_config("four_sentences")
    for config, units, rate, permute, sort in (
        (full, 120, 8e-4, False, 12),
        (four, 240, 8e-5, True, 1),
    ):
        assert (config.model.features, config.batch_size) == (units, 64)
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.learning_rate, optimizer.clip_norm) == ("adam", rate, 10)
        assert optimizer.clip_rule == "released_reader"
        assert optimizer.adam_epsilon == "released"
        assert (config.permute_entities, config.sorted_batches) == (permute, sort)
        model = config.model
        assert (model.initial_scale, model.dropout_rate, model.count_padding) == (0.1, 0.5, True)
        assert (config.population_late_steps, config.population_batches) == ("repeat", 5001)
    assert full.num_sentences == 0 and four.num_sentences == 4
    assert (four.sentence_rule, four.sentence_ties) == ("entities", "later")
    assert full.join_numbers and not four.join_numbers
    assert four.model.unscaled_dropout and not full.model.unscaled_dropout
    with pytest.raises(UserError, match="four_sentences"):
        cnn_qa.get_config("four")
