from pathlib import Path

import pytest
from absl import flags

from configs import text
from experiments import config, main
from experiments.runtime import paths
from experiments.runtime.errors import UserError
from tests.flag_values import fresh_flags

ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def parsed(*words):
    """The flags of `experiments.main` for some words: the workdir, the file and the config."""
    argv = ["main", *words]
    with fresh_flags(argv):
        main.define_flags()
        main.parse_flags(argv)
        config.check(flags.FLAGS.config)
        return flags.FLAGS.workdir, flags.FLAGS["config"].config_filename, flags.FLAGS.config


def test_tilde_is_expanded_in_flags_not_config_fields(home):
    (home / "own.py").symlink_to(ROOT / "configs" / "text.py")
    workdir, file, fields = parsed(
        "--config=~/own.py",
        "--workdir=~/run",
        "--config.data_dir=~",
        "--config.text_file=~/book.txt",
    )
    assert (workdir, file) == (f"{home}/run", f"{home}/own.py")
    assert (fields.data_dir, fields.text_file) == (
        "~",
        "~/book.txt",
    )  # expanded where they are used


@pytest.mark.parametrize("name", ["config", "workdir", "config.data_dir", "config.text_file"])
def test_urls_as_paths_raise(name):
    words = [] if name == "config" else [f"--config={ROOT}/configs/text.py"]
    with pytest.raises((UserError, flags.Error), match=rf"{name}=gs://a/b: .* mount the bucket"):
        parsed(*words, f"--{name}=gs://a/b")


def test_evaluation_reads_the_config_from_the_workdir(home):
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(text.get_config().to_json_best_effort())
    argv = ["main", "--mode=evaluate", "--workdir=~/run"]
    with fresh_flags(argv):
        main.define_flags()
        main.parse_flags(argv)
        assert flags.FLAGS.config.task == "char_lm"


def test_path_flags_belong_to_the_defining_module():
    own = flags.FlagValues()
    paths.DEFINE_path("output", "a.json", "File to write.", flag_values=own)
    own(["main", "--output=~/a.json"])
    assert own.output == str(Path.home() / "a.json")
    assert list(own.flags_by_module_dict()) == [__name__]


def test_last_config_flag_wins_in_any_position():
    digits, ptb = (f"--config={ROOT}/configs/{name}.py" for name in ("digits", "ptb"))
    for words in (
        [digits, ptb, "--config.seed=3"],
        ["--config.seed=2", digits, "--config.seed=3", ptb],
    ):
        _, file, fields = parsed(*words)
        assert (file, fields.task, fields.seed) == (f"{ROOT}/configs/ptb.py", "char_lm", 3)


def test_last_workdir_flag_is_evaluated(tmp_path):
    (tmp_path / "config.json").write_text(text.get_config().to_json_best_effort())
    argv = ["main", "--workdir=none", f"--workdir={tmp_path}", "--mode=train", "--mode=evaluate"]
    with fresh_flags(argv):
        main.define_flags()
        main.parse_flags(argv)
        assert flags.FLAGS.config.task == "char_lm"
