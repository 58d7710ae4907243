"""What training several seeds in one program costs."""
