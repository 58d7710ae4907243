"""Writes the tables of networks; see tools/networks."""

import runpy

if __name__ == "__main__":
  runpy.run_module("experiments.tools.networks", run_name="__main__")
