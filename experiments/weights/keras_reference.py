"""Saves random weights in Keras's files, with Keras's logits of images.

  python keras_reference.py --name=example_v1_20 --folder=DIR [--weights=FILE]

With --weights, a network loads FILE and predicts DIR/inputs.npy. This needs
Keras with a backend, and nothing of this repository.
"""

import argparse
import json
import pathlib
import sys

import keras
import numpy as np
import safetensors.numpy
from keras import layers

BATCH = 2


def conv(x, filters, size=3, strides=1):
  """Adds a convolution of the example, with an automatic layer name."""
  return layers.Conv2D(
    filters,
    kernel_size=size,
    strides=strides,
    padding="same",
    kernel_initializer="he_normal",
  )(x)


def norm_relu(x):
  """Adds batch norm and ReLU."""
  return layers.Activation("relu")(layers.BatchNormalization()(x))


def example_v1(depth, width=16):
  """Makes the example's ResNet v1 of 6n+2 layers, in the example's order."""
  blocks = (depth - 2) // 6
  inputs = keras.Input((32, 32, 3))
  x = norm_relu(conv(inputs, width))
  for stage in range(3):
    filters = width * 2**stage
    for block in range(blocks):
      strides = 2 if stage > 0 and block == 0 else 1
      y = norm_relu(conv(x, filters, strides=strides))
      y = layers.BatchNormalization()(conv(y, filters))
      if strides == 2:
        x = conv(x, filters, 1, strides)
      x = layers.Activation("relu")(layers.add([x, y]))
  return finish(inputs, x)


def example_v2(depth, width=16):
  """Makes the example's ResNet v2 of 9n+2 layers, in the example's order."""
  blocks = (depth - 2) // 9
  inputs = keras.Input((32, 32, 3))
  x = norm_relu(conv(inputs, width))
  filters_in = width
  for stage in range(3):
    filters_out = filters_in * (4 if stage == 0 else 2)
    for block in range(blocks):
      strides = 2 if stage > 0 and block == 0 else 1
      y = x if stage == block == 0 else norm_relu(x)
      y = conv(y, filters_in, 1, strides)
      y = conv(norm_relu(y), filters_in)
      y = conv(norm_relu(y), filters_out, 1)
      if block == 0:
        x = conv(x, filters_out, 1, strides)
      x = layers.add([x, y])
    filters_in = filters_out
  return finish(inputs, norm_relu(x))


def finish(inputs, x):
  """Adds the pool and the head."""
  x = layers.Flatten()(layers.AveragePooling2D(pool_size=8)(x))
  return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


def build(name, side=224, is_first=False):
  """Returns the network and the side of its images; `side` for large ones."""
  kind, _, depth = name.rpartition("_")
  if kind == "application":
    model = getattr(keras.applications, f"ResNet{depth}")
    return model(weights=None, input_shape=(side, side, 3)), side
  if not is_first:
    # Another model comes first, so that automatic names are offset.
    other = keras.Input((32, 32, 3))
    finish(other, norm_relu(conv(other, 3)))
  build_example = example_v1 if kind == "example_v1" else example_v2
  return build_example(int(depth)), 32


def logits_of(model, x):
  """Computes the head without its softmax."""
  head = model.layers[-1]
  features = keras.Model(model.input, head.input)(x, training=False)
  numpy = keras.ops.convert_to_numpy
  kernel, bias = numpy(head.kernel.value), numpy(head.bias.value)
  return numpy(features) @ kernel + bias


def noise(count, side, rng):
  """Draws preprocessed images; keras.applications has units of 1/255."""
  spread = 1 if side == 32 else 60
  return rng.normal(0, spread, (count, side, side, 3)).astype(np.float32)


def randomize(model, side, rng):
  """Makes every parameter and statistic matter, and keeps logits near 10.

  Running statistics are measured on a batch, so that deep networks neither
  explode nor die, and are then changed at random.
  """
  norms = [x for x in model.layers if isinstance(x, layers.BatchNormalization)]
  for norm in norms:
    size = norm.gamma.shape
    norm.gamma.assign(rng.uniform(0.5, 1.5, size))
    norm.beta.assign(rng.normal(0, 0.2, size))
    norm.momentum = 0.0
  for layer in model.layers:
    if isinstance(layer, (layers.Conv2D, layers.Dense)):
      layer.bias.assign(rng.normal(0, 0.1, layer.bias.shape))
  model(noise(4, side, rng), training=True)
  for norm in norms:
    norm.momentum = 0.99
    mean, var = map(np.asarray, (norm.moving_mean, norm.moving_variance))
    moved = mean + rng.normal(0, 0.2, mean.shape) * np.sqrt(var)
    norm.moving_mean.assign(moved)
    norm.moving_variance.assign(var * rng.uniform(0.5, 1.5, var.shape))
  x = noise(BATCH, side, rng)
  scale = 10 / np.abs(logits_of(model, x)).max()
  model.layers[-1].set_weights(
    [scale * array for array in model.layers[-1].get_weights()]
  )


def main():
  """Writes weights* and reference.npz, which has images and logits."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--name", required=True)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--weights", type=pathlib.Path)
  arguments = parser.parse_args()
  if arguments.weights:
    inputs = np.load(arguments.folder / "inputs.npy")
    model, _ = build(arguments.name, inputs.shape[1], is_first=True)
    load(model, arguments.weights)
    parts = [logits_of(model, x) for x in np.split(inputs, len(inputs) // 32)]
    np.save(arguments.folder / "logits.npy", np.concatenate(parts))
    print_versions()
    return
  keras.utils.set_random_seed(0)
  rng = np.random.default_rng(0)
  model, side = build(arguments.name)
  randomize(model, side, rng)
  inputs = noise(BATCH, side, rng)
  images = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
  prepared = images / np.float32(255)
  if side != 32:
    pixels = images.astype(np.float32)
    # `preprocess_input` changes its input in place, so it gets a copy.
    prepared = np.array(keras.ops.image.resize(pixels, (side, side)))
    prepared = keras.applications.resnet.preprocess_input(prepared)
  np.savez(
    arguments.folder / "reference.npz",
    # Keras's network sees blue first; the inputs are RGB.
    inputs=inputs if side == 32 else inputs[..., ::-1],
    logits=logits_of(model, inputs),
    images=images,
    image_logits=logits_of(model, prepared),
  )
  if side == 32:
    # The files also hold the optimizer's variables, as after training.
    model.compile("adam", "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
  model.save_weights(arguments.folder / "weights.weights.h5")
  model.save(arguments.folder / "weights.keras")
  model.save(arguments.folder / "weights.h5")
  print_versions()


def load(model, path):
  """Loads the weights of a file into a model."""
  if path.suffix == ".h5":
    model.load_weights(path)
    return
  arrays = safetensors.numpy.load_file(path)
  for layer in model.layers:
    layer.set_weights([arrays[f"{layer.name}/{w.name}"] for w in layer.weights])


def print_versions():
  """Prints the versions of Python and the libraries as JSON."""
  versions = {
    "python": sys.version.split()[0],
    "keras": keras.__version__,
    "backend": keras.backend.backend(),
  }
  print(json.dumps(versions))


if __name__ == "__main__":
  main()
