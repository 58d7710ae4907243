"""What depth costs in time to compile, memory and speed."""
