"""How signal and gradient go through networks of several depths."""
