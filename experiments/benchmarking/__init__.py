"""Benchmarks of layers against those of Flax and PyTorch."""
