"""What can happen to the bytes of a file, for property tests."""

from hypothesis import strategies as st


def edits(limit):
  """Up to three (position, bytes) that are written over what is there."""
  return st.lists(
    st.tuples(st.integers(0, limit), st.binary(min_size=1, max_size=8)),
    max_size=3,
  )


def cuts(limit):
  """The length to which a file is cut; None leaves it as it is."""
  return st.none() | st.integers(0, limit)


def apply(path, edits, cut):
  """Edits and cuts a file that is not empty."""
  raw = bytearray(path.read_bytes())
  for position, value in edits:
    position %= len(raw)
    raw[position : position + len(value)] = value
  path.write_bytes(raw[:cut])
