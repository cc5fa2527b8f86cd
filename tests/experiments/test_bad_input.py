"""Any value of any field of a config runs or gives one line that says what is wrong."""

import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import requests
from absl import flags, logging
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import config, main, parallel, tasks
from experiments.datasets import prepared
from experiments.datasets.question_arrays import Question, pack
from experiments.optimizers import make_optimizer
from experiments.records import workdir
from experiments.runtime.errors import UserError
from tests.flag_values import fresh_flags

ROOT = Path(__file__).parents[2]
# The number of command lines that are tried with each config.
CONFIGS = {"digits": 100, "mnist": 50, "ptb:small": 50, "text8": 50, "text": 50}
CONFIGS |= {"babi": 25, "cnn_qa:sample": 25}  # their models take longer to make


@pytest.fixture(scope="module")
def data(tmp_path_factory, prepared_dir) -> Path:
    """A data_dir with a small version of every data set."""
    folder = tmp_path_factory.mktemp("little")
    (folder / "prepared").mkdir()
    (folder / "prepared" / "digits").symlink_to(prepared_dir / "prepared" / "digits")
    rng = np.random.default_rng(0)

    def write(name: str, arrays: dict[str, np.ndarray], info: dict) -> None:
        prepared.write(folder / "prepared" / name, arrays, info, {})

    images = {f"{s}_images": rng.integers(0, 255, (300, 9), np.uint8) for s in ("train", "valid")}
    images["test_images"] = images["valid_images"]
    labels = {name.replace("images", "labels"): image[:, 0] % 10 for name, image in images.items()}
    write("mnist", images | labels, {"num_classes": 10, "max_pixel": 255, "image_side": 3})
    texts = {split: rng.integers(0, 9, 20_000, np.uint8) for split in ("train", "valid", "test")}
    write("ptb", texts, {"vocabulary": "abcdefghi"})
    write("text8", {"text": texts["train"]}, {"vocabulary": "abcdefghi", "complete": False})
    (folder / "book.txt").write_text("".join(map(str, texts["train"])))

    def question(number: int) -> Question:
        words = [f"@entity{i % 5}" for i in range(number, number + 4)]
        passage = [*words, ".", "1984", "was", "."] * (1 + number % 3)
        return Question(f"q{number}", passage, ["@placeholder", "was", "?"], words[0], [])

    asked = {split: [question(i) for i in range(40)] for split in ("train", "valid", "test")}
    write("babi", {k: v for n in (1, 2, 4, 5) for k, v in pack(asked, f"qa{n}_").items()}, {})
    write("cnn", pack(asked), {"complete": False})
    return folder


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Changes to an empty folder, and refuses network requests."""

    def refuse(self, request, **kwargs):
        raise requests.ConnectionError

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse)
    monkeypatch.chdir(tmp_path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    yield
    logging.set_verbosity(verbosity)


def config_flag(name: str) -> str:
    file, _, variant = name.partition(":")
    return f"--config={ROOT}/configs/{file}.py{':' * bool(variant)}{variant}"


def fields_of(name: str) -> dict[str, object]:
    """The fields of a config, such as `model.kind`, and their values."""
    argv = ["main", config_flag(name)]
    with fresh_flags(argv):
        main.define_flags()
        main.parse_flags(argv)
        return flatten_dict(flags.FLAGS.config.to_dict(), sep=".")


FIELDS = {name: fields_of(name) for name in CONFIGS}

# Likely and unlikely values, separated by bars.
WORDS = """
| |,|,,|()|(,)|[]|{}|None|true|False|nan|inf|-inf|NaN|Infinity|1e400|-0|-0.0|1e-400|0x10|1_000|1 000
|1,000|½|1e3|1.0|1.5|-1|0|1|2|7|1+1j|'|"|'a|a'b|🎲|é|1,2|1,2,3|(1,)|(1,2,3)|0.5,0.3,0.1|nan,1,2|1,a
|('a',)|((1,),)|lstm|lstm,|lstm,lstm|bn_lstm|bn_e_star|bfloat16|float64|adam|released_reader
|valid,test|train|digits|mnist|text|qa1|book.txt|.|..|~|~nobody|nowhere|%s|$HOME|1e10|1e308|5e-324
|1e-9""".replace("\n", "").split("|")
WORDS += ["a\nb", "\udcff", "\\", "9" * 30, "1" + "0" * 400, "a" * 300]
WORDS += [str(number) for number in (2**31, 2**63, 2**64, -(2**63))]
NUMBERS = st.one_of(
    st.integers(-3, 300).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.floats(0, 2).map(str),
)
TEXTS = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), max_size=8)
VALUES = st.one_of(
    st.sampled_from(WORDS),
    NUMBERS,
    TEXTS,
    st.lists(st.one_of(NUMBERS, TEXTS), max_size=4).map(",".join),
    st.lists(st.one_of(NUMBERS, TEXTS.map(repr)), max_size=4).map(lambda v: f"({','.join(v)})"),
)


WHOLE = st.one_of(st.integers(0, 300), st.integers(-(2**70), 2**70)).map(str)
FITTING = {  # values that fit a field of this type
    bool: st.sampled_from(("true", "false")),
    int: WHOLE,
    float: st.one_of(st.floats(), st.floats(0, 2), st.integers()).map(str),
    str: st.sampled_from(WORDS),
    tuple: st.lists(st.one_of(WHOLE, st.floats(0, 1).map(str), TEXTS), max_size=4).map(",".join),
}
WRONG = ("modl.kind", "sed", "model", "model.kind.x", "optimizer", "model.", "seed.seed")


def override(field: str, value: object) -> st.SearchStrategy[str]:
    """A command-line word that sets a field, which has `value` in the config."""
    fitting = FITTING.get(type(value), VALUES)
    return st.one_of(fitting, fitting, VALUES).map(lambda given: f"--config.{field}={given}")


def overrides(name: str) -> st.SearchStrategy[list[str]]:
    """One or two command-line words."""
    fields = [override(field, value) for field, value in FIELDS[name].items()]
    wrong = st.sampled_from(WRONG).flatmap(lambda field: override(field, None))
    return st.lists(st.one_of(*fields, wrong), min_size=1, max_size=2)


def attempt(name: str, data: Path, words: list[str]) -> str | None:
    """Does what `python -m experiments.main` does before it trains; returns its error, if any."""
    argv = [
        "main",
        config_flag(name),
        f"--config.data_dir={data}",
        *([f"--config.text_file={data / 'book.txt'}"] if name == "text" else []),
        *(["--config.split=9_000,5_000,5_000"] if name == "text8" else []),
        "--config.batch_size=20",
        *words,
    ]
    with fresh_flags(argv), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main.define_flags()
            main.parse_flags(argv)
            base = flags.FLAGS.config
            config.check(base)
            parallel.check(base)
            own = base.copy_and_resolve_references()
            own.model.kind = config.model_kinds(base)[-1]
            workdir.check(own, Path("run"))
            check_run(own)
        except (UserError, flags.Error) as error:
            assert isinstance(error, flags.Error) or "\n" not in str(error)
            return " ".join(str(error).split())
    return None


def check_run(own: config.ConfigDict) -> None:
    """Loads the task, makes the optimizer, and traces the initialisation of a small model."""
    task = tasks.load(own)
    make_optimizer(own.optimizer)
    if own.model.features > 300:
        return
    batch = task.train_batch(0)
    jax.eval_shape(
        lambda: task.model.init(
            jax.random.key(own.seed), *task.inputs(batch), use_running_average=True
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_pass_all_checks(name, data, tmp_path):
    assert attempt(name, data, []) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, word, message",
    [
        ("pmnist:tru", "seed=1", "did you mean true?"),
        ("digits:small", "seed=1", "digits.py:small: TypeError"),
        ("digits", "sed=2", "did you mean config.seed?"),
        ("digits", "seed=one", "config.seed=one"),
        ("digits", "seed=4294967296", "config.seed is 4294967296: it must be at most 4294967295"),
        ("digits", "batch_size=0", "config.batch_size is 0: it must be at least 1"),
        ("digits", "pixel_order_seed=-1", "config.pixel_order_seed is -1"),
        ("digits", "model.kind=bn_e_star", "config.model.kind is 'bn_e_star'"),
        ("digits", "model.normalize=7", "config.model.normalize is '7'"),
        ("digits", "model.initial_hidden_noise=-1", "config.model.initial_hidden_noise is -1.0"),
        ("digits", "model.initial_scale=nan", "config.model.initial_scale is nan"),
        ("digits", "optimizer.learning_rate=inf", "config.optimizer.learning_rate is inf"),
        ("digits", "optimizer.clip_rule=nrom", "did you mean norm?"),
        ("digits", "optimizer.clip_norm=0", "config.optimizer.clip_norm is 0.0"),
        ("digits", "optimizer.decay=1", "config.optimizer.decay is 1.0: it must be less than 1"),
        ("digits", "dataset=babi", "config.dataset is 'babi'"),
        ("digits", "dataset=mnsit", "did you mean mnist?"),
        ("digits", "parallel.devices=1000000000000", "divisible by the 1000000000000 devices"),
        ("digits", "task=char_lm", "config.task cannot be set by a flag"),
        ("mnist", "model.knd=lstm", "config.model.knd: "),
        ("text", "whole_text=1.5", "config.whole_text is '1.5'"),
        ("babi", "num_lengths=99999999", "config.num_lengths is 99999999"),
        ("babi", "subset=qa3", "config.subset is 'qa3'"),
        ("babi", "modl.kind=lstm", "config.modl.kind: "),
        ("babi", "model.kind.x=1", "config.model.kind.x: "),
        ("babi", "seed.seed=1", "config.seed.seed: "),
    ],
)
def test_invalid_overrides_give_specific_messages(name, data, word, message):
    assert message in (attempt(name, data, [f"--config.{word}"]) or "")


@pytest.mark.parametrize("name", CONFIGS)
def test_random_overrides_are_valid_or_give_a_message(name, data, tmp_path):
    @settings(
        max_examples=CONFIGS[name],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(overrides(name))
    def attempted(words):
        told = attempt(name, data, words)
        assert told is None or len(told) > 10
        assert not (tmp_path / "run").exists()

    attempted()
