"""Command lines, parsed in this process one after the other."""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags


@contextlib.contextmanager
def fresh_flags(argv: list[str]) -> Iterator[None]:
    """Sets `sys.argv`, which ml_collections reads, and restores it and all flags afterwards."""
    before = set(flags.FLAGS)
    defaults = {name: flags.FLAGS[name].value for name in before}
    earlier, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = earlier
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        for name, value in defaults.items():
            flags.FLAGS[name].value = value
            flags.FLAGS[name].present = 0
