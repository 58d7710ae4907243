"""Draws pictures after each augmentation into docs/augmentations.png.

  python -m experiments.tools.augmentations

The command needs a prepared CIFAR-10 and takes seconds.
"""

import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from configs import base
from resnet_flax.data import augment, augment_bytes, dataset, trivial_augment

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "augmentations.png"
COLUMNS = 12
ROWS: dict[str, dict[str, Any]] = {
  "as they are": {"name": "none"},
  "shift_flip": {},
  "crop_flip": {"name": "crop_flip"},
  "alternating_flip": {"name": "none", "alternating_flip": True},
  "trivial_augment": {"name": "none", "trivial_augment": True},
  "cutout 16": {"name": "none", "cutout": 16},
  "mixup 1": {"name": "none", "mixup": 1.0},
  "cutmix 1": {"name": "none", "cutmix": 1.0},
  "all": {"trivial_augment": True, "cutout": 16, "mixup": 1.0, "cutmix": 1.0},
}


def augmented(images: jax.Array, labels: jax.Array, **changes) -> jax.Array:
  """Augments a batch as a training step does; returns images in [0, 1]."""
  config = base.get_config().augment
  config.update(changes)
  key = jax.random.key(2)
  first_epoch = jnp.zeros((), jnp.int32)
  images = augment_bytes.create(config)(key, images, first_epoch)
  normalized = images / 255 - 0.5
  return augment.create_augment(config, 10)(key, normalized, labels)[0] + 0.5


def main() -> None:
  """Draws the sheet."""
  config = base.get_config().dataset
  taken = dataset.load(config).train.take(np.arange(COLUMNS))
  images, labels = map(jnp.asarray, taken)
  rows = {
    name: augmented(images, labels, **changes) for name, changes in ROWS.items()
  }
  levels = jnp.linspace(-1, 1, COLUMNS)
  for name, operation in trivial_augment.OPERATIONS.items():
    picture = jnp.stack([images[9].astype(jnp.int32)] * COLUMNS)
    rows[f"· {name}"] = jax.vmap(operation)(picture, levels) / 255
  figure = Figure(figsize=(COLUMNS * 0.62 + 1.5, len(rows) * 0.62))
  axes = figure.subplots(len(rows), COLUMNS)
  for line, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(line, pictures, strict=True):
      axis.imshow(np.clip(picture, 0, 1))
      axis.set_axis_off()
    line[0].text(-6, 16, name, ha="right", va="center", fontsize=9)
  figure.subplots_adjust(0.17, 0.005, 0.995, 0.995, 0.05, 0.05)
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=80)
  with PIL.Image.open(buffer) as sheet:
    sheet.convert("RGB").quantize(256).save(PAGE, optimize=True)


if __name__ == "__main__":
  main()
