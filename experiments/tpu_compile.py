"""Compiles for TPUs; see tools/tpu_compile."""

import runpy

if __name__ == "__main__":
  runpy.run_module("experiments.tools.tpu_compile", run_name="__main__")
