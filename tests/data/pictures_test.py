"""Pixels as TensorFlow decodes them; see `resnet_flax.data.pictures`."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import pictures


def encode(image, encoding="PNG", **settings):
  file = io.BytesIO()
  image.save(file, encoding, **settings)
  return file.getvalue()


def decode(encoded):
  image = pictures.decode(encoded)
  assert image.mode == "RGB"
  return np.asarray(image)


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def test_colours_are_taken_as_they_are():
  np.testing.assert_array_equal(decode(encode(Image.fromarray(RGB))), RGB)


@pytest.mark.parametrize("most", [255, 4095, 65_535])
def test_grey_of_16_bits_is_its_high_byte(most):
  """Pillow alone would make white of nearly all."""
  values = np.linspace(0, most, 35).astype(np.uint16).reshape(5, 7)
  found = decode(encode(Image.fromarray(values)))
  np.testing.assert_array_equal(found, np.stack([values >> 8] * 3, -1))


def test_grey_palette_and_transparency():
  grey = RGB[..., 0]
  expected = np.stack([grey] * 3, -1)
  np.testing.assert_array_equal(decode(encode(Image.fromarray(grey))), expected)
  palette = Image.fromarray(RGB).quantize(16)
  np.testing.assert_array_equal(
    decode(encode(palette)), np.asarray(palette.convert("RGB"))
  )
  # Colours under transparent pixels are kept: alpha is dropped, not blended.
  alpha = np.dstack([RGB, np.zeros((5, 7), np.uint8)])
  np.testing.assert_array_equal(decode(encode(Image.fromarray(alpha))), RGB)


def test_orientation_is_not_applied():
  image, exif = Image.fromarray(RGB), Image.Exif()
  exif[0x0112] = 6
  found = decode(encode(image, "JPEG", exif=exif, quality=100))
  assert found.shape == RGB.shape


def with_chunk(kind, data, checksum_off=0):
  png = encode(Image.fromarray(RGB))
  checksum = zlib.crc32(kind + data) ^ checksum_off
  length = struct.pack(">I", len(data))
  return (
    png[:33] + length + kind + data + struct.pack(">I", checksum) + png[33:]
  )


@pytest.mark.parametrize(
  "encoded",
  [
    with_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20))),
    with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
    with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
    with_chunk(b"tEXt", b"Software\0x", checksum_off=1),
  ],
)
def test_what_is_beside_a_picture_does_not_matter(encoded):
  np.testing.assert_array_equal(decode(encoded), RGB)


def test_the_first_frame_of_an_animation():
  other = Image.fromarray(255 - RGB)
  animated = encode(Image.fromarray(RGB), save_all=True, append_images=[other])
  np.testing.assert_array_equal(decode(animated), RGB)


@pytest.mark.parametrize("cut", [10, 40, 60])
def test_what_is_cut_off_is_no_picture(cut):
  with pytest.raises((OSError, SyntaxError, ValueError)):
    decode(encode(Image.fromarray(RGB))[:cut])
