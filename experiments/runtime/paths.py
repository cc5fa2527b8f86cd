"""Paths in flags and in fields of a config."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments.runtime.errors import UserError

flags.disclaim_key_flags()  # `--help` lists flags with the module that calls `DEFINE_path`

FIELDS = ("data_dir", "text_file")  # of configs; not every config has the second


def expand(name: str, path: str) -> str:
    """A path with `~` expanded; `name` is the flag or field that gives it.

    Raises:
      UserError: it is a URL, or begins with the `~name` of no user.
    """
    try:
        return PathParser().parse(path)
    except ValueError as error:
        raise UserError(f"{name}={path}: {error}") from error


class PathParser(flags.ArgumentParser):
    """Parses the value of a flag that names a file or a folder."""

    def parse(self, argument: str) -> str:
        """The path with `~` expanded.

        Raises:
          ValueError: it is a URL, or begins with the `~name` of no user. Either would create a
            folder of that name.
        """
        if re.match(r"[\w.+-]+://", argument):
            raise ValueError(
                "URLs are not supported; mount the bucket (gs:// by gcsfuse), and use the path of "
                "the mounted folder"
            )
        path = os.path.expanduser(argument)
        if path.startswith("~"):
            raise ValueError(f"there is no user {path.partition('/')[0].removeprefix('~')!r}")
        return path


def DEFINE_path(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder:
    """Defines a flag that names a file or a folder; arguments as in `flags.DEFINE_string`."""
    serializer = flags.ArgumentSerializer()
    return flags.DEFINE(PathParser(), name, default, help, serializer=serializer, **options)


def check_output(path: Path) -> None:
    """Refuses the file of `--output` if it cannot be written.

    Raises:
      UserError: names the file and the reason.
    """
    if path.is_dir():
        raise UserError(f"--output={path} cannot be written: it is a folder")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}") from error
