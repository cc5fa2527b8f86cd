"""How programs are timed, and PyTorch's to compare with."""
