"""How fast images are decoded while training, and what that costs."""
