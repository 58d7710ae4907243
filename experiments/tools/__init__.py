"""Commands that are not experiments, and code that experiments share."""
