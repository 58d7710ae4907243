"""The tables of all networks: sizes, counted and published."""
