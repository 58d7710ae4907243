"""Hostile archives, made by the thousand and given to the archive reader."""
