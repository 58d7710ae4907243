"""Fast convolution, normalisation and grouping. You need not read it."""
