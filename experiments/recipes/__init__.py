"""The accuracy that short recipes reach; README.md has the result."""
