"""Compares converted weights with the libraries that saved them."""
