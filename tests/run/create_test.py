import jax
import jax.numpy as jnp
import pytest

import resnet_flax
from configs import base
from resnet_flax.models import registry
from resnet_flax.run import errors

DEPTHS = {"resnet_imagenet": 18, "plain_imagenet": 18, "vgg": 19, "alexnet": 8}
DEPTHS |= {"wide_resnet": 16}


@pytest.mark.parametrize("name", resnet_flax.list_models())
def test_every_listed_network_is_the_one_of_its_configuration(name):
  depth = DEPTHS.get(name, 20)
  config = base.get_config().model
  config.update({"name": name, "depth": depth})
  # In which the functions that it is made of have their addresses.
  found = resnet_flax.create_model(name, depth=depth, num_classes=7)
  assert str(found) == str(registry.create_model(config, 7))


def test_keys_of_the_model():
  model = resnet_flax.create_model(
    "resnet_v1", depth=8, num_classes=5, num_filters=4, shortcut="A"
  )
  assert (model.stem_filters, model.shortcut) == (4, "A")
  images = jnp.zeros((2, 32, 32, 3))
  logits, variables = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), images, train=False)
  )
  assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
  assert sorted(variables) == ["batch_stats", "params"]


@pytest.mark.parametrize(
  ("name", "values", "message"),
  [
    ("resnet", {}, "model.name='resnet' is not known. Did you mean"),
    ("resnet_v1", {"depth": 21}, "nearest: 20 and 26"),
    ("resnet_v1", {"depth": "20"}, "model.depth='20' must be an integer"),
    ("resnet_v1", {"num_classes": 0}, "num_classes=0 must be at least 1"),
    ("resnet_v1", {"num_classes": -1}, "model.num_classes=-1 must be"),
    ("resnet_v1", {"num_filter": 4}, "Did you mean 'model.num_filters'"),
    ("resnet_v1", {"stride_in_3x3": False}, "does nothing for model.name"),
    ("resnet_v2", {"shortcut": "A"}, "does not exist for resnet_v2"),
  ],
)
def test_what_no_network_has(name, values, message):
  with pytest.raises(errors.ConfigError, match=message):
    resnet_flax.create_model(name, **{"depth": 20, "num_classes": 10} | values)
