"""Training on several devices: its cost, and whether results stay the same."""
