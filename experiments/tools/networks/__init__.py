"""Makes tables of all networks with their counted and published sizes."""
