"""The Keras CIFAR-10 example's network, trained by `fit` on TensorFlow."""

import math

import keras
import numpy as np
import tensorflow as tf

from experiments.throughput.workers import measure


def _conv(filters: int, kernel_size: int, strides: int):
  return keras.layers.Conv2D(
    filters,
    kernel_size,
    strides,
    padding="same",
    kernel_initializer="he_normal",
    kernel_regularizer=keras.regularizers.L2(1e-4),
  )


def create_model(blocks: int):
  """Builds ResNet v1 with `blocks` blocks in each of three stages."""
  layers = keras.layers
  inputs = layers.Input(measure.IMAGE_SHAPE)
  x = layers.BatchNormalization()(_conv(16, 3, 1)(inputs))
  x = layers.Activation("relu")(x)
  for stage in range(3):
    filters = 16 * 2**stage
    for block in range(blocks):
      changes = stage > 0 and block == 0
      strides = 2 if changes else 1
      y = layers.BatchNormalization()(_conv(filters, 3, strides)(x))
      y = layers.Activation("relu")(y)
      y = layers.BatchNormalization()(_conv(filters, 3, 1)(y))
      if changes:
        x = _conv(filters, 1, strides)(x)
      x = layers.Activation("relu")(layers.add([x, y]))
  x = layers.Flatten()(layers.AveragePooling2D(8)(x))
  outputs = layers.Dense(
    measure.NUM_CLASSES,
    activation="softmax",
    kernel_initializer="he_normal",
    dtype="float32",  # The softmax stays float32 in mixed precision.
  )(x)
  return keras.Model(inputs, outputs)


class Program:
  """Trains and predicts on one batch that stays in memory."""

  libraries = ("keras", "tensorflow-cpu", "numpy")

  def __init__(self, task: measure.Task):
    if keras.backend.backend() != "tensorflow":
      raise RuntimeError("KERAS_BACKEND must be tensorflow")
    # This must come before TensorFlow makes its threads.
    tf.config.threading.set_intra_op_parallelism_threads(task.threads)
    if task.dtype == "bfloat16":
      keras.config.set_dtype_policy("mixed_bfloat16")
    self._task = task
    images, labels = task.batch()
    self._images = tf.constant(images.astype(np.float32) / 255)
    self._labels = tf.constant(labels)

  def build(self):
    """Builds and compiles the network as the example does."""
    compiled = self._task.mode == "compiled"
    self._model = create_model(self._task.blocks)
    self._model.compile(
      loss="sparse_categorical_crossentropy",
      optimizer=keras.optimizers.Adam(1e-3),
      metrics=["accuracy"],
      jit_compile=True if compiled else "auto",
    )
    batch = tf.data.Dataset.from_tensors((self._images, self._labels))
    logits = tf.function(
      lambda x: self._model(x, training=False), jit_compile=compiled
    )

    def train(steps: int) -> float:
      history = self._model.fit(batch.repeat(steps), verbose=0)
      return history.history["loss"][-1]

    def infer(steps: int) -> None:
      for _ in range(steps):
        result = logits(self._images)
      result.numpy()

    return {"train": train, "infer": infer}

  def facts(self):
    """Facts from TensorFlow: parameters, batch, threads, jit_compile."""
    pixels = np.rint(self._images.numpy() * 255)
    return {
      "parameters": sum(
        math.prod(each.shape) for each in self._model.trainable_weights
      ),
      "batch": measure.digest(pixels, self._labels.numpy()),
      "threads": tf.config.threading.get_intra_op_parallelism_threads(),
      "jit_compile": self._model.jit_compile,
    }


if __name__ == "__main__":
  measure.serve(Program)
