"""One run on several devices, seeds and hosts."""
