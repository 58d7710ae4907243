"""The surroundings of a process: streams, messages, caches, devices."""

import hashlib
import os
import sys
import warnings

from absl import logging as absl_logging

from resnet_flax.run import errors


def set_up() -> None:
  """Sets up messages and the compilation cache, before JAX is first used."""
  import jax

  from resnet_flax.data import cache
  from resnet_flax.run import environment, progress

  progress.log_to_stderr()
  # The libraries' own messages are about their internals. Problems that matter
  # to the user come as exceptions.
  absl_logging.set_verbosity(absl_logging.FATAL)
  # Programs with oneDNN's convolution cannot be cached: see kernels/onednn.py.
  warnings.filterwarnings(
    "ignore", "Error writing persistent compilation cache entry.*MemoryError"
  )
  # Small programs, too: the first weights are drawn by dozens of them.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    # Programs depend on the CPU, and several machines may share a home.
    processor = str(environment.cpu()).encode()
    digest = hashlib.sha256(processor).hexdigest()[:8]
    folder = cache.cache_dir("") / f"compiled-{digest}"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def show(text: str) -> None:
  """Prints a command's result; `UserError` if it cannot be written."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    raise  # `process.run` handles it.
  except OSError as error:
    raise errors.UserError(
      f"standard output cannot be written: {error.strerror}. The work is"
      " complete; send the output elsewhere to see it."
    ) from error


def open_streams() -> None:
  """Makes standard output and error take any text, even if they are closed."""
  for name in ("stdout", "stderr"):
    # Otherwise a file opened later would get libraries' messages.
    if getattr(sys, name) is None:
      setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    getattr(sys, name).reconfigure(errors="replace")


def check_platform() -> None:
  """Ends the process with a message if JAX finds no device of JAX_PLATFORMS."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    why = f" ({errors.one_line(error)})" if str(error) else ""
    errors.exit_with(
      f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no"
      f" device of this platform{why}. Install its extra,"
      " 'resnet_flax[cuda]' or 'resnet_flax[tpu]', or set JAX_PLATFORMS=cpu.",
      1,
    )
