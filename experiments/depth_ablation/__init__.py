"""Tests whether shortcuts help a deep network more than a shallow one."""
