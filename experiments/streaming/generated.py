"""Prepares smooth random images with TFDS, in place of ImageNet's images."""

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

# ImageNet's most frequent size; its JPEGs have about 110 kB.
WIDTH, HEIGHT = 500, 375
_QUALITY = 90


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
  """Makes a JPEG of smooth colours with detail at every scale."""
  image = np.zeros((height, width, 3))
  for cells, strength in ((4, 90), (16, 45), (64, 25), (256, 12)):
    noise = rng.normal(size=(max(cells * height // width, 1), cells, 3))
    coarse = np.clip(noise * 42 + 128, 0, 255).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize(
      (width, height), Image.Resampling.BICUBIC
    )
    image += (np.asarray(smooth) - 128.0) * strength / 42
  pixels = np.clip(image + 128, 0, 255).astype(np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
  return buffer.getvalue()


def prepare(
  root: pathlib.Path,
  counts: Mapping[str, int],
  *,
  name: str = "imagenet2012",
  num_classes: int = 10,
  width: int = WIDTH,
  height: int = HEIGHT,
) -> pathlib.Path:
  """Writes a data set in TFDS's own layout, without TensorFlow.

  `root` is the TFDS data directory, `counts` has the number of images of each
  split. Labels are drawn at random. Gives the folder of the set's version.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  tfds.disable_progress_bar()

  with registered.skip_registration():

    class Builder(tfds.core.GeneratorBasedBuilder):
      """Smooth random images."""

      VERSION = tfds.core.Version("5.1.0")

      def _info(self) -> Any:
        labels = [f"n{label:08d}" for label in range(num_classes)]
        return self.dataset_info_from_configs(
          description="Smooth random images with labels drawn at random.",
          features=tfds.features.FeaturesDict(
            {
              "image": tfds.features.Image(encoding_format="jpeg"),
              "label": tfds.features.ClassLabel(names=labels),
              "file_name": tfds.features.Text(),
            }
          ),
        )

      def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {
          split: self._examples(seed, split, count)
          for seed, (split, count) in enumerate(counts.items())
        }

      def _generate_examples(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("examples come from _split_generators")

      def _examples(self, seed: int, split: str, count: int) -> Any:
        rng = np.random.default_rng(seed)
        for index in range(count):
          yield (
            index,
            {
              "image": io.BytesIO(jpeg(rng, width, height)),
              "label": int(rng.integers(num_classes)),
              "file_name": f"{split}_{index:06d}.JPEG",
            },
          )

  Builder.name = name
  builder = Builder(data_dir=root)
  builder.download_and_prepare(file_format="array_record")
  return pathlib.Path(builder.data_dir)
