"""The steps that validate kernels on a device, and the report of what they found."""
