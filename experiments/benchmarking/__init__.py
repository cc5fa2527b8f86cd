"""How fast layers are, beside those of Flax and PyTorch."""
