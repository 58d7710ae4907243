"""Whether a run survives what can happen to it, to the same bits."""
