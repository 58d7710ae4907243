import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from ml_collections import ConfigDict, config_dict

from configs import base
from resnet_flax import experiment
from resnet_flax.run import config as config_rules, errors


def check(changes, num_devices=1):
  """Checks the defaults with changes; returns the configuration."""
  flat = config_rules.flatten(base.get_config().to_dict()) | changes
  nested = {}
  for key, value in flat.items():
    *parts, last = key.split(".")
    node = nested
    for part in parts:
      node = node.setdefault(part, {})
    node[last] = value
  config = ConfigDict(nested)
  config_rules.check(config, num_devices)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_epochs": 0}, "num_epochs=0 cannot be used; needed: an integer from"),
    ({"num_epochs": 1.5}, "num_epochs=1.5"),
    ({"batch_size": True}, "batch_size=True"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 50_001}, "more than the 50000 training images"),
    ({"seed": -1}, "needed: an integer from 0 to 4294967295"),
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
    ({"model.remat": 0}, "true or false"),
    ({"model.scan": "yes"}, "true or false"),
    ({"model.batch_norm_epsilon": 0.0}, "from 1e-37"),
    ({"model.batch_norm_groups": 0}, "from 1"),
    ({"model.batch_norm_groups": 3}, "batch_size=32 .* 30 or 33 has"),
    (
      {"model.batch_norm_groups": 2, "model.batch_norm": False},
      "does nothing without batch norm",
    ),
    ({"dataset.name": "cifar"}, "Did you mean"),
    ({"dataset.validation_examples": 50_000}, "leaves no training image"),
    ({"dataset.data_dir": "a\0b"}, "needed: a path"),
    ({"augment.name": "shift"}, "Known: crop_flip, none, random_"),
    (
      {"normalization": "mean"},
      "Known: caffe, channel, imagenet, none, pixel_mean",
    ),
    ({"optimizer.name": "adm"}, "Did you mean 'adam'"),
    ({"optimizer.learning_rate": math.nan}, "learning_rate=nan"),
    ({"optimizer.learning_rate": math.inf}, "learning_rate=inf"),
    ({"optimizer.learning_rate": -1.0}, "learning_rate=-1.0"),
    ({"optimizer.l2_weights": "kernel"}, "Did you mean 'kernels'"),
    ({"label_smoothing": 1.0}, "below 1"),
    ({"schedule.name": "cosin"}, "Did you mean 'cosine'"),
    ({"schedule.linear_warmup_epochs": 81}, "the run ends, at epoch 81"),
    (
      {"schedule.name": "cosine", "schedule.linear_warmup_epochs": 200.0},
      "up to epoch 200, .* at epoch 200",
    ),
    (
      {
        "schedule.linear_warmup_epochs": 5,
        "schedule.warmup_learning_rate": 0.01,
        "model.depth": 110,
      },
      "two warm-ups",
    ),
    ({"dataset.test_crops": 5}, "test_crops=5 .* needed: 1 or 10"),
    ({"dataset.test_crops": True}, "test_crops=True"),
    ({"dataset.test_crops": 10}, "has them in memory. Needed: 1"),
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
    ({"seed": 10**5000}, r"seed=\(int\) cannot be used"),
    ({"seed": np.int64(0)}, "seed="),
    ({"num_epochs": 10**12}, "needed: an integer from 1 to 2147483647"),
    ({"num_epochs": 2**31 - 1}, r"of 1562 steps .*; at most 1374829 are not"),
    ({"eval_batch_size": 10**9}, "from 1 to 65536"),
    ({"dataset.split_seed": 2**32}, "split_seed=4294967296"),
    ({"dataset.train_examples": 50_001}, "more than the 50000"),
    ({"dataset.train_examples": 10**30}, "from 0 to 2147483647"),
    ({"dataset.archive": "\ud800"}, "needed: a path"),
    ({"dataset.cache_dir": "x" * 5000}, r"x\.\.\. cannot be used"),
    ({"dataset.data_dir": b"x"}, "needed: a path"),
    ({"model.depth": 10**9 + 4}, "needed: an integer from 1 to 2000"),
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
      r"is a rate of 1e\+40; needed: one below 1e\+38",
    ),
    # As float32 these are 0, 1 and 1.
    ({"optimizer.epsilon": 1e-50}, "epsilon=1e-50"),
    ({"optimizer.b1": 1 - 1e-12}, "below 1"),
    ({"plateau.factor": 1 - 1e-12}, "below 1"),
    ({"optimizer.l2": -(10**400)}, "from 0"),
    ({"schedule.drop_factors": (0.1,) * 101}, "at most 100"),
    ({"schedule.drop_factors": (0.1, math.nan, 0.1, 0.1)}, "drop_factors=nan"),
    ({"schedule.drop_percents": ("x", None, 1, 2)}, "drop_percents='x'"),
    ({"schedule.drop_percents": "1234"}, "a tuple"),
  ],
)
def test_wrong_values_are_named(changes, message):
  with pytest.raises(errors.ConfigError, match=message) as caught:
    check(changes)
  assert "\n" not in str(caught.value)


def test_missing_key_is_named():
  config = base.get_config()
  with config.unlocked():
    del config.model["depth"]
  with pytest.raises(errors.ConfigError, match=r"lacks model\.depth"):
    config_rules.check(config, 1)


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
    st.sampled_from(sorted(config_rules.RULES)), VALUES, max_size=3
  ),
  st.integers(1, 8),
)
def test_any_values_pass_or_end_in_one_line(changes, num_devices):
  try:
    experiment.build(check(changes, num_devices))
  except errors.ConfigError as error:
    message = str(error)
    assert message.isprintable()
    assert 0 < len(message) < 500


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.sampled_from(sorted(config_rules.RULES)), st.integers(1, 60))
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
  config = ConfigDict(base.get_config().to_dict())
  config.seed = config_dict.required_placeholder(int)
  with pytest.raises(errors.ConfigError, match="cannot be read: Required"):
    config_rules.check(config, 1)
  config = ConfigDict(base.get_config().to_dict())
  config.seed = config.get_ref("num_epochs") // config.get_ref("batch_size")
  config.batch_size = 0
  with pytest.raises(errors.ConfigError, match="ZeroDivisionError"):
    config_rules.check(config, 1)


def test_keys_that_are_no_text():
  config = ConfigDict(base.get_config().to_dict() | {1: 2})
  with pytest.raises(errors.ConfigError, match="cannot be read"):
    config_rules.check(config, 1)


def test_keys_that_came_later_mean_what_was_done_before():
  """Each is the default, so that an older run is the same as it was."""
  declared = config_rules.flatten(base.get_config().to_dict())
  for key, value in config_rules._ADDED_KEYS.items():
    assert declared[key] == value
  stored = {"batch_size": 8, "model": {"depth": 8}}
  filled = config_rules.flatten(config_rules.with_added_keys(stored))
  assert filled["model.batch_norm_groups"] == 1
  assert filled["model.depth"] == 8
  assert stored == {"batch_size": 8, "model": {"depth": 8}}
  with_value = config_rules.with_added_keys({"num_seeds": 3})
  assert with_value["num_seeds"] == 3
