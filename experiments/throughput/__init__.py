"""What the input pipeline and the start cost."""
