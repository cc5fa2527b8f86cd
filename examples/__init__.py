"""Examples of the layers in models: to run, to read and to copy."""
