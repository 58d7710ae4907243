import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from ml_collections import ConfigDict, config_dict

from resnet_flax.data import augment, crops, dataset as dataset_lib, normalize
from resnet_flax.models import blocks, registry
from resnet_flax.optim import any_optax, learning_rates, optimizers
from resnet_flax.run import config as config_keys, errors, keys, metrics, rules


def check(changes, num_devices=1):
  """Checks the defaults with changes; returns the configuration."""
  flat = keys.to_flat(config_keys.default_config()) | changes
  nested = {}
  for key, value in flat.items():
    *parts, last = key.split(".")
    node = nested
    for part in parts:
      node = node.setdefault(part, {})
    node[last] = value
  config = ConfigDict(nested)
  rules.check(config, num_devices)
  return config


LARGE = {
  "model.name": "resnet_imagenet",
  "model.depth": 18,
  "model.input_size": 224,
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_epochs": 0}, "num_epochs=0 must be an integer from 1 to"),
    ({"num_epochs": 1.5}, "num_epochs=1.5"),
    ({"batch_size": True}, "batch_size=True"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 50_001}, "must be at most 50000, the number of training"),
    ({"seed": -1}, "seed=-1 must be an integer from 0 to 4294967295"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"model.depth": 21}, "nearest: 20 and 26"),
    ({"model.depth": "20"}, "model.depth='20'"),
    ({"model.name": "resnet_v9"}, "Did you mean 'resnet_v"),
    ({"model.dtype": "float16"}, "Did you mean 'bfloat16'"),
    ({"model.shortcut": "D"}, "Known: A, B, C, default, keras, none"),
    (
      {"model.name": "resnet_v2", "model.depth": 11, "model.shortcut": "A"},
      "has",
    ),
    ({"model.padding": "SAME"}, "Did you mean 'same'|Known: same, symmetric"),
    ({"model.conv_bias": 1}, "true or false"),
    ({"model.batch_norm_momentum": 1.0}, "below 1"),
    (
      {"seed": 2**32 - 1, "num_seeds": 2},
      "seed=4294967295, .* at most 4294967294",
    ),
    ({"log_layer_norms_every": 1, "log.tensorboard": False}, "must be 0 if"),
    ({"dataset.name": "tfds/"}, "is not known"),
    # No file name has 300 bytes.
    ({"dataset.name": "tfds/" + "\u65e5" * 100}, "is not known"),
    ({"model.gate_bias": -3.0}, "=resnet_v1; it is for highway. Leave it -2.0"),
    (
      {"schedule.peak_percent": 40},
      "does nothing for schedule.name=drops; it is for onecycle. Leave it 30",
    ),
    ({"model.dropout": 0.0}, "does nothing .* it is for vgg, alexnet"),
    (
      LARGE | {"model.name": "alexnet", "model.depth": 8, "model.norm": "none"},
      "resnet_v2, preact, .*plain_imagenet, vgg",
    ),
    ({"model.groups": 8}, "it is for resnext, resnet_imagenet. Leave it 0"),
    (
      LARGE | {"model.groups": 32, "model.group_width": 4},
      "groups=32, model.group_width=4 need .* from depth 50 on; at depth 18",
    ),
    (
      {"model.name": "plain", "model.stochastic_depth": 0.5},
      "does nothing for model.name=plain",
    ),
    ({"model.stochastic_depth": 1.0}, "to below 1"),
    ({"model.block_dropout": 0.3}, "it is for preact, wide_resnet"),
    (
      {"model.norm": "group_norm", "model.batch_norm_groups": 2},
      "does nothing without batch norm",
    ),
    (
      LARGE | {"model.name": "vgg", "model.depth": 19, "model.scan": True},
      "scan",
    ),
    (
      {"model.name": "resnet_imagenet", "model.depth": 18},
      "32x32 .* too small",
    ),
    ({"model.remat": 0}, "true or false"),
    ({"model.scan": "yes"}, "true or false"),
    ({"model.batch_norm_epsilon": 0.0}, "from 1e-37"),
    ({"model.batch_norm_groups": 0}, "from 1"),
    (
      {"model.batch_norm_groups": 3},
      "divisible by model.batch_norm_groups=3; .* 30 or 33",
    ),
    (
      {"model.batch_norm_groups": 3, "dataset.train_examples": 32},
      "divisible by model.batch_norm_groups=3; for example 30\\.",
    ),
    (
      {"model.batch_norm_groups": 64, "dataset.train_examples": 32},
      "groups=64; use fewer, as there are only 32 training images",
    ),
    (
      {"model.batch_norm_groups": 2, "model.norm": "none"},
      "does nothing without batch norm",
    ),
    ({"dataset.name": "cifar"}, "Did you mean"),
    ({"dataset.validation_examples": 50_000}, "leaves no training image"),
    ({"dataset.data_dir": "a\0b"}, "must be a local path"),
    ({"augment.name": "shift"}, "Known: crop_flip, none, random_"),
    (
      {"normalization": "mean"},
      "Known: caffe, channel, imagenet, none, pixel_mean",
    ),
    ({"optimizer.name": "adm"}, "Did you mean 'adam'"),
    ({"optimizer.name": "adamw"}, "is Adam with an L2 term"),
    ({"ema.decay": 0.9, "swa.start_epoch": 1}, "one must be 0"),
    ({"swa.start_epoch": 200}, "must be below num_epochs=200"),
    ({"optimizer.learning_rate": math.nan}, "learning_rate=nan"),
    ({"optimizer.learning_rate": math.inf}, "learning_rate=inf"),
    ({"optimizer.learning_rate": -1.0}, "learning_rate=-1.0"),
    (
      {"optimizer.weight_decay": 5e-4},
      r"optimizer.l2=0.0001: one must be 0. Pass --config.optimizer.l2=0",
    ),
    (
      {"optimizer.name": "lion", "optimizer.b1": 0.8},
      "b1=0.8 does nothing for optimizer.name=lion; it is for adam. Leave it",
    ),
    ({"optimizer.nesterov": True}, "does nothing for optimizer.name=adam"),
    ({"optimizer.clip_norm": -1.0}, "clip_norm=-1.0"),
    (
      {"optimizer.accumulate_steps": 1563},
      "accumulate_steps=1563 must be at most the 1562 steps of an epoch",
    ),
    (
      {"schedule.name": "onecycle", "schedule.linear_warmup_epochs": 1},
      "which rises by itself",
    ),
    (
      {
        "schedule.name": "warmup_stable_decay",
        "schedule.linear_warmup_epochs": 170,
      },
      "must end before epoch 160, where the rate falls or the run ends",
    ),
    ({"optimizer.l2_weights": "kernel"}, "Did you mean 'kernels'"),
    ({"label_smoothing": 1.0}, "below 1"),
    ({"schedule.name": "cosin"}, "Did you mean 'cosine'"),
    ({"schedule.linear_warmup_epochs": 81}, "must end before epoch 81"),
    (
      {"schedule.name": "cosine", "schedule.linear_warmup_epochs": 200.0},
      "=200 must end before epoch 200",
    ),
    (
      {
        "schedule.linear_warmup_epochs": 5,
        "schedule.warmup_learning_rate": 0.01,
        "model.depth": 110,
      },
      "one must be 0",
    ),
    ({"dataset.test_crops": 5}, "test_crops=5 must be 1, 2 or 10"),
    ({"dataset.test_crops": True}, "test_crops=True"),
    ({"dataset.test_crops": 10}, "has them in memory. It must be 1 or 2"),
    ({"schedule.drop_percents": (40, 20, 80, 90)}, "must ascend"),
    ({"schedule.drop_percents": (40,)}, "as many values"),
    ({"schedule.drop_percents": 40}, "a tuple"),
    ({"schedule.drop_percents": (0, 1, 2, 3)}, "from 1 to 100"),
    ({"plateau.factor": 1.0}, "below 1"),
    ({"checkpoint.monitor": "acuracy"}, "Did you mean 'accuracy'"),
    ({"checkpoint.monitor": "f1"}, "Known: accuracy, loss, objective"),
    ({"checkpoint.every_steps": -1}, "checkpoint.every_steps=-1"),
    (
      {"checkpoint.every_minutes": float("nan")},
      "checkpoint.every_minutes=nan",
    ),
    ({"modle.depth": 20}, "Did you mean 'model.depth'"),
    ({"seed": 10**5000}, r"seed=\(int\) must be"),
    ({"seed": np.int64(0)}, "seed="),
    ({"num_epochs": 10**12}, "must be an integer from 1 to 2147483647"),
    ({"num_epochs": 2**31 - 1}, "of 1562 steps must be at most 1374829"),
    ({"eval_batch_size": 10**9}, "from 1 to 65536"),
    ({"dataset.split_seed": 2**32}, "split_seed=4294967296"),
    ({"dataset.train_examples": 50_001}, "more than the 50000"),
    ({"dataset.train_examples": 10**30}, "from 0 to 2147483647"),
    ({"dataset.archive": "\ud800"}, "must be a local path"),
    ({"dataset.cache_dir": "x" * 5000}, r"x\.\.\. must be a local path"),
    ({"dataset.data_dir": b"x"}, "must be a local path"),
    ({"model.depth": 10**9 + 4}, "must be an integer from 1 to 2000"),
    ({"model.num_filters": 10**9}, "from 0 to 1024"),
    ({"model.name": ""}, "model.name='' is not known"),
    ({"model.name": "\x1b[2J\n" * 100}, "model.name="),
    ({"optimizer.learning_rate": 10**400}, "learning_rate=1000"),
    ({"optimizer.learning_rate": 1e39}, "below 1e\\+38"),
    (
      {
        "optimizer.learning_rate": 1e30,
        "schedule.drop_factors": (0.1, 1e10, 1, 1),
      },
      r"is a rate of 1e\+40; it must be below 1e\+38",
    ),
    # As float32 these are 0, 1 and 1.
    ({"optimizer.epsilon": 1e-50}, "epsilon=1e-50"),
    ({"optimizer.b1": 1 - 1e-12}, "below 1"),
    ({"plateau.factor": 1 - 1e-12}, "below 1"),
    ({"optimizer.l2": -(10**400)}, "from 0"),
    ({"schedule.drop_factors": (0.1,) * 101}, "at most 100"),
    ({"schedule.drop_factors": (0.1, math.nan, 0.1, 0.1)}, "0.1, nan, 0.1"),
    ({"schedule.drop_percents": ("x", None, 1, 2)}, r"drop_percents=\('x'"),
    ({"schedule.drop_percents": "1234"}, "a tuple"),
  ],
)
def test_wrong_values_are_named(changes, message):
  with pytest.raises(errors.ConfigError, match=message) as caught:
    check(changes)
  assert "\n" not in str(caught.value)


def test_missing_key_is_named():
  config = config_keys.default_config()
  with config.unlocked():
    del config.model["depth"]
  with pytest.raises(errors.ConfigError, match=r"lacks model\.depth"):
    rules.check(config, 1)


@pytest.mark.parametrize(
  ("batch_size", "nearest"), [(32, "30 or 35"), (3, "5 or 10")]
)
def test_batch_that_devices_do_not_divide(batch_size, nearest):
  with pytest.raises(errors.ConfigError, match=f"5 devices.*{nearest}"):
    check({"batch_size": batch_size}, num_devices=5)


class NoText:
  """Cannot even be shown."""

  def __repr__(self):
    raise RuntimeError("never")


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.sampled_from([2**31 - 1, 2**31, 2**32, 10**30, 10**400, -(10**5000)]),
  st.floats(),
  st.sampled_from([1e-50, 1e-38, 3e38, 1e39, 1 - 1e-12, 5e-324]),
  st.text(max_size=8),
  st.text("\n\x1b\0\ud800 é", max_size=8),
  st.sampled_from(["", "x" * 100_000, "~nobody/x"]),
  st.binary(max_size=3),
  st.lists(st.integers() | st.floats(), max_size=3).map(tuple),
  st.lists(st.none() | st.text(max_size=3), max_size=3).map(tuple),
  st.builds(NoText),
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
  st.dictionaries(
    st.sampled_from(sorted(config_keys.KEYS)), VALUES, max_size=3
  ),
  st.integers(1, 8),
)
def test_any_values_pass_or_end_in_one_line(changes, num_devices):
  try:
    config = check(changes, num_devices)
  except errors.ConfigError as error:
    message = str(error)
    assert message.isprintable()
    assert 0 < len(message) < 500
  else:
    registry.create_model(config.model, num_classes=10)


@pytest.mark.parametrize("value", ["", "x", None, -1, 1.5, (), b"x"])
def test_every_key_refuses_values_of_other_kinds(value):
  """As somebody sets them in Python; the command line parses by kind."""
  for name, key in config_keys.KEYS.items():
    if not key.values.accept(value):
      with pytest.raises(errors.ConfigError, match=re.escape(name)):
        key.check(value)


@pytest.mark.parametrize(
  ("name", "depth"),
  [
    *(("resnet_v1", 8), ("resnet_v2", 11), ("plain", 8), ("preact", 8)),
    *(("highway", 8), ("resnet_imagenet", 18), ("resnet_imagenet", 50)),
    *(("plain_imagenet", 18), ("vgg", 19), ("alexnet", 8)),
    *(("wide_resnet", 10), ("resnext", 11)),
  ],
)
def test_networks_that_pass_can_be_built(name, depth):
  """Rules look at a network without building it."""
  choices = {
    "model.shortcut": ("default", "A", "B", "C", "keras", "none"),
    "model.norm": ("batch_norm", "group_norm", "none"),
    "model.batch_norm_groups": (1, 2),
    "model.remat": (False, True),
    "model.dropout": (0.5, 0.0),
  }
  size = 224 if depth in (18, 19, 50) or name == "alexnet" else 0
  network = {"model.name": name, "model.depth": depth, "model.input_size": size}
  passed = 0
  for values in itertools.product(*choices.values()):
    try:
      config = check(network | dict(zip(choices, values, strict=True)))
    except errors.ConfigError:
      continue
    registry.create_model(config.model, num_classes=10)
    passed += 1
  assert passed >= 2


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.sampled_from(sorted(config_keys.KEYS)), st.integers(1, 60))
def test_what_passes_is_of_a_size_that_can_be_had(key, exponent):
  """No key lets any number through."""
  for value in (10**exponent, float(10**exponent)):
    try:
      check({key: value})
    except errors.ConfigError:
      continue
    assert value < 1e38
    assert np.isfinite(2 * np.float32(value))


def test_values_that_cannot_be_had():
  config = ConfigDict(config_keys.default_config().to_dict())
  config.seed = config_dict.required_placeholder(int)
  with pytest.raises(errors.ConfigError, match="cannot be read: Required"):
    rules.check(config, 1)
  config = ConfigDict(config_keys.default_config().to_dict())
  config.seed = config.get_ref("num_epochs") // config.get_ref("batch_size")
  config.batch_size = 0
  with pytest.raises(errors.ConfigError, match="ZeroDivisionError"):
    rules.check(config, 1)


def test_keys_that_are_no_text():
  config = ConfigDict(config_keys.default_config().to_dict() | {1: 2})
  with pytest.raises(errors.ConfigError, match="cannot be read"):
    rules.check(config, 1)


@pytest.mark.parametrize(
  ("key", "known"),
  [
    ("normalization", normalize.NAMES),
    ("dataset.name", dataset_lib.NAMES),
    ("augment.name", augment.MOVES),
    ("model.name", registry.MODELS),
    ("model.norm", registry.NORMS),
    ("model.shortcut", ("default", "none", *blocks.SHORTCUTS)),
    ("optimizer.name", {*optimizers.OPTIMIZERS, *any_optax.OPTIMIZERS}),
    ("optimizer.l2_weights", optimizers.L2_WEIGHTS),
    ("schedule.name", learning_rates.SCHEDULES),
    ("checkpoint.monitor", metrics.MONITORED),
    ("dataset.test_crops", {1, 2, crops.TEN_CROPS}),
    # Of these no table is built from: the words themselves are in the code.
    ("model.dtype", {"float32", "bfloat16"}),
    ("model.padding", {"same", "symmetric"}),
    ("seed_execution", {"auto", "in_turn", "vectorized"}),
    ("dataset.bad_images", {"error", "skip"}),
    ("average_batch_norm", {"recompute", "average"}),
  ],
)
def test_choices_are_what_is_built(key, known):
  assert set(config_keys.KEYS[key].values.choices) == set(known)


def test_every_choice_was_compared():
  compared = test_choices_are_what_is_built.pytestmark[0].args[1]
  with_choices = {k.name for k in config_keys.KEYS.values() if k.values.choices}
  assert {key for key, _ in compared} == with_choices


@pytest.mark.parametrize(
  ("name", "key"),
  [
    ("lr", "optimizer.learning_rate"),
    ("optimizer.lr", "optimizer.learning_rate"),
    ("wd", "optimizer.weight_decay"),
    ("epochs", "num_epochs"),
    ("depth", "model.depth"),
    ("optimizer.depth", "model.depth"),
    ("width", "model.num_filters"),
    ("dataset", "dataset.name"),
    ("workers", "dataset.num_workers"),
    ("Batch-Size", "batch_size"),
  ],
)
def test_a_wrong_key_is_answered_with_the_one_that_is_meant(name, key):
  assert keys.nearest_keys(name, config_keys.KEYS)[0] == key
  message = str(keys.unknown_key(name, config_keys.KEYS))
  assert f"Did you mean {key!r}" in message
  assert len(message) < 250


@pytest.mark.parametrize("name", ["", "zzz", "x" * 10**6, "model.depth.x"])
def test_any_wrong_key_is_answered_with_few(name):
  assert len(keys.nearest_keys(name[:100], config_keys.KEYS)) <= 3
  assert len(str(keys.unknown_key(name, config_keys.KEYS))) < 350


def test_other_names_are_of_keys():
  assert set(keys._OTHER_NAMES.values()) <= set(config_keys.KEYS)
  lasts = {key.rpartition(".")[2] for key in config_keys.KEYS}
  assert not lasts & set(keys._OTHER_NAMES)


def test_families_exist():
  for key in config_keys.KEYS.values():
    if key.read_by:
      known = config_keys.KEYS[f"{key.part}.name"].values.choices
      assert set(key.read_by) <= set(known), key.name


def test_defaults_can_be_used():
  config = config_keys.default_config()
  assert config.is_locked
  rules.check_values(config)
  for key in config_keys.KEYS.values():
    assert key.meaning.endswith((".", ")"))
