"""The cost of training several seeds in one program."""
