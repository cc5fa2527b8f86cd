"""Commands that people run beside training."""
