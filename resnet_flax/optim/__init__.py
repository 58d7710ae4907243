"""Optimizers, learning-rate schedules and rules that follow training."""
