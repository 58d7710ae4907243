"""The first real runs."""
