"""The tables in docs/networks.md are what the networks are."""

import functools

import pytest

from experiments.tools import networks as table
from resnet_flax.models import registry

NETWORKS = [
  network for networks in table.TABLES.values() for network in networks
]
# Others take long to trace, and are on a line with two that do not.
LARGEST_TRACED = 32


def published_number(text):
  """'1.8 G' as (1.8e9, half a unit of its last digit)."""
  number, _, unit = text.partition(" ")
  digits = len(number.partition(".")[2])
  factor = {"": 1, "M": 1e6, "G": 1e9}[unit]
  return float(number.replace(",", "")) * factor, factor * 0.5 * 10**-digits


@functools.cache
def in_readme(network):
  """(parameters, multiply-adds to the printed digits) of a line of the page."""
  for line in table.PAGE.read_text().splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) == 7 and cells[:2] == [network.title, str(network.depth)]:
      return int(cells[2].replace(",", "")), cells[4]
  raise AssertionError(f"{network} is not on the page")


@pytest.mark.parametrize(
  "network",
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n.depth > 50))
    for n in NETWORKS
    if n.is_large or n.depth <= LARGEST_TRACED
  ],
  ids=lambda n: f"{n.title}-{n.depth}",
)
def test_line_is_what_the_command_writes(network):
  assert table.row(network) in table.PAGE.read_text().splitlines()


@pytest.mark.parametrize(
  "network",
  [n for n in NETWORKS if not n.is_large and n.depth > LARGEST_TRACED],
  ids=lambda n: f"{n.title}-{n.depth}",
)
def test_deep_ones_are_on_the_line_of_shallow_ones(network):
  """Each further block of a stage is as large as the one before."""
  family = registry.MODELS[network.name]
  group, besides = family.depths, family.besides
  first, second = (
    table.measure(table.Network(network.name, depth, network.overrides))
    for depth in (besides + 2 * group, besides + 3 * group)
  )
  steps = (network.depth - besides) // group - 2
  expected = [a + steps * (b - a) for a, b in zip(first, second, strict=True)]
  _, trainable, multiply_adds = expected
  assert in_readme(network) == (trainable, f"{multiply_adds / 1e6:.1f} M")


@pytest.mark.parametrize(
  "network",
  [n for n in NETWORKS if any(n.published)],
  ids=lambda n: f"{n.title}-{n.depth}",
)
def test_published_numbers(network):
  """Exact ones exactly, rounded ones as far as they go."""
  parameters, _ = in_readme(network)
  if network.published[0]:
    number, half = published_number(network.published[0])
    # The papers cut off as often as they round.
    assert abs(parameters - number) <= (2 * half if half > 1 else 0)
  if network.published[1]:
    number, half = published_number(network.published[1])
    assert abs(table.measure(network).multiply_adds - number) <= 2 * half


def test_every_model_is_in_a_table():
  assert {network.name for network in NETWORKS} == set(registry.MODELS)
  imagenet = registry.MODELS["resnet_imagenet"].depths
  assert {n.depth for n in NETWORKS if n.name == "resnet_imagenet"} == set(
    imagenet
  )
