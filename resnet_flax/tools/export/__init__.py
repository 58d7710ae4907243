"""Trained networks, in the files of other libraries and programs."""
