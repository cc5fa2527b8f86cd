"""Recurrences written in C++ and CUDA, compiled at first use."""
