"""What sharing a batch out over devices costs, and whether it changes it."""
