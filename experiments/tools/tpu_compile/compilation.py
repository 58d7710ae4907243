"""Compiles the training and the evaluation step without their devices.

The steps are traced as in training and evaluation, with shapes instead of
arrays.
"""

import collections
import functools
import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jaxlib.mlir import ir
from ml_collections import ConfigDict

from experiments.tools.tpu_compile import chips, hlo
from resnet_flax import data, step as step_lib
from resnet_flax.data import randomness
from resnet_flax.parallel import many_steps, mesh as mesh_lib, networks, program
from resnet_flax.run import errors, experiment as experiment_lib, rules
from resnet_flax.tools import summary

STEPS = ("train", "eval")


def topology_devices(topology: str) -> list[jax.Device]:
  """The devices of a slice such as 'v5e:2x4', as its compiler describes them.

  Raises `ConfigError` if the topology is unknown or libtpu is missing.
  """
  chip = chips.of_topology(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise errors.ConfigError(
      f"libtpu, the TPU compiler, must be installed for --topology={topology}:"
      " pip install -c constraints.txt -e '.[tpu-aot]' (it needs no TPU)."
    )
  try:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, chip_config_name=chip.config
    )
  except RuntimeError as error:
    raise chips.unknown(topology, errors.one_line(error)) from error
  return list(described.devices)


def trace(
  config: ConfigDict, devices: Sequence[jax.Device]
) -> dict[str, jax.stages.Traced]:
  """Traces `STEPS` for devices that need not exist.

  With several seeds, it traces the networks of one call. Raises `ConfigError`,
  for example if the batch is not divisible by the number of devices.
  """
  rules.check(config, num_devices=len(devices))
  rules.check_num_classes(config)
  experiment = experiment_lib.build(config)
  layout = _layout(config, devices)
  one_seed = ConfigDict(config.to_dict() | {"num_seeds": 1})
  state = layout.shapes(experiment_lib.abstract_state(one_seed, experiment))
  key = layout.shapes(
    jax.eval_shape(
      lambda: randomness.device_key(0, randomness.Purpose.AUGMENTATION)
    )
  )
  copied = mesh_lib.sharding(layout.mesh)
  divided = mesh_lib.sharding(layout.mesh, mesh_lib.DATA)
  images_and_labels = ((experiment.image_shape, np.uint8), ((), np.int32))
  if config.steps_per_call > 1:
    steps = experiment.learning_rate.steps_per_epoch
    order = layout.batch_shape((config.batch_size, steps), np.int32)
    count = data.num_train_examples(config.dataset)
    # Every device has a copy of the training split.
    split = [
      jax.ShapeDtypeStruct((count, *shape), dtype, sharding=copied)
      for shape, dtype in images_and_labels
    ]
    traced_train = program.trace(
      functools.partial(many_steps.train_steps, experiment),
      layout,
      (state, order, key),
      (*split, np.int32(0)),
      donate=True,
    )
  else:
    traced_train = program.trace(
      functools.partial(step_lib.train_step, experiment),
      layout,
      program.step_arguments(experiment, state, config.batch_size, key, layout),
      donate=True,
    )
  size = eval_batch_size(config, layout)
  batch = [
    jax.ShapeDtypeStruct((size, *shape), dtype, sharding=divided)
    for shape, dtype in (*images_and_labels, ((), np.bool_))
  ]
  eval_step = functools.partial(step_lib.eval_step, experiment)
  jitted = jax.jit(layout.for_chunk(eval_step, num_shared=3))
  traced_eval = jitted.trace(state.chunks[0], *batch)
  return {"train": traced_train, "eval": traced_eval}


def facts(config: ConfigDict) -> dict[str, Any]:
  """Selects the keys that a table shows besides the overrides."""
  keys = ("name", "depth", "dtype", "input_size")
  return {key: config.model[key] for key in keys}


def eval_batch_size(config: ConfigDict, layout: networks.Layout) -> int:
  """Rounds the evaluation batch up to a multiple of the devices."""
  num_devices = layout.mesh.shape[mesh_lib.DATA]
  return -(-config.eval_batch_size // num_devices) * num_devices


def _layout(
  config: ConfigDict, devices: Sequence[jax.Device]
) -> networks.Layout:
  automatic = config.seed_execution == "auto"
  # As in a run on TPUs.
  execution = "vectorized" if automatic else config.seed_execution
  return networks.Layout.create(config, devices, execution)


def describe(
  config: ConfigDict, topology: str, devices: Sequence[jax.Device], cores: int
) -> dict[str, Any]:
  """Compiles both steps for devices of `cores` TensorCores; describes them.

  Gives `topology`, `device_kind`, `num_devices`, `memory_bytes` (HBM of a
  device) and `config` (see `facts`). Each of `STEPS` has the result of
  `describe_step`, `compile_seconds`, `images_per_device`, `model_flops` (twice
  the multiply-adds of convolutions and dense layers for a device's images) and
  the `roofline` (see `chips.roofline`). Training also has `state_arrays`, the
  number of arrays in a state.
  """
  chip = chips.of_topology(topology)
  # Tracing comes first, since it finds errors before the long compilation.
  traced = trace(config, devices)
  layout = _layout(config, devices)
  experiment = experiment_lib.build(config)
  multiply_adds = summary.measure_size(
    experiment.model, experiment.image_shape
  ).multiply_adds
  images = {
    "train": config.batch_size,
    "eval": eval_batch_size(config, layout),
  }
  result: dict[str, Any] = {
    "topology": topology,
    "device_kind": devices[0].device_kind,
    "num_devices": len(devices),
    "memory_bytes": chip.memory_bytes * cores / chip.num_cores,
    "config": facts(config),
  }
  for name in STEPS:
    num_networks = layout.chunk_size // layout.mesh.shape[mesh_lib.SEED]
    per_device = images[name] // layout.mesh.shape[mesh_lib.DATA]
    started = time.perf_counter()
    compiled = traced[name].lower().compile()
    seconds = time.perf_counter() - started
    step = describe_step(compiled)
    # Each of a layer's two gradients takes as many operations as its output.
    passes = 3 if name == "train" else 1
    step |= {
      "compile_seconds": seconds,
      "images_per_device": per_device,
      "model_flops": 2 * multiply_adds * passes * per_device * num_networks,
    }
    step["roofline"] = chips.roofline(
      chip,
      cores,
      # XLA counts a loop's body once.
      max(step["flops"], step["model_flops"]),
      step["bytes_accessed"],
    )
    if name == "train":
      step["state_arrays"] = len(jax.tree.leaves(traced[name].in_avals[0][0]))
    result[name] = step
  return result


def describe_step(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Describes a compiled program per device; `hlo.Module` explains most values.

  `memory` is in bytes: `arguments`, `results`, `aliased` (results that
  overwrite arguments), `temporary`, `program`, and their `total`. `flops` and
  `bytes_accessed` come from XLA's cost analysis. The latter counts the bytes
  that each fusion reads and writes, in any memory.
  """
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis()
  assert memory is not None  # CPUs, GPUs and TPUs all have both.
  assert cost is not None
  module = hlo.parse(compiled.as_text() or "")
  collectives = module.collectives()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "results": memory.output_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
  }
  sizes["total"] = sum(sizes.values()) - 2 * sizes["aliased"]
  return {
    "memory": sizes,
    "flops": cost["flops"],
    "bytes_accessed": cost["bytes accessed"],
    "collectives": collectives,
    "collective_count": sum(each["count"] for each in collectives),
    "collective_bytes": sum(
      each["count"] * each["bytes"] for each in collectives
    ),
    "convolutions": module.count("convolution"),
    "loops": module.count("while"),
    "custom_calls": module.custom_calls(),
    "host_transfers": module.host_transfers(),
    "convolution_padding": module.convolution_padding(),
    "aliased_arrays": module.num_aliased(),
  }


def lower(config: ConfigDict, devices: Sequence[jax.Device]) -> dict[str, Any]:
  """Lowers both steps for as many GPUs as there are devices, of any kind.

  Each of `STEPS` has `convolutions`, `dots` (products of matrices), `loops` and
  `custom_calls` by target (code outside StableHLO), counted by occurrence.
  """
  result = {}
  for name, traced in trace(config, devices).items():
    lowered = traced.lower(lowering_platforms=("cuda",))
    names: collections.Counter[str] = collections.Counter()
    targets: collections.Counter[str] = collections.Counter()

    def visit(operation, names=names, targets=targets):
      names[operation.name] += 1
      if operation.name == "stablehlo.custom_call":
        targets[str(operation.attributes["call_target_name"]).strip('"')] += 1
      return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    result[name] = {
      "convolutions": names["stablehlo.convolution"],
      "dots": names["stablehlo.dot_general"],
      "loops": names["stablehlo.while"],
      "custom_calls": dict(sorted(targets.items())),
    }
  return result


def check_transfers(described: dict[str, Any]) -> None:
  """Raises `UserError` if a step exchanges data with the host."""
  for step in STEPS:
    transfers = described[step]["host_transfers"]
    if transfers:
      raise errors.UserError(
        f"the {step} step has {len(transfers)} transfers to or from the host,"
        f" such as {transfers[0]}, which stop the device. Remove their causes,"
        " such as callbacks and prints, from the model and the metrics."
      )
