"""Profiles a training step by kind of operation, with `jax.profiler`.

python -m experiments.throughput.profile_step [--batch_size=128] [--steps=6]
"""

import argparse
import collections
import functools
import pathlib
import re
import tempfile
import time

import jax

from configs import v1_depth20
from experiments.tools import flag_types, markdown, timing
from resnet_flax import step as step_lib
from resnet_flax.parallel import mesh, program
from resnet_flax.run import experiment as experiment_lib, huge_pages

# Patterns of an operation's name, shape and path (see `_describe`), and the
# operation's purpose. The first pattern that matches decides.
_KINDS = (
  (r"onednn.* f32\[1,\d+,\d+,\d+\]", "convolution: weight gradient"),
  (r"onednn.*transpose\(", "convolution: input gradient"),
  (r"onednn", "convolution: forward"),
  (r"^jit_|^call|^while|^closed_call", ""),  # Their operations are counted.
  (r"chunked_weight_gradient", "weight gradient: copies and sums of chunks"),
  (r"ynn_fusion|reduce", "sums: statistics, gradients of scale and bias"),
  (r"max", "batch norm, residual and ReLU, forward"),
  (r"select", "ReLU and residual, backward"),
  (r"/bn\d/|_bn/", "batch norm, backward, and bias of the convolution"),
  (r"", "everything else"),
)


def _describe(name: str, definitions: dict[str, str]) -> str:
  """Joins an operation's name, shape and path in the model into one text."""
  definition = definitions.get(name.split("__")[0], "")
  path = re.search(r'op_name="([^"]*)"', definition)
  shape = definition.partition("{")[0]
  return f"{name} {shape} {path[1] if path else ''}"


def profile(batch_size: int, steps: int) -> tuple[float, list[tuple[str, str]]]:
  """Profiles the main command's training step on one resident batch.

  As many warm-up steps come first. Gives the milliseconds of a profiled step,
  and of every kind of operation, summed over threads. A convolution counts only
  on the thread that starts it.
  """
  config = v1_depth20.get_config()
  config.batch_size = batch_size
  experiment = experiment_lib.build(config)
  trainer = timing.prepare(config, timing.noise(config))
  layout, state = trainer.layout, trainer.state
  images, labels, key = trainer.batch.arguments
  own = program.step_arguments(experiment, state, batch_size, key, layout)
  traced = program.trace(
    functools.partial(step_lib.train_step, experiment), layout, own, donate=True
  )
  compiled = traced.lower().compile(mesh.compiler_options(layout.mesh))
  step = layout.for_networks(compiled)

  def run(state, steps):
    for _ in range(steps):
      state, _ = step(state, images, labels, key)
    return jax.block_until_ready(state)

  state = run(state, steps)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      started = time.perf_counter()
      state = run(state, steps)
      step_ms = (time.perf_counter() - started) * 1e3 / steps
    (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
  definitions = dict(
    re.findall(
      r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$",
      compiled.as_text() or "",
      re.MULTILINE,
    )
  )
  items: collections.Counter[str] = collections.Counter()
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        operation = dict(event.stats).get("hlo_op")
        if operation is not None:
          text = _describe(str(operation), definitions)
          kind = next(kind for each, kind in _KINDS if re.search(each, text))
          items[kind] += event.duration_ns / 1e6 / steps
  del items[""]
  return step_ms, [(kind, f"{ms:.1f}") for kind, ms in items.most_common()]


def main() -> None:
  """Prints a Markdown table with the largest item first."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--batch_size", type=flag_types.count, default=128)
  parser.add_argument("--steps", type=flag_types.count, default=6)
  flags = parser.parse_args()
  if flags.batch_size < 2:
    # A batch of one would look like the operand of a weight gradient.
    parser.error(f"--batch_size={flags.batch_size} must be at least 2")
  step_ms, items = profile(flags.batch_size, flags.steps)
  print(f"A profiled step takes {step_ms:.0f} ms.\n")
  print(markdown.table(("item", "ms"), items))


if __name__ == "__main__":
  huge_pages.use()
  main()
