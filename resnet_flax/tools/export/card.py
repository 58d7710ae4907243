"""Writes the model card and the files that say how to use exported weights."""

import pathlib

import jax
import numpy as np

from resnet_flax.data import dataset as dataset_lib, normalize
from resnet_flax.parallel import averaging
from resnet_flax.run import experiment as experiment_lib, files, folder
from resnet_flax.run.load import LoadedModel
from resnet_flax.tools.report import runs

_NUM_CHECKED = 8

_CARD = """\
# {title}{trained}

| | |
| --- | --- |
| network | {config.model.name}, depth {config.model.depth}: {size:,} numbers |
| data | {data} |
| recipe | from {start}{recipe} |
| computed in | {config.model.dtype} |
| checkpoint | {checkpoint} |
| test accuracy | {accuracy} |
| licence | {licence} |

The arrays have the names and layouts of {title};
resnet_flax's docs/use.md says how to load them.

`preprocess.json` says how to turn uint8[N, H, W, 3] RGB images of `image_size`
into the network's input: divide by 255, subtract `mean` (a text names the file
that holds it), divide by `std`, resize to `size` (antialiased where it
shrinks), then order `channels` and axes (`layout`). StableHLO and ONNX do all
of this themselves, and give probabilities instead of logits. Line k of
`labels.txt`, counted from 0, names class k. `check.npz` has {checked} `images`
of noise and their `logits`, computed in {config.model.dtype}, to check the
loaded network.
"""


def write(
  out: pathlib.Path,
  loaded: LoadedModel,
  workdir: pathlib.Path,
  names: str,
  title: str,
  licence: str,
) -> None:
  """Writes README.md, preprocess.json, labels.txt and check.npz.

  If the mean is an image, mean.npy holds it, float32[H, W, C]. `loaded` is the
  network of the local folder `workdir`. Its exported arrays have the names of
  the library `names`, which calls the network `title`.
  """
  config, normalization = loaded.config, loaded.preprocess
  assert isinstance(normalization, normalize.Normalization)
  shape = loaded.image_shape
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (_NUM_CHECKED, *shape), np.uint8)
  apply = jax.jit(loaded.model.apply, static_argnames="train")
  inputs = normalization(jax.device_put(images))
  logits = apply(loaded.variables, inputs, train=False)
  np.savez(out / "check.npz", images=images, logits=logits)

  mean, side = np.asarray(normalization.mean), config.model.input_size
  is_image = mean.size > shape[-1]
  if is_image:
    np.save(out / "mean.npy", mean)
  sees_bgr = names == "keras" and config.model.name == "resnet_imagenet"
  preprocess = {
    "image_size": shape[:2],
    "value_range": [0, 1],
    "mean": "mean.npy" if is_image else mean.ravel().tolist(),
    "std": np.asarray(normalization.std).ravel().tolist(),
    "size": [side, side] if side else shape[:2],
    "interpolation": "bilinear",
    "antialias": True,
    "channels": "BGR" if sees_bgr else "RGB",
    "layout": "NCHW" if names in ("torchvision", "cifar") else "NHWC",
  }
  files.write_json(out / "preprocess.json", preprocess)
  labels = loaded.class_names or map(str, range(logits.shape[1]))
  # A name may have line breaks and bytes that are not text.
  lines = [
    "".join(c if c.splitlines() == [c] else repr(c)[1:-1] for c in label) + "\n"
    for label in labels
  ]
  (out / "labels.txt").write_text("".join(lines), "utf-8", "backslashreplace")

  stored = folder.read_environment(workdir)
  origin = stored.get("converted", {}).get("holds") or config.init_from
  experiment = experiment_lib.build(config, folder.read_facts(workdir))
  steps = config.num_epochs * experiment.learning_rate.steps_per_epoch
  of_all = f" of {steps:,}" if loaded.step else ""
  used = {k: v for k, v in config.augment.items() if v}
  if "alternating_flip" in used or used["name"] == "none":
    used.pop("flip", None)  # It has no effect then.
  augment = ", ".join(f"{key} {value}" for key, value in used.items())
  recipe = (
    f"; {config.num_epochs} epochs of batches of {config.batch_size};"
    f" {', '.join(experiment.optimizer.links)};"
    f" {', '.join(experiment.learning_rate.describe())}; augmentation:"
    f" {augment}; normalization {config.normalization}, label smoothing"
    f" {config.label_smoothing}"
  )
  card = _CARD.format(
    config=config,
    title=title,
    trained=f", trained on {config.dataset.name}" if loaded.step else "",
    recipe=recipe if loaded.step else ", not trained on",
    size=sum(leaf.size for leaf in jax.tree.leaves(loaded.variables)),
    data=stored.get("data") or "none",
    start=runs.shown(origin or "random weights"),
    accuracy=_accuracy(workdir, loaded),
    licence=runs.shown(licence or "not stated"),
    checked=_NUM_CHECKED,
    checkpoint=f"step {loaded.step:,}{of_all}, seed {loaded.seed},"
    f" {loaded.weights} weights",
  )
  (out / "README.md").write_text(card, "utf-8")


def _accuracy(workdir: pathlib.Path, loaded: LoadedModel) -> str:
  """Test accuracy of the network, and of all seeds in their best epochs."""
  key = f"{averaging.scored_as('test', loaded.weights)}_accuracy"
  seeds = runs.read([workdir])
  run = seeds[loaded.seed - loaded.config.seed]
  by_step = {r["step"]: r[key] for r in run.records if key in r}
  if loaded.step not in by_step:
    return "not scored"
  info = dataset_lib.info(loaded.config.dataset, folder.read_facts(workdir))
  (group,) = runs.group(seeds)
  # Averaging may start after a seed's best epoch, where its accuracy is NaN.
  values = [value for value in group.at("best", key) if value == value]
  mean, std, n = runs.Statistic.of(values)
  data = loaded.config.dataset
  text = f"{by_step[loaded.step]:.2%} on "
  text += "up to " * (data.bad_images == "skip")
  text += f"{info.num_test:,} images"
  if data.test_crops > 1:
    text += f" by the mean of {data.test_crops} views of each"
  if n:
    text += f"; n = {n} seed{'s' * (n > 1)}, each in its best epoch by"
    text += f" {run.chosen_by}:"
    text += f" {mean:.2%}" + ("" if std is None else f" ± {std:.2%}")
  return text
