"""The cost of depth in compile time, memory and speed."""
