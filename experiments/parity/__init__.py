"""Whole trainings beside the original Keras example."""
