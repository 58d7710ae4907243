"""Fast convolution, normalisation and grouping: need not be read."""
