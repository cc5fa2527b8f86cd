"""What a run leaves: its folder, checkpoints, metrics; finished runs, read again."""
