"""Small archives of the official CIFAR layout, made for the tests."""

import dataclasses
import hashlib
import io
import tarfile

import numpy as np

from resnet_flax.data import cifar, dataset

IMAGES_PER_FILE = 4


def add(tar, name, content):
  """Adds a regular file with the given bytes."""
  info = tarfile.TarInfo(name)
  info.size = len(content)
  tar.addfile(info, io.BytesIO(content))


def class_names(count):
  return [f"class_{label}" for label in range(count)]


def contents(spec, num_classes, images_per_file=IMAGES_PER_FILE):
  """The bytes of every member, and the images and labels in them."""
  rng = np.random.default_rng(0)
  members, images, labels = {}, {}, {}
  for split, files in spec.files.items():
    images[split], labels[split] = [], []
    for name in files:
      raw = rng.integers(0, 256, (images_per_file, 3072), np.uint8)
      label = rng.integers(
        0, num_classes, (images_per_file, len(spec.labels)), np.uint8
      )
      if "coarse_label" in spec.labels:
        label[:, 0] %= 20
      rows = np.concatenate([label, raw], axis=1)
      members[f"folder/{name}"] = rows.tobytes()
      images[split].append(raw.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
      labels[split].append(label[:, -1])
    images[split] = np.concatenate(images[split])
    labels[split] = np.concatenate(labels[split])
  for label, name in spec.labels.items():
    count = 20 if label == "coarse_label" else num_classes
    text = "\n".join(class_names(count)) + "\n"
    members[f"folder/{name}"] = text.encode()
  return members, images, labels


def write(path, members):
  """Writes a gzipped tar of the given members."""
  with tarfile.open(path, "w:gz") as tar:
    for name, content in members.items():
      add(tar, name, content)


def install(monkeypatch, name, path, url=None):
  """Makes the program take the archive at `path` for the official one.

  Returns:
    The images and the labels in it, for each split.
  """
  spec = cifar.ARCHIVES[name]
  num_classes = dataset.DATASETS[name].num_classes
  members, images, labels = contents(spec, num_classes)
  write(path, members)
  replaced = dataclasses.replace(
    spec,
    url=url or spec.url,
    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    num_bytes=path.stat().st_size,
  )
  monkeypatch.setitem(cifar.ARCHIVES, name, replaced)
  info = dataset.DATASETS[name]
  monkeypatch.setitem(
    dataset.DATASETS,
    name,
    dataclasses.replace(
      info, num_train=len(labels["train"]), num_test=len(labels["test"])
    ),
  )
  return images, labels
