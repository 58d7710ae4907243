"""The first runs on real data."""
