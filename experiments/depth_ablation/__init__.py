"""Tests whether depth raises training error with and without shortcuts."""
