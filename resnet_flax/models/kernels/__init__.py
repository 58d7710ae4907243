"""Fast convolution and normalisation, loops, grouping. You can skip these."""
