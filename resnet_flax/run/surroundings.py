"""What a process finds around it: closed or full streams, devices not there."""

import os
import sys

from resnet_flax.run import errors


def show(text: str) -> None:
  """Prints what a command has found.

  Raises:
    UserError: standard output cannot be written, as on a full disk.
  """
  try:
    print(text, flush=True)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise errors.UserError(
      f"standard output cannot be written: {error.strerror}. What was done is"
      " complete; send the output elsewhere to see it."
    ) from error


def open_streams() -> None:
  """Sees that whatever is printed later can be."""
  for name in ("stdout", "stderr"):
    # Closed: a file opened later would get its number, and libraries' messages.
    if getattr(sys, name) is None:
      setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    getattr(sys, name).reconfigure(errors="replace")


def check_platform() -> None:
  """Says so if JAX cannot have the devices that it is asked for."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    errors.leave(
      f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such"
      f" device ({errors.one_line(error)}). Install its extra,"
      " 'resnet_flax[cuda]' or 'resnet_flax[tpu]', or set JAX_PLATFORMS=cpu.",
      1,
    )
