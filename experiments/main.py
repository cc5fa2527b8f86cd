"""Trains or evaluates what a config describes.

    python -m experiments.main --config=configs/pmnist.py --workdir=runs/pmnist
    python -m experiments.main --mode=evaluate --workdir=runs/pmnist

Any field of the config can be set: --config.model.kind=lstm --config.batch_size=50
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from experiments import compare, config, errors, train, workdir
from experiments.errors import UserError, unknown_name

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default runs/ and the name of the config file."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train and evaluate, or evaluate the best checkpoint."
)
_PROFILE = flags.DEFINE_boolean(
    "profile", False, "Say where the time of updates went, without that of compilation."
)

DEFAULT_CONFIG = "configs/digits.py"


def option(argv: Sequence[str], name: str) -> str | None:
    """What the command line gives for a flag, before flags are parsed; None if it does not."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, given, value = word.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            return value if given else following
    return None


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line.

    The config is that of `--config`; without it, of the run to evaluate; else of the digits.

    Raises:
      UserError: the config file is not there, or has no such variant or field.
    """
    file = option(argv, "config")
    if file is not None and not Path(file.partition(":")[0]).is_file():
        configs = map(str, Path("configs").glob("*.py"))
        raise UserError(unknown_name("--config", file, configs))
    described = "Config file; --config.FIELD=VALUE sets its fields."
    folder = option(argv, "workdir")
    try:
        if file is None and folder is not None and option(argv, "mode") == "evaluate":
            saved = workdir.read_config(Path(folder))
            config_flags.DEFINE_config_dict("config", saved, described)
        else:
            config_flags.DEFINE_config_file("config", file or DEFAULT_CONFIG, described)
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


def default_workdir() -> str:
    """`runs/` and the name of the config file."""
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    return f"runs/{Path(file.partition(':')[0]).stem}"


def cache_programs() -> None:
    """Has JAX keep compiled programs on disk, but not those for CPUs.

    They take seconds to compile, and XLA refuses to load them again on many machines:
    https://github.com/openxla/xla/issues/44565. JAX_COMPILATION_CACHE_DIR says where to keep
    programs; by default in the user's cache.
    """
    if jax.default_backend() == "cpu" or jax.config.jax_compilation_cache_dir is not None:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(caches / "bnlstm_jax"))


def main(_: list[str]) -> None:
    """Runs every kind of model that the config names, and prints what they came to."""
    base = flags.FLAGS.config
    folder = Path(_WORKDIR.value or default_workdir())
    config.check(base)

    kinds = config.model_kinds(base)
    runs = {}
    for kind in kinds:
        own = base.copy_and_resolve_references()
        own.model.kind = kind
        runs[kind] = own, folder / kind if len(kinds) > 1 else folder
        workdir.check(*runs[kind])
    cache_programs()
    if _MODE.value == "evaluate":
        results = [train.evaluate_run(*runs[kind]) for kind in kinds]
    else:
        results = [train.train(*runs[kind], profile=_PROFILE.value) for kind in kinds]

    print(f"\n{compare.results_table(results)}\n")
    picture = folder / compare.PICTURE_NAME
    folders = {kind: runs[kind][1] for kind in kinds}
    first = results[0]
    if compare.draw_curves(folders, first["data"], first["shown"][0], picture):
        print(f"Curves: {picture}")
    print(f"TensorBoard (pip install tensorboard): tensorboard --logdir={folder}")


if __name__ == "__main__":
    errors.run(main, parse_flags)
