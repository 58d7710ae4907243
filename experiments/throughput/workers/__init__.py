"""One program each: the same training and inference in another framework."""
