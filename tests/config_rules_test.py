import math

import pytest
from hypothesis import given, settings, strategies as st
from ml_collections import ConfigDict

from configs import base
from resnet_flax import config_rules, errors


def check(changes, num_devices=1):
  flat = config_rules.flatten(base.get_config().to_dict()) | changes
  nested = {}
  for key, value in flat.items():
    *parts, last = key.split(".")
    node = nested
    for part in parts:
      node = node.setdefault(part, {})
    node[last] = value
  config_rules.check(ConfigDict(nested), num_devices)


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
    ({"model.name": "resnet_v9"}, "Known: resnet_v1, resnet_v2"),
    ({"model.dtype": "float16"}, "Did you mean 'bfloat16'"),
    ({"model.shortcut": "B"}, "Known: A, keras"),
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
    ({"dataset.name": "cifar"}, "Did you mean"),
    ({"dataset.validation_examples": 50_000}, "leaves no training image"),
    ({"dataset.data_dir": "a\0b"}, "needed: a path"),
    ({"augment.name": "shift"}, "Known: crop_flip, none, shift_flip"),
    ({"normalization": "mean"}, "Known: channel, none, pixel_mean"),
    ({"optimizer.name": "adm"}, "Did you mean 'adam'"),
    ({"optimizer.learning_rate": math.nan}, "learning_rate=nan"),
    ({"optimizer.learning_rate": math.inf}, "learning_rate=inf"),
    ({"optimizer.learning_rate": -1.0}, "learning_rate=-1.0"),
    ({"optimizer.l2_weights": "kernels"}, "conv_kernels"),
    ({"schedule.drop_percents": (40, 20, 80, 90)}, "must ascend"),
    ({"schedule.drop_percents": (40,)}, "as many values"),
    ({"schedule.drop_percents": 40}, "a tuple"),
    ({"schedule.drop_percents": (0, 1, 2, 3)}, "from 1 to 100"),
    ({"plateau.factor": 1.0}, "below 1"),
    ({"modle.depth": 20}, "Did you mean 'model.depth'"),
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


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(),
  st.text(max_size=8),
  st.lists(st.integers(), max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(config_rules.RULES)), VALUES)
def test_any_value_passes_or_ends_in_one_line(key, value):
  try:
    check({key: value})
  except errors.ConfigError as error:
    message = str(error)
    assert "\n" not in message
    assert message
