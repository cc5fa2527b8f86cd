"""Sweeps: many runs, here or as SLURM jobs."""
