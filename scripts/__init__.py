"""Commands other than `experiments.main`."""

import experiments  # noqa: F401  (handles Ctrl-C while the modules of a command load)
