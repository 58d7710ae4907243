import pytest

from configs import base, he2015_depth20
from resnet_flax.models import registry
from resnet_flax.run import errors
from resnet_flax.tools import summary


def test_multiply_adds_of_resnet20():
  model = registry.create_model(base.get_config().model, 10)
  # Stem; three stages of six 3x3 convolutions, the first of a later stage
  # with half the input channels; two projections; the head.
  stem = 32 * 32 * 27 * 16
  stages = [
    6 * 32 * 32 * 144 * 16,
    16 * 16 * 32 * (144 + 5 * 288),
    8 * 8 * 64 * (288 + 5 * 576),
  ]
  projections = 16 * 16 * 16 * 32 + 8 * 8 * 32 * 64
  expected = stem + sum(stages) + projections + 64 * 10
  assert (
    summary.measure_size(model, (32, 32, 3)).multiply_adds
    == expected
    == 40_813_184
  )


@pytest.mark.parametrize("name", ["resnet_v1", "resnet_v2"])
def test_summary(name, monkeypatch):
  config = base.get_config()
  config.model.update({"name": name, "depth": 20})
  text = summary.summarize(config)
  assert "stage3_block2" in text
  total, trainable = {
    "resnet_v1": ("274,442", "273,066"),
    "resnet_v2": ("574,090", "570,602"),
  }[name]
  assert f"Total parameters: {total}\n" in text
  assert f"Trainable parameters: {trainable}\n" in text
  assert "add_decayed_weights(0.0002, mask=conv_kernels)" in text
  assert "adam(b1=0.9, b2=0.999, eps=1e-07)" in text
  assert "(200 epochs of 1562 steps)" in text
  assert "epoch 81: 0.0001" in text
  assert "epoch 181: 5e-07" in text


def test_summary_of_the_paper():
  text = summary.summarize(he2015_depth20.get_config())
  assert "sgd(momentum=0.9" in text
  assert "(164 epochs of 390 steps)" in text
  assert "epoch 82: 0.01" in text
  assert "epoch 123: 0.001" in text


def test_bad_depth():
  config = base.get_config()
  config.model.depth = 19
  with pytest.raises(errors.ConfigError, match="14 and 20"):
    summary.summarize(config)
