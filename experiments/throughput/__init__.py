"""How fast networks train and predict on a CPU, and what surrounds that."""
