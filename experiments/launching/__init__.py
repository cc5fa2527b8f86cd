"""Sweeps: many runs, on this machine or as SLURM jobs."""
