"""What all commands share: flags, user errors, signals, files, progress bars and processes."""
