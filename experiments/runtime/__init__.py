"""What every command runs in: flags, user errors, signals, devices and processes."""
