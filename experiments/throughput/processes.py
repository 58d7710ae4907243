"""The processes of the programs, which measure on request."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from experiments.throughput import environments
from resnet_flax.run import errors


class Worker(contextlib.AbstractContextManager):
  """A program's process, which measures on request.

  The constructor builds the program. An ended process raises `UserError`.
  """

  def __init__(
    self, command: list[str], environ: dict[str, str], messages: pathlib.Path
  ) -> None:
    self._command = command
    self._messages = messages
    with messages.open("w") as stderr:
      self._process = subprocess.Popen(
        command,
        cwd=environments.ROOT,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
      )
    self.facts = self._answer()

  def __exit__(self, *exception: object) -> None:
    self._process.kill()
    with self._process:  # Waits, and closes its streams.
      pass

  def ask(self, request: str) -> dict[str, Any]:
    """Measures a window; a request has its kind and its seconds."""
    print(request, file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      with self._process:
        status = self._process.wait()
      raise errors.UserError(
        f"{' '.join(self._command)} ended with exit status {status}; its"
        f" messages end with:\n{self._messages.read_text()[-3000:]}"
      )
    return json.loads(line)

  def cpu_seconds(self) -> float:
    """The processor time so far; 0 where it is not known."""
    path = pathlib.Path(f"/proc/{self._process.pid}/stat")
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:
      return 0.0
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(
  workers: dict[str, list[str]],
  setting: dict[str, int],
  threads: int,
  found: list[dict[str, Any]],
) -> Iterator[dict[str, Worker]]:
  """Starts every program's worker for a depth and batch size, and ends them.

  Each worker's facts are added to `found`. A worker that cannot be built is
  left out, for example compiled PyTorch without a C++ compiler.
  """
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    environ = {
      **os.environ,
      # All frameworks use the CPU, even if there is a GPU.
      "CUDA_VISIBLE_DEVICES": "",
      "JAX_PLATFORMS": "cpu",
      "KERAS_BACKEND": "tensorflow",
      # This sets the number of JAX's threads; no function of JAX does.
      "NPROC": str(threads),
      "JAX_ENABLE_COMPILATION_CACHE": "false",
      # A larger number starts processes that stay.
      "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    settings = {**setting, "threads": threads}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    built = {}
    for program, command in workers.items():
      print(f"{setting}: {program} builds", file=sys.stderr)
      messages = pathlib.Path(folder, f"{program}.txt")
      try:
        # No build may reuse code that another program has compiled.
        env = {**environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{program}"}
        worker = Worker([*command, *arguments], env, messages)
      except errors.UserError as error:
        print(f"{program} is left out: {error}", file=sys.stderr)
        facts = {"left_out": str(error)}
      else:
        built[program] = stack.enter_context(worker)
        facts = worker.facts
      found.append({"program": program, **setting, **facts})
    yield built
