"""Compiles the steps with XLA's compiler for TPUs, without a TPU."""
