"""Reads weights of other libraries into our networks."""
