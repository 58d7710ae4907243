"""The Keras CIFAR-10 example's network, trained by `fit` on TensorFlow."""

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
    measure.NUM_CLASSES, activation="softmax", kernel_initializer="he_normal"
  )(x)
  return keras.Model(inputs, outputs)


class Program:
  """Trains and predicts on one batch that stays in memory."""

  def __init__(self, task: measure.Task):
    self._blocks = task.blocks
    pixels, labels = task.batch()
    images = np.frombuffer(pixels, np.uint8).reshape(-1, *measure.IMAGE_SHAPE)
    self._images = tf.constant(images.astype(np.float32) / 255)
    self._labels = tf.constant(np.frombuffer(labels, np.uint8), tf.int32)

  def build(self):
    """Builds and compiles the network as the example does."""
    self._model = create_model(self._blocks)
    self._model.compile(
      loss="sparse_categorical_crossentropy",
      optimizer=keras.optimizers.Adam(1e-3),
      metrics=["accuracy"],
    )
    batch = tf.data.Dataset.from_tensors((self._images, self._labels))

    def train(steps: int) -> float:
      history = self._model.fit(batch.repeat(steps), verbose=0)
      return history.history["loss"][-1]

    return train

  def build_inference(self):
    """Traces the network as one graph."""
    predict_batch = tf.function(lambda x: self._model(x, training=False))

    def predict(steps: int) -> None:
      for _ in range(steps):
        result = predict_batch(self._images)
      result.numpy()

    return predict


def matmul(steps: int) -> None:
  """Multiplies two matrices `steps` times."""
  a = tf.ones((measure.MATMUL_SIZE, measure.MATMUL_SIZE), tf.float32)
  for _ in range(steps):
    product = tf.linalg.matmul(a, a)
  product.numpy()


def main() -> None:
  """Measures the task of the command line."""
  if keras.backend.backend() != "tensorflow":
    raise RuntimeError("KERAS_BACKEND must be tensorflow")
  measure.run(
    Program,
    matmul=matmul,
    libraries=("keras", "tensorflow-cpu", "numpy"),
    # 0 means one thread per CPU.
    threads=tf.config.threading.get_intra_op_parallelism_threads()
    or measure.num_cpus(),
  )


if __name__ == "__main__":
  main()
