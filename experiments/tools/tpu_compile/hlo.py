"""Reads the text of a program that XLA has compiled.

The text is HLO. It consists of computations of instructions. An instruction has
a name, the shape of its result, an operation, operands and attributes. A shape
has a layout, such as `f32[128,32]{0,1:T(8,128)}`: the order of the axes, the
minor one first, and the tiles in which TPUs keep the two minor axes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# Infeed and outfeed go to the host; send and recv may go to other programs.
_TRANSFERS = ("infeed", "outfeed", "send", "recv")
# Custom calls that go to the host: Python callbacks and offloaded memory.
_HOST_TARGET = re.compile(r"callback|host", re.IGNORECASE)
# XLA's number of the host's memory in a layout.
_HOST_MEMORY = "S(5)"

_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
# The groups: name, type of the result, operation, and the rest of the line.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
  r"|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_CUSTOM_CALL = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type, as in `bf16[128,32]{0,1:T(8,128)(2,1)}`."""

  dtype: str
  shape: tuple[int, ...]
  layout: str  # In braces; empty if the text has none.

  @property
  def num_bytes(self) -> int:
    """Bytes of its elements; 0 for types without data, such as tokens."""
    return math.prod(self.shape) * _bits(self.dtype) // 8

  @property
  def padded_bytes(self) -> int:
    """Bytes in memory, with the minor axes padded to whole tiles."""
    tiles = re.search(r":T\(([\d,]+)\)", self.layout)
    if not tiles or not self.shape:
      return self.num_bytes
    order = re.findall(r"\d+", self.layout.split(":")[0])
    sizes = [self.shape[int(axis)] for axis in order]
    for place, tile in enumerate(reversed(tiles[1].split(","))):
      if place < len(sizes):
        sizes[place] = -(-sizes[place] // int(tile)) * int(tile)
    return math.prod(sizes) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One operation."""

  name: str
  result: tuple[Array, ...]  # Several for a tuple.
  opcode: str  # For example 'all-reduce-start'.
  operands: tuple["Instruction", ...]
  value: str  # A constant's value; '' otherwise.
  attributes: str  # The rest of its line.

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    return _NAME.findall(" ".join(_CALLED.findall(self.attributes)))

  def find(self, pattern: re.Pattern[str]) -> str:
    """The pattern's group in the attributes; '' if they do not match."""
    match = pattern.search(self.attributes)
    return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program."""

  header: str  # The first line of the text.
  computations: Mapping[str, list[Instruction]]
  entry: str  # The name of the computation that a call runs.

  def executed(self) -> Iterator[tuple[Instruction, int]]:
    """Yields each instruction with its number of runs in one call.

    A loop of unknown length counts as one round. All branches count as taken. A
    reduction calls its function for each element; this counts as one call.
    """
    times: collections.Counter[str] = collections.Counter({self.entry: 1})
    # A computation is printed after those that it calls.
    for name in reversed(tuple(self.computations)):
      for instruction in self.computations[name]:
        rounds = self._rounds(instruction)
        for called in instruction.called:
          times[called] += times[name] * rounds
    for name, instructions in self.computations.items():
      for instruction in instructions:
        if times[name]:
          yield instruction, times[name]

  def _rounds(self, instruction: Instruction) -> int:
    """Returns a loop's number of rounds; 1 if unknown or not a loop.

    XLA prints a known number, except for TPUs. A loop made by JAX counts from
    zero, and its condition compares with a constant.
    """
    if known := instruction.find(_TRIP_COUNT):
      return int(known)
    condition = instruction.find(_CONDITION)
    if instruction.opcode != "while" or not condition:
      return 1
    root = self.computations[condition][-1]
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
      return 1
    limit = root.operands[-1].value
    return int(limit) if limit.isdecimal() else 1

  def count(self, opcode: str) -> int:
    """Counts the runs of an operation in one call."""
    return sum(n for each, n in self.executed() if each.opcode == opcode)

  def collectives(self) -> list[dict[str, Any]]:
    """All communication, grouped by equal `kind`, `arrays` and `bytes`.

    `kind` is one of `COLLECTIVES`, `arrays` the number of arrays that it
    combines, and `bytes` their size on one device. A group also has the `count`
    of its runs in one call, where a start and its wait count once, and the
    `op_name` of its first instruction: its origin in the traced program.
    """
    groups: dict[tuple[str, int, int], dict[str, Any]] = {}
    for instruction, executions in self.executed():
      kind = instruction.opcode.removesuffix("-start")
      if kind not in COLLECTIVES or (
        # The started computation contains the operation itself.
        kind != instruction.opcode
        and any(
          each.opcode == kind
          for name in instruction.called
          for each in self.computations.get(name, ())
        )
      ):
        continue
      arrays = [array for each in instruction.operands for array in each.result]
      key = kind, len(arrays), sum(array.num_bytes for array in arrays)
      group = groups.setdefault(
        key,
        {
          **dict(zip(("kind", "arrays", "bytes"), key, strict=True)),
          "count": 0,
          "op_name": instruction.find(_OP_NAME),
        },
      )
      group["count"] += executions
    return list(groups.values())

  def custom_calls(self) -> dict[str, int]:
    """Counts calls of code that is not HLO, by target."""
    targets: collections.Counter[str] = collections.Counter()
    for instruction, executions in self.executed():
      if target := instruction.find(_CUSTOM_CALL):
        targets[target] += executions
    return dict(sorted(targets.items()))

  def host_transfers(self) -> list[str]:
    """Lists names of instructions that exchange data with the host."""
    return [
      each.name
      for each, _ in self.executed()
      if each.opcode in _TRANSFERS
      or _HOST_TARGET.search(each.find(_CUSTOM_CALL))
      or any(_HOST_MEMORY in array.layout for array in each.result)
    ]

  def convolution_padding(self) -> float:
    """Bytes of all convolutions' results in memory, per byte of data.

    Results inside a fusion count too, since registers have the same tiles. The
    value is 1 without convolutions.
    """
    arrays = [
      (array, executions)
      for instruction, executions in self.executed()
      if instruction.opcode == "convolution"
      for array in instruction.result
    ]
    data = sum(array.num_bytes * n for array, n in arrays)
    return sum(a.padded_bytes * n for a, n in arrays) / data if data else 1.0

  def num_aliased(self) -> int:
    """Counts the results that overwrite an argument."""
    return len(re.findall(r"\}: \(\d+, \{", self.header))


def parse(text: str) -> Module:
  """Reads the text of `jax.stages.Compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  entry = ""
  header, *lines = text.strip().splitlines()
  for line in lines:
    line = re.sub(r"/\*.*?\*/", "", line)
    if match := _COMPUTATION.match(line):
      instructions = computations[match[2]] = []
      known: dict[str, Instruction] = {}
      entry = match[2] if match[1] else entry
    elif match := _INSTRUCTION.match(line):
      name, result, opcode, rest = match.groups()
      inside, attributes = _split(rest)
      operands = [known[x] for x in _NAME.findall(inside) if x in known]
      known[name] = Instruction(
        *(name, tuple(_arrays(result)), opcode, tuple(operands)),
        *(inside if opcode == "constant" else "", attributes),
      )
      instructions.append(known[name])
  if not entry:
    raise ValueError("the text has no ENTRY computation")
  return Module(header, computations, entry)


def _split(text: str) -> tuple[str, str]:
  """Splits at the end of a parenthesis that was opened before the text."""
  depth = 1
  for position, character in enumerate(text):
    depth += {"(": 1, ")": -1}.get(character, 0)
    if not depth:
      return text[:position], text[position + 1 :]
  return text, ""


def _arrays(text: str) -> Iterator[Array]:
  for dtype, shape, layout in _ARRAY.findall(text):
    sizes = re.findall(r"\d+", shape)
    yield Array(dtype, tuple(map(int, sizes)), layout)


def _bits(dtype: str) -> int:
  if dtype == "pred":
    return 8
  # Examples are f32, bf16, u8, f8e4m3fn and c64; tokens have no number.
  match = re.match(r"[a-z]+(\d+)", dtype)
  return int(match[1]) if match else 0
