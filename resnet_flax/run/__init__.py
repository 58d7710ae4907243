"""A run: its configuration, folder, checkpoints and logs."""
