"""First epochs of the families of networks, side by side."""
