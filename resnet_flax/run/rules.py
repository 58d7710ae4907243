"""Constraints between configuration keys, checked before anything runs."""

import math

from ml_collections import ConfigDict

from resnet_flax.data import (
  augment,
  crops,
  dataset,
  normalize,
  streaming,
  types,
)
from resnet_flax.models import other_blocks as others, registry
from resnet_flax.optim import any_optax, learning_rates, optimizers, schedules
from resnet_flax.parallel import mesh
from resnet_flax.run import config as config_keys, errors, keys


def check(
  config: ConfigDict, num_devices: int, facts: types.Facts | None = None
) -> None:
  """Checks a configuration for training on `num_devices` devices.

  `facts`, which a run stores, replace the files of a streamed data set. Raises
  `ConfigError`, or `DataError` if the set has neither facts nor files.
  """
  check_values(config)
  check_model(config.model)
  _check_streaming(config)
  shape = dataset.info(config.dataset, facts).image_shape
  check_input_size(
    config.model, shape, streaming.is_streamed(config.dataset.name)
  )
  steps = _check_batch_size(config, num_devices, facts)
  _check_optimizer(config.optimizer, steps)
  _check_schedule(config)
  max_seed = config_keys.LAST_SEED + 1 - config.num_seeds
  _require(
    config.seed <= max_seed,
    f"seed={config.seed}, with num_seeds={config.num_seeds}, must be at most"
    f" {max_seed}.",
  )
  limit = keys.LARGEST_INTEGER // steps  # Steps are counted in int32.
  _require(
    config.num_epochs <= limit,
    f"num_epochs={config.num_epochs} of {steps} steps must be at most {limit}.",
  )
  decay, start = config.ema.decay, config.swa.start_epoch
  _require(
    start < config.num_epochs,
    f"swa.start_epoch={start} must be below num_epochs={config.num_epochs}.",
  )
  _require(
    not (decay and start),
    f"ema.decay={decay:g} and swa.start_epoch={start}: one must be 0, as a run"
    " keeps one average of its weights.",
  )
  _require(
    config.eval_every_epochs == 1 or not config.plateau.enabled,
    f"eval_every_epochs={config.eval_every_epochs}, but plateau.enabled=True"
    " needs every epoch's loss. It must be 1.",
  )
  _require(
    config.log.tensorboard or not config.log_layer_norms_every,
    f"log_layer_norms_every={config.log_layer_norms_every} writes to"
    " TensorBoard: it must be 0 if log.tensorboard=False. Or pass"
    " --config.log.tensorboard=True.",
  )


def check_values(config: ConfigDict) -> None:
  """Raises a `ConfigError` for unknown or missing keys and invalid values."""
  flat = keys.to_flat(config)
  for name in sorted(flat.keys() - config_keys.KEYS.keys()):
    raise keys.unknown_key(name, config_keys.KEYS)
  missing = sorted(config_keys.KEYS.keys() - flat.keys())
  if missing:
    raise errors.ConfigError(
      f"the configuration lacks {', '.join(missing)}: it was made by another"
      " version of this program. Start from configs/base.py."
    )
  for name, key in config_keys.KEYS.items():
    key.check(flat[name])


def check_num_classes(config: ConfigDict) -> None:
  """Checks that the head has the data's classes; loading does not need it."""
  name, num_classes = config.dataset.name, config.model.num_classes
  classes = dataset.info(config.dataset).num_classes
  _require(
    num_classes in (0, classes),
    f"model.num_classes={num_classes} but dataset.name={name} has {classes}"
    " classes: the network can be loaded, but neither trained nor scored. For a"
    " new head pass --config.model.num_classes=0 --config.init_from=WORKDIR and"
    " a new --workdir.",
  )


def _require(holds: bool, message: str) -> None:
  if not holds:
    raise errors.ConfigError(message)


def check_model(model: ConfigDict) -> None:
  """Checks depth and shortcut, and that keys without effect are not set."""
  registry.check_depth(model.name, model.depth)
  shortcuts = registry.MODELS[model.name].shortcuts
  _require(
    registry.shortcut(model) in shortcuts,
    f"model.shortcut={model.shortcut!r} does not exist for {model.name}; it"
    f" has: {', '.join(shortcuts)}. Pass --config.model.shortcut=default.",
  )
  _check_unread("model", model)
  _require(
    model.batch_norm_groups == 1 or model.norm == "batch_norm",
    f"model.batch_norm_groups={model.batch_norm_groups} does nothing without"
    " batch norm. It must be 1.",
  )
  _require(
    (model.groups <= 1 and not model.group_width)
    or model.name == "resnext"
    or model.depth >= others.FIRST_BOTTLENECK,
    f"model.groups={model.groups}, model.group_width={model.group_width} need"
    f" bottlenecks, which {model.name} has from depth {others.FIRST_BOTTLENECK}"
    f" on; at depth {model.depth} set both to 0.",
  )


def _check_unread(part: str, config: ConfigDict) -> None:
  """Checks that keys which `config.name` does not read have their defaults."""
  for key in config_keys.KEYS.values():
    if key.part == part and key.read_by and config.name not in key.read_by:
      value = config[key.name.rpartition(".")[2]]
      _require(
        value == key.default,
        f"{key.name}={value} does nothing for {part}.name={config.name}; it is"
        f" for {', '.join(key.read_by)}. Leave it {key.default}.",
      )


def _check_optimizer(config: ConfigDict, steps_per_epoch: int) -> None:
  _check_unread("optimizer", config)
  _require(
    not config.arguments or config.name not in ("adam", "sgd"),
    f"optimizer.arguments={config.arguments} must be empty for {config.name},"
    " which has keys of its own (--help=optimizer);"
    f" optimizer.name=optax/{config.name} takes arguments.",
  )
  _require(
    not (config.weight_decay and config.l2),
    f"optimizer.weight_decay={config.weight_decay:g} and optimizer.l2="
    f"{config.l2:g}: one must be 0. Pass --config.optimizer.l2=0.",
  )
  _require(
    config.name != "adamw" or not config.l2,
    f"optimizer.name=adamw with optimizer.l2={config.l2:g} is Adam with an L2"
    " term. Pass --config.optimizer.l2=0 and a weight_decay, such as"
    " --config.optimizer.weight_decay=0.01; or optimizer.name=adam.",
  )
  _require(
    config.accumulate_steps <= steps_per_epoch,
    f"optimizer.accumulate_steps={config.accumulate_steps} must be at most the"
    f" {steps_per_epoch} steps of an epoch, so that each has an update.",
  )
  name = config.name.removeprefix(any_optax.PREFIX)
  is_built_in = config.name in optimizers.OPTIMIZERS
  if not is_built_in and name not in any_optax.functions():
    what = f"optimizer.name={any_optax.PREFIX}NAME, NAME"
    raise errors.unknown_name(what, name, any_optax.functions())
  try:
    optimizers.create_optimizer(config)
  except ValueError as error:
    raise errors.ConfigError(str(error)) from error


def _check_streaming(config: ConfigDict) -> None:
  """Checks values that only sets in memory, or only streamed ones, take."""
  name, crop = config.dataset.name, config.augment.name
  is_streamed = streaming.is_streamed(name)
  num_crops = config.dataset.test_crops
  fixed = sorted(normalize.UNMEASURED)
  in_memory = sorted(augment.MOVES.keys() - crops.RANDOM.keys())
  _require(
    not is_streamed or config.normalization in fixed,
    f"normalization={config.normalization} is measured on images in memory, but"
    f" dataset.name={name} may not fit there. It must be one of"
    f" {', '.join(fixed)}.",
  )
  _require(
    is_streamed or crop not in crops.RANDOM,
    f"augment.name={crop} cuts images while they are decoded, but dataset.name="
    f"{name} has them in memory. It must be one of {', '.join(in_memory)}.",
  )
  _require(
    is_streamed or num_crops < crops.TEN_CROPS,
    f"dataset.test_crops={num_crops} cuts images while they are decoded, but"
    f" dataset.name={name} has them in memory. It must be 1 or 2.",
  )


def _check_batch_size(
  config: ConfigDict, num_devices: int, facts: types.Facts | None
) -> int:
  """The steps per epoch; checks that the batch size suits data and devices."""
  size = config.batch_size
  num_train = dataset.num_train_examples(config.dataset, facts)
  _require(
    size <= num_train,
    f"batch_size={size} must be at most {num_train}, the number of training"
    " images, so that an epoch has a step.",
  )
  # A batch is divided over one group of devices; each group has other seeds.
  group_size = num_devices // mesh.num_groups(num_devices, config.num_seeds)
  norm_groups = config.model.batch_norm_groups
  parts = math.lcm(group_size, norm_groups)
  nearest = max(size // parts, 1) * parts
  valid_sizes = [n for n in (nearest, nearest + parts) if n <= num_train]
  advice = f"for example {' or '.join(map(str, valid_sizes))}"
  if not valid_sizes:
    advice = f"use fewer, as there are only {num_train} training images"
  divisors = [f"{group_size} devices"] * (group_size > 1)
  divisors += [f"model.batch_norm_groups={norm_groups}"] * (norm_groups > 1)
  _require(
    size % parts == 0,
    f"batch_size={size} must be divisible by {' and by '.join(divisors)};"
    f" {advice}.",
  )
  return num_train // size


def _check_schedule(config: ConfigDict) -> None:
  """Checks the drops, a first rate of 0, and the end of a linear warm-up."""
  values = config.schedule
  _check_unread("schedule", values)
  percents, factors = tuple(values.drop_percents), tuple(values.drop_factors)
  _require(
    len(percents) == len(factors) and percents == tuple(sorted(percents)),
    f"schedule.drop_percents={percents} must ascend and have as many values as"
    f" schedule.drop_factors={factors}.",
  )
  rate, factor = config.optimizer.learning_rate, max(factors, default=1)
  _require(
    rate * factor < keys.LARGEST_NUMBER,
    f"optimizer.learning_rate={rate} times {factor} of schedule.drop_factors is"
    f" a rate of {rate * factor:g}; it must be below {keys.LARGEST_NUMBER:g}.",
  )
  epochs, rate = values.linear_warmup_epochs, values.warmup_learning_rate
  key = f"schedule.linear_warmup_epochs={epochs:g}"
  _require(
    not (epochs and rate) or config.model.depth < values.warmup_min_depth,
    f"{key} and schedule.warmup_learning_rate={rate:g}: one must be 0.",
  )
  _require(
    not epochs or values.name != "onecycle",
    f"{key} does nothing for schedule.name=onecycle, which rises by itself"
    " until schedule.peak_percent. Leave it 0.",
  )
  name, arguments = config.optimizer.name, config.optimizer.arguments
  _require(
    name not in any_optax.NO_ZERO_RATE
    or not (epochs or values.name == "onecycle")
    or "safeguard_warmup=True" in arguments.replace(" ", ""),
    f"optimizer.name={name} divides by the sum of the rates so far, but the"
    " first rate of onecycle and of schedule.linear_warmup_epochs is 0. Use"
    " neither, or for prodigy"
    " --config.optimizer.arguments=safeguard_warmup=True.",
  )
  ends = [config.num_epochs]  # The warm-up must be shorter than each of these.
  if values.name == "drops":
    ends += learning_rates.drop_epochs(ends[0], percents, values.drop_inclusive)
  if values.name == "warmup_stable_decay":
    ends.append(schedules.decay_start(ends[0], values.decay_percent))
  _require(
    not epochs or epochs < min(ends),
    f"{key} must end before epoch {min(ends)}, where the rate falls or the run"
    f" ends: it must be {'less, or num_epochs more' if min(ends) else 0}.",
  )


def check_input_size(
  config: ConfigDict, image_shape: tuple[int, ...], is_streamed: bool = False
) -> None:
  """Raises a `ConfigError` if the stem is not made for (H, W, C) images."""
  height, width = image_shape[:2]
  key = "dataset.image_size" if is_streamed else "model.input_size"
  if config.input_size:
    key, height, width = "model.input_size", *(config.input_size,) * 2
  families = registry.MODELS
  is_large = families[config.name].large_images
  low, high = (64, 2048) if is_large else (1, 128)
  is_small = min(height, width) < low
  if not is_small and max(height, width) <= high:
    return
  fitting = [n for n, f in families.items() if f.large_images != is_large]
  raise errors.ConfigError(
    f"model.name={config.name}, model.input_size={config.input_size}:"
    f" {height}x{width} images are too {'small' if is_small else 'large'} for"
    f" the network's stem, which takes {low}x{low} to {high}x{high}. Set"
    f" {key}={224 if is_small else 32}, or a model.name for"
    f" {'small' if is_small else 'large'} images ({', '.join(fitting)})."
  )
