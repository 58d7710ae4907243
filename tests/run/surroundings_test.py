"""What a command sets up before JAX is first used."""

import os
import subprocess
import sys

CODE = """
from resnet_flax.run import surroundings
surroundings.set_up()
import jax
jax.jit(lambda x: x + 1)(1.0)
"""


def test_small_programs_are_kept(tmp_path):
  """A start draws its first weights with dozens of them."""
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
  environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
  subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)
  assert any("lambda" in path.name for path in tmp_path.iterdir())
