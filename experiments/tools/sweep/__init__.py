"""Many runs from one file: a base configuration and a grid of overrides."""
