"""Runs a sweep; see tools/sweep."""

import runpy

if __name__ == "__main__":
  runpy.run_module("experiments.tools.sweep", run_name="__main__")
