"""Commands that people run beside training."""

import experiments  # noqa: F401  (for a Ctrl-C while the modules of a command load)
