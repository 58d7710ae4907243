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
_ALIASED = re.compile(r"\{[0-9, ]*\}: \(\d+, \{[0-9, ]*\}(?:, [a-z-]+)?\)")
_NAME = re.compile(r"%?([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
  r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type, as in `bf16[128,32]{0,1:T(8,128)(2,1)}`.

  Attributes:
    dtype: XLA's name of the type.
    shape: sizes of the axes.
    layout: layout in braces; empty if the text has none.
  """

  dtype: str
  shape: tuple[int, ...]
  layout: str

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
    order = [
      int(axis) for axis in re.findall(r"\d+", self.layout.split(":")[0])
    ]
    sizes = [self.shape[axis] for axis in order]
    for place, tile in enumerate(reversed(tiles[1].split(","))):
      if place < len(sizes):
        sizes[place] = -(-sizes[place] // int(tile)) * int(tile)
    return math.prod(sizes) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One operation.

  Attributes:
    name: name of its result.
    result: the result's arrays; several for a tuple.
    opcode: for example 'all-reduce-start'.
    operands: names of its operands.
    attributes: the rest of its line.
    value: the value of an integer constant.
  """

  name: str
  result: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  value: int | None = None

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls."""
    return tuple(
      name
      for names in _CALLED.findall(self.attributes)
      for name in _NAME.findall(names)
    )

  @property
  def op_name(self) -> str:
    """Its origin in the traced program."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """Communication between devices.

  Attributes:
    kind: one of `COLLECTIVES`.
    arrays: number of arrays that it combines.
    num_bytes: bytes of its operands on one device.
    executions: number of runs in one call of the program.
    op_name: origin of its first array in the traced program.
  """

  kind: str
  arrays: int
  num_bytes: int
  executions: int
  op_name: str


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    header: the first line of the text.
    computations: the instructions of each computation, by name.
    entry: the name of the computation that a call runs.
  """

  header: str
  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str

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
    if match := _TRIP_COUNT.search(instruction.attributes):
      return int(match[1])
    condition = _CONDITION.search(instruction.attributes)
    if instruction.opcode != "while" or not condition:
      return 1
    instructions = self.computations[condition[1]]
    values = {each.name: each.value for each in instructions}
    root = instructions[-1]
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
      return 1
    return values.get(root.operands[-1]) or 1

  def count(self, opcode: str) -> int:
    """Counts the runs of an operation in one call."""
    return sum(n for each, n in self.executed() if each.opcode == opcode)

  def collectives(self) -> list[Collective]:
    """Lists all communication; a start and its wait count once."""
    arrays = {
      name: {each.name: each.result for each in instructions}
      for name, instructions in self.computations.items()
    }
    of_name = {
      id(instruction): name
      for name, instructions in self.computations.items()
      for instruction in instructions
    }
    found = []
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
      defined = arrays[of_name[id(instruction)]]
      operands = [
        array for name in instruction.operands for array in defined[name]
      ]
      found.append(
        Collective(
          kind,
          len(operands),
          sum(array.num_bytes for array in operands),
          executions,
          instruction.op_name,
        )
      )
    return found

  def custom_calls(self) -> dict[str, int]:
    """Counts calls of code that is not HLO, by target."""
    targets: collections.Counter[str] = collections.Counter()
    for instruction, executions in self.executed():
      match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
      if match:
        targets[match[1]] += executions
    return dict(sorted(targets.items()))

  def host_transfers(self) -> list[str]:
    """Lists names of instructions that exchange data with the host."""
    names = []
    for instruction, _ in self.executed():
      target = re.search(
        r'custom_call_target="([^"]*)"', instruction.attributes
      )
      if (
        instruction.opcode in _TRANSFERS
        or (target and _HOST_TARGET.search(target[1]))
        or any(_HOST_MEMORY in array.layout for array in instruction.result)
      ):
        names.append(instruction.name)
    return names

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
    _, _, text = self.header.partition("input_output_alias={")
    aliases = 0
    # The list ends at the first text that is no alias.
    while match := _ALIASED.match(text := text.lstrip(", ")):
      aliases += 1
      text = text[match.end() :]
    return aliases


def parse(text: str) -> Module:
  """Reads a program.

  Args:
    text: from `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, tuple[Instruction, ...]] = {}
  entry, name, instructions = "", "", list[Instruction]()
  header, *lines = text.strip().splitlines()
  for line in lines:
    line = re.sub(r"/\*.*?\*/", "", line)
    if match := _INSTRUCTION.match(line):
      instructions.append(_instruction(match[2], line[match.end() :]))
    elif match := _COMPUTATION.match(line):
      name, instructions = match[2], []
      entry = name if match[1] else entry
    elif line.strip() == "}" and name:
      computations[name] = tuple(instructions)
      name = ""
  if not entry:
    raise ValueError("the text has no ENTRY computation")
  return Module(header, computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  result, text = _split_result(text)
  opcode, _, text = text.partition("(")
  end = _closing(text)
  operands = []
  # Operands may have their types before their names.
  for operand in _split(text[:end]):
    operands.append(operand.split()[-1].lstrip("%"))
  value = text[:end] if opcode.strip() == "constant" else ""
  return Instruction(
    name,
    tuple(_arrays(result)),
    opcode.strip(),
    # A constant's value and a parameter's number are not names.
    () if opcode.strip() in ("constant", "parameter") else tuple(operands),
    text[end + 1 :],
    int(value) if value.isdecimal() else None,
  )


def _split_result(text: str) -> tuple[str, str]:
  """Splits the type at the beginning, maybe a tuple, from the rest."""
  if not text.startswith("("):
    result, _, rest = text.partition(" ")
    return result, rest
  end = _closing(text[1:]) + 2
  return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
  """Finds the end of a parenthesis that was opened before the text."""
  depth = 1
  for position, character in enumerate(text):
    depth += {"(": 1, ")": -1}.get(character, 0)
    if not depth:
      return position
  return len(text)


def _split(text: str) -> Iterator[str]:
  """Splits the text at commas outside brackets."""
  depth, start = 0, 0
  for position, character in enumerate(text + ","):
    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(
      character, 0
    )
    if character == "," and not depth:
      if part := text[start:position].strip():
        yield part
      start = position + 1


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
