"""Tests whether a run survives faults and ends bit-identical."""
