"""Each module trains and predicts the same network in another framework."""
