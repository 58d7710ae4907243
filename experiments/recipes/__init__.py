"""What short recipes reach; README.md has the question and the result."""
