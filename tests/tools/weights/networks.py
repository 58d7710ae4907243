"""Small networks of other libraries, in their files."""

import numpy as np
from safetensors import numpy as safetensors_numpy

WIDTH = 4


def cifar_state_dict(depth=8, width=WIDTH, classes=10):
  """A PyTorch CIFAR ResNet with option A shortcuts, as numpy arrays."""
  rng = np.random.default_rng(0)
  state = {}

  def weights(name, *shape):
    state[name] = rng.normal(0, 0.1, shape).astype(np.float32)

  def norm(name, channels):
    weights(f"{name}.weight", channels)
    weights(f"{name}.bias", channels)
    weights(f"{name}.running_mean", channels)
    state[f"{name}.running_var"] = np.float32(rng.uniform(0.5, 1.5, channels))
    state[f"{name}.num_batches_tracked"] = np.array(3)

  weights("conv1.weight", width, 3, 3, 3)
  norm("bn1", width)
  channels_in = width
  for stage in range(3):
    channels = width * 2**stage
    for block in range((depth - 2) // 6):
      prefix = f"layer{stage + 1}.{block}"
      weights(f"{prefix}.conv1.weight", channels, channels_in, 3, 3)
      norm(f"{prefix}.bn1", channels)
      weights(f"{prefix}.conv2.weight", channels, channels, 3, 3)
      norm(f"{prefix}.bn2", channels)
      channels_in = channels
  weights("linear.weight", classes, channels_in)
  weights("linear.bias", classes)
  return state


def save(state, path):
  """Writes a .safetensors file."""
  safetensors_numpy.save_file(
    {name: np.ascontiguousarray(array) for name, array in state.items()}, path
  )
  return path


def for_cifar(config):
  """Makes a tiny configuration fit `cifar_state_dict`."""
  config.model.update(
    {
      "depth": 8,
      "num_filters": WIDTH,
      "shortcut": "A",
      "padding": "symmetric",
      "conv_bias": False,
      "batch_norm_epsilon": 1e-5,
    }
  )
  config.normalization = "imagenet"
  return config
