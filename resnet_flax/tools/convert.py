"""Turns published weights into the workdir of a run that has not begun.

python -m resnet_flax.convert --source=FILE --config=configs/v1_depth20.py
  [--workdir=DIR] [--config.model.depth=56 ...]

FILE comes from Keras (.keras, .weights.h5, .h5) or PyTorch (.safetensors, .pt,
.pth, .th, .bin or .ckpt). Every array of weights in it is used exactly once, or
nothing is written.
"""

import contextlib
import os
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import dataset as dataset_lib, normalize as normalization
from resnet_flax.parallel import mesh as mesh_lib
from resnet_flax.run import (
  checkpoint,
  command_line,
  environment,
  errors,
  experiment as experiment_lib,
  files as files_lib,
  process,
  rules,
  signals,
  surroundings,
)
from resnet_flax.tools import new_folder
from resnet_flax.tools.weights import files, keras_names, mapping, pytorch_names

_LIBRARIES = {"keras": keras_names, "pytorch": pytorch_names}

Path = str | os.PathLike[str]


class Conversion(NamedTuple):
  """The result of a conversion."""

  title: str  # The network in the file.
  num_arrays: int  # The number of the file's arrays of weights: all are used.
  # Names of arrays that are not weights: counters, optimizer states.
  passed_over: tuple[str, ...]
  config: ConfigDict  # The configuration of the workdir.


def convert(source: Path, config: ConfigDict, workdir: Path) -> Conversion:
  """Makes the workdir of a run that starts from a file's weights.

  The network of `config` must compute what the file's network does. If the
  file's head does not fit the classes of the data set, `model.num_classes` is
  set to the size of the head. `workdir` must be new or empty.
  """
  source = errors.local_path(source, "--source")
  workdir = new_folder.resolve(workdir, "--workdir")
  config = ConfigDict(config.to_dict())
  rules.check(config, num_devices=1)
  if config.num_seeds > 1 or config.init_from:
    raise errors.ConfigError(
      f"num_seeds={config.num_seeds} must be 1 and init_from={config.init_from}"
      " must be empty: --source holds the weights of one network. Other runs"
      " can start from the new workdir, by init_from."
    )
  file = files.read(source)
  # A file's description of its layers may lack any key and hold any type.
  with files.explain(
    f"{file.path} is damaged, or its layers are not described as in files of"
    f" {file.library}",
    " Pass --source=FILE as the library saved it.",
  ):
    network = _LIBRARIES[file.library].identify(file)
  if wrong := mapping.differing(network, config):
    raise errors.ConfigError(
      f"{file.path} holds {network.title}, which the configuration must match:"
      f" pass {', '.join(wrong.values())}."
    )
  experiment = experiment_lib.build(config)
  # A file without a head has 0 classes here; `mapping.variables` reports it.
  if 0 < network.num_classes != experiment.num_classes:
    if config.model.num_classes:
      raise errors.ConfigError(
        f"model.num_classes={config.model.num_classes} must be 0 or"
        f" {network.num_classes}, the number of classes of {file.path}'s head."
      )
    config.model.num_classes = network.num_classes
    rules.check(config, num_devices=1)
    experiment = experiment_lib.build(config)
  like = experiment_lib.abstract_state(config, experiment)
  variables = mapping.variables(
    file, network, {"params": like.params, "batch_stats": like.batch_stats}
  )
  if config.normalization in normalization.UNMEASURED:
    scale = normalization.fixed(config.normalization, experiment.image_shape)
    data = None
  else:
    dataset = dataset_lib.load(config.dataset)
    scale = normalization.measure(config.normalization, dataset.train)
    data = dataset.source
  state = step_lib.state_from(experiment, variables, scale)

  described = environment.describe(jax.devices()) | {
    "data": data,
    "converted": {
      "source": source.name,
      "sha256": files_lib.digest_of(source),
      "holds": network.title,
      "passed_over": len(file.passed_over),
    },
  }
  mesh = mesh_lib.create_mesh(jax.devices()[:1])
  state = jax.device_put(state, mesh_lib.sharding(mesh))
  with new_folder.fill(workdir, "--workdir") as folder:
    files_lib.write_json(folder / "environment.json", described)
    files_lib.write_json(folder / "config.json", config.lock().to_dict())
    with checkpoint.Checkpoints(folder) as checkpoints:
      checkpoints.save(state, checkpoint.NEW_EPOCH)
  return Conversion(network.title, len(file.arrays), file.passed_over, config)


def _run(argv: list[str]) -> None:
  del argv
  surroundings.set_up()
  source = flags.FLAGS["source"].value
  if not source:
    raise errors.ConfigError(
      "--source must be a file of weights, for example"
      " --source=resnet50.safetensors."
    )
  config, default_workdir = command_line.config_and_workdir()
  workdir = process.WORKDIR.value or default_workdir
  # A signal first removes half-written files, then ends the process.
  with signals.StopSignals():
    result = convert(source, config, workdir)
  skipped = f"{len(result.passed_over)} skipped that are not weights"
  surroundings.show(f"Source: {result.title}")
  surroundings.show(f"Arrays: {result.num_arrays} used, each once; {skipped}")
  surroundings.show(f"Workdir: {workdir}")
  with contextlib.suppress(errors.ConfigError):
    rules.check_num_classes(result.config)
    return
  surroundings.show(
    f"The head's {result.config.model.num_classes} classes are not the classes"
    f" of {result.config.dataset.name}: the network can be loaded (load_model)"
    " and trained with a new head (init_from), but it cannot be scored."
  )


def run() -> None:
  """Runs the command line; errors and signals end in one line."""
  flags.DEFINE_string(
    "source",
    "",
    "File of weights. Keras: .keras, .weights.h5 or .h5. PyTorch: .safetensors,"
    " .pt, .pth, .th, .bin or .ckpt.",
  )
  flags.adopt_module_key_flags(command_line)
  flags.adopt_module_key_flags(process)
  process.run(_run, command_line.parse_flags)
