"""Pixels as TensorFlow decodes them; see `resnet_flax.data.pictures`."""

import pathlib
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data import pictures_kinds as kinds

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "pictures.md"


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_has_its_pixels(name):
  kind = kinds.KINDS[name]
  found = kinds.decode(kind.encoded)
  assert found.shape == kind.pixels.shape
  assert kinds.difference(found, kind.pixels) <= kind.loss


def test_the_page_has_these_kinds_and_rules():
  """If not: the command that the page names."""

  def without_differences(text):
    return [line.rsplit("|", 2)[0] for line in text.splitlines()]

  made = kinds.page(lambda kind: "")
  assert without_differences(PAGE.read_text()) == without_differences(made)


def test_the_page_has_the_differences_from_tensorflow():
  pytest.importorskip("tensorflow", reason="needs pip install tensorflow-cpu")
  assert PAGE.read_text() == kinds.page(kinds.difference_from_tensorflow)


def test_tensorflow_with_the_accurate_dct_has_the_same_bits():
  reason = "needs pip install tensorflow-cpu"
  tf = pytest.importorskip("tensorflow", reason=reason)
  for name, (encoded, *_) in kinds.KINDS.items():
    if name.startswith("JPEG"):
      settings = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}
      theirs = tf.io.decode_jpeg(encoded, **settings)
      np.testing.assert_array_equal(kinds.decode(encoded), theirs, name)


@pytest.mark.parametrize("most", [255, 4095, 65_535])
def test_grey_of_16_bits_is_its_high_byte(most):
  """Pillow alone would make white of nearly all."""
  values = np.linspace(0, most, 35).astype(np.uint16).reshape(5, 7)
  found = kinds.decode(kinds.encode(Image.fromarray(values)))
  np.testing.assert_array_equal(found, np.stack([values >> 8] * 3, -1))


@pytest.mark.parametrize(
  "part",
  [
    kinds.chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20))),
    kinds.chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
    kinds.chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
    kinds.chunk(b"tEXt", b"Software\0x", checksum_off=1),
  ],
)
def test_what_is_beside_a_picture_does_not_matter(part):
  encoded = kinds.with_chunks(kinds.encode(kinds.COLOUR), part)
  np.testing.assert_array_equal(kinds.decode(encoded), kinds.RGB)


@pytest.mark.parametrize("cut", [10, 40, 60, -30])
@pytest.mark.parametrize("encoding", ["BMP", "GIF", "JPEG", "PNG", "WEBP"])
def test_what_is_cut_off_is_no_picture(encoding, cut):
  with pytest.raises((OSError, SyntaxError, ValueError)):
    kinds.decode(kinds.encode(kinds.COLOUR, encoding)[:cut])
