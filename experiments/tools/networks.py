"""Writes the tables of all networks' sizes into docs/networks.md.

  python -m experiments.networks

The command traces shapes and compiles nothing; deep networks take a minute.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from configs import base
from experiments.tools import markdown
from resnet_flax.models import registry
from resnet_flax.tools import summary

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "networks.md"
COMMAND = "python -m experiments.networks"

_KERAS = "Keras example"
_HE = "He et al. 2015"
_TORCHVISION = "torchvision"
_WIDE = "Zagoruyko and Komodakis 2016"
_XIE = "Xie et al. 2017"


@dataclasses.dataclass(frozen=True)
class Network:
  """A row of the table."""

  name: str
  depth: int
  overrides: tuple[tuple[str, Any], ...] = ()  # Other keys of `model`.
  published: tuple[str, str] = ("", "")  # Parameters and multiply-adds.
  source: str = ""  # The publication.

  @property
  def is_large(self) -> bool:
    """Whether it is a network for ImageNet: 224x224 images, 1,000 classes."""
    return registry.MODELS[self.name].large_images

  @property
  def title(self) -> str:
    """The network's name and overrides."""
    settings = [f"{key}={value}" for key, value in self.overrides]
    return ", ".join([f"`{self.name}`", *settings])


def _series(
  name: str,
  published: Mapping[int, str | tuple[str, str]] | Sequence[int],
  source: str = "",
  **overrides: Any,
) -> list[Network]:
  """Networks of the depths in `published`, which may map to published sizes."""
  if not isinstance(published, Mapping):
    published = dict.fromkeys(published, "")
  items = tuple(overrides.items())
  return [
    Network(name, depth, items, (n, "") if isinstance(n, str) else n, source)
    for depth, n in published.items()
  ]


_DEPTHS = (20, 32, 44, 56, 110)

SMALL = (
  *_series(
    "resnet_v1",
    {
      20: "273,066",
      32: "467,946",
      44: "662,826",
      56: "857,706",
      110: "1,734,666",
    },
    _KERAS,
  ),
  *_series(
    "resnet_v1",
    {
      20: "0.27 M",
      32: "0.46 M",
      44: "0.66 M",
      56: "0.85 M",
      110: "1.7 M",
      1202: "19.4 M",
    },
    _HE,
    shortcut="A",
    conv_bias=False,
  ),
  *_series("resnet_v1", _DEPTHS, shortcut="B"),
  *_series("resnet_v1", _DEPTHS, shortcut="C"),
  *_series("plain", _DEPTHS),
  *_series("preact", _DEPTHS),
  *_series("highway", _DEPTHS),
  *_series(
    "resnet_v2",
    {
      20: "570,602",
      29: "843,786",
      56: "1,663,338",
      110: "3,302,442",
      164: "4,941,546",
    },
    _KERAS,
  ),
  *_series("resnet_v2", [1001]),
  *_series("wide_resnet", {28: "36.5 M"}, _WIDE, conv_bias=False),
  *_series(
    "wide_resnet",
    {16: "11.0 M", 22: "17.2 M"},
    _WIDE,
    widen_factor=8,
    conv_bias=False,
  ),
  *_series(
    "wide_resnet", {40: "2.2 M"}, _WIDE, widen_factor=2, conv_bias=False
  ),
  *_series(
    "wide_resnet", {40: "8.9 M"}, _WIDE, widen_factor=4, conv_bias=False
  ),
  *_series("wide_resnet", [16], widen_factor=4, conv_bias=False),
  *_series("resnext", {29: "34.4 M"}, _XIE, conv_bias=False),
)

LARGE = (
  *_series(
    "resnet_imagenet",
    {18: ("11,689,512", "1.8 G"), 34: ("21,797,672", "3.6 G")},
    f"{_TORCHVISION}, {_HE}",
    conv_bias=False,
  ),
  *_series(
    "resnet_imagenet",
    {50: "25,557,032", 101: "44,549,160", 152: ("60,192,808", "11.5 G")},
    _TORCHVISION,
    conv_bias=False,
  ),
  *_series(
    "resnet_imagenet",
    {
      50: ("25,583,592", "3.8 G"),
      101: ("44,601,832", "7.6 G"),
      152: ("60,268,520", "11.3 G"),
    },
    f"keras.applications, {_HE}",
    stride_in_3x3=False,
  ),
  *_series(
    "resnet_imagenet",
    {50: ("25,028,904", "4.2 G")},
    f"{_TORCHVISION}, {_XIE}",
    groups=32,
    group_width=4,
    conv_bias=False,
  ),
  *_series(
    "resnet_imagenet",
    {50: "68,883,240", 101: "126,886,696"},
    _TORCHVISION,
    group_width=128,
    conv_bias=False,
  ),
  *_series(
    "resnet_imagenet",
    {50: "28,088,024"},
    "timm's seresnet50",
    squeeze_excitation=16,
    conv_bias=False,
  ),
  *_series(
    "plain_imagenet",
    {18: ("", "1.8 G"), 34: ("", "3.6 G")},
    _HE,
    conv_bias=False,
  ),
  *_series(
    "vgg",
    {19: ("143,667,240", "19.6 G")},
    f"{_TORCHVISION}, {_HE}",
    norm="none",
  ),
  *_series("vgg", {19: "143,678,248"}, _TORCHVISION),
  *_series("alexnet", {8: "61,100,840"}, _TORCHVISION),
)


@functools.cache
def measure(network: Network) -> summary.Size:
  """Counts a network's parameters and multiply-adds."""
  config = base.get_config().model
  config.update({"name": network.name, "depth": network.depth})
  config.update(dict(network.overrides))
  classes, size = (1000, 224) if network.is_large else (10, 32)
  model = registry.create_model(config, classes)
  return summary.measure_size(model, (size, size, 3))


def row(network: Network) -> str:
  """Formats a network's row of the table."""
  measured = measure(network)
  millions = f"{measured.multiply_adds / 1e6:.1f} M"
  billions = f"{measured.multiply_adds / 1e9:.2f} G"
  cells = [
    network.title,
    str(network.depth),
    f"{measured.trainable:,}",
    network.published[0],
    billions if network.is_large else millions,
    network.published[1],
    network.source,
  ]
  return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


HEADER = (
  "| network | depth | parameters | published | multiply-adds | published |"
  " source |\n| --- | --- | --- | --- | --- | --- | --- |"
)
TABLES = {"large networks": LARGE, "small networks": SMALL}


def main() -> None:
  """Replaces the tables between their markers."""
  text = PAGE.read_text()
  for name, networks in TABLES.items():
    lines = [HEADER]
    for network in networks:
      lines.append(row(network))
      print(lines[-1], flush=True)
    text = markdown.replace(text, name, COMMAND, "\n".join(lines))
  PAGE.write_text(text)


if __name__ == "__main__":
  main()
