"""Records of runs: writes a run's workdir, checkpoints and metrics, and reads them back."""
