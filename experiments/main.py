"""Trains or evaluates what a config describes.

    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist
    python -m experiments.main --mode=evaluate --workdir=runs/pmnist

Any field of the config can be set: --config.model.kind=lstm --config.batch_size=50
"""

import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import compare, config, train, workdir
from experiments.errors import UserError, run, unknown_name

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default runs/ and the name of the config file."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate the best checkpoint."
)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line.

    Raises:
      UserError: the config file is not there, or has no such variant or field.
    """
    file = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, given, value = word.partition("=")
        if flag in ("-config", "--config"):
            file = value if given else following
            if not Path(file.partition(":")[0]).is_file():
                configs = map(str, Path("configs").glob("*.py"))
                raise UserError(unknown_name("--config", file, configs))
    try:
        config_flags.DEFINE_config_file(
            "config", "configs/digits.py", "Config file; --config.FIELD=VALUE sets its fields."
        )
        return flags.FLAGS(argv)
    except flags.Error as error:
        if "get_config() takes 0 positional arguments" in str(error):
            raise UserError(f"--config={file}: this config has no variants") from error
        raise
    except AttributeError as error:  # how ml_collections reports an unknown field
        field = re.match(r"\W*(\w+)", str(error))
        nearest = re.search(r'Did you mean "(\w+)"', str(error))
        for word in argv:
            path = word.partition("=")[0].lstrip("-")
            if field and path.startswith("config.") and field[1] in path.split("."):
                hint = f"; did you mean {nearest[1]}?" if nearest else ""
                raise UserError(f"{path}: the config has no field {field[1]}{hint}") from error
        raise


def chosen_config(folder: Path) -> ConfigDict:
    """The config of the command line; if it names none, that of the run to evaluate."""
    flag = flags.FLAGS["config"]
    unchanged = not flag.present and not any(n.startswith("config.") for n in flags.FLAGS)
    if _MODE.value == "evaluate" and unchanged and (folder / "config.json").exists():
        return workdir.read_config(folder)
    return flag.value


def main(_: list[str]) -> None:
    """Runs every kind of model that the config names, and prints what they came to."""
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    folder = Path(_WORKDIR.value or f"runs/{Path(file).stem}")
    base = chosen_config(folder)
    config.check(base)

    kinds = config.model_kinds(base)
    runs = {}
    for kind in kinds:
        own = base.copy_and_resolve_references()
        own.model.kind = kind
        runs[kind] = own, folder / kind if len(kinds) > 1 else folder
        workdir.check(*runs[kind])
    run_one = {"train": train.train, "evaluate": train.evaluate_run}[_MODE.value]
    results = [run_one(*runs[kind]) for kind in kinds]

    print(f"\n{compare.results_table(results)}\n")
    picture = folder / compare.PICTURE_NAME
    folders = {kind: runs[kind][1] for kind in kinds}
    if compare.draw_curves(folders, results[0]["selection"], picture):
        print(f"Curves: {picture}")
    print(f"TensorBoard (pip install tensorboard): tensorboard --logdir={folder}")


if __name__ == "__main__":
    run(main, parse_flags)
