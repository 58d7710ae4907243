"""One question each: see the README of every folder."""
