"""A picture of every kind, its pixels, and the table in docs/pictures.md.

`pip install tensorflow-cpu` and
`python -m tests.data.pictures_kinds > docs/pictures.md` make that page.
"""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from resnet_flax.data import pictures

PAGE = """\
# Pictures

The table shows what [`pictures.py`](../resnet_flax/data/pictures.py) decodes,
and the largest difference, of 255, from TensorFlow 2.21's
`tf.io.decode_image(data, channels=3, expand_animations=False)`. A word in place
of a number says what TensorFlow gives instead. One picture of 35 x 21 noisy
pixels stands for each kind. JPEGs have quality 95 unless a row says otherwise.

- The decoder returns red, green and blue of 8 bits each. It keeps the high byte
  of 16-bit values. It copies a grey value to all three channels.
- It drops alpha and keeps the colours under it. A GIF has no colours there, and
  becomes black.
- It does not apply EXIF's orientation, gamma and colour profiles. Neither do
  TensorFlow and TFDS.
- It decodes the first frame of an animation.
- JPEGs differ because TensorFlow's default is a faster and coarser DCT. With
  `tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")` the
  difference is 0 for all of them.
- TensorFlow takes the numbers of a BMP's palette for grey, and a GIF's size
  from its frames.
- Other formats, pictures that lack pixels, and those of more than 67 million
  end in an error, and so do picture files of more than 64 MiB.

This page is made by `pip install tensorflow-cpu` and
`python -m tests.data.pictures_kinds > docs/pictures.md` (not run by CI, which
checks the table without TensorFlow).

| kind | what is decoded | largest difference |
| --- | --- | --- |
"""


class Kind(NamedTuple):
  """`loss` is how far `pixels` may be from what is decoded."""

  encoded: bytes
  pixels: np.ndarray
  decoded: str = "its colours"
  loss: int = 0


def encode(image, encoding="PNG", **settings):
  file = io.BytesIO()
  image.save(file, encoding, **settings)
  return file.getvalue()


def chunk(kind, data, checksum_off=0):
  checksum = zlib.crc32(kind + data) ^ checksum_off
  length, checksum = struct.pack(">I", len(data)), struct.pack(">I", checksum)
  return length + kind + data + checksum


def with_chunks(png, *chunks):
  """After the header, which has 33 bytes."""
  return b"".join([png[:33], *chunks, png[33:]])


def png(samples, bits, color_type, *chunks, interlaced=False):
  """Of integers [H, W, C], also of kinds that Pillow does not write."""
  height, width, _ = samples.shape
  # Start and step of Adam7's rows and columns.
  passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4))
  passes = (*passes, (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
  rows = b""
  for y, dy, x, dx in passes if interlaced else [(0, 1, 0, 1)]:
    for row in samples[y::dy, x::dx]:
      each = np.unpackbits(row.astype(">u2").reshape(-1, 1).view(np.uint8), 1)
      rows += b"\0" + np.packbits(each[:, -bits:]).tobytes()
  header = (width, height, bits, color_type, 0, 0, interlaced)
  parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), *chunks]
  parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


_rng = np.random.default_rng(0)
_y, _x = np.mgrid[:21, :35]
_colours = np.stack([40 + 4 * _x, 200 - 6 * _y, 60 + 2 * _x + 3 * _y], -1)
# The noise is grey: JPEGs that keep less chroma would lose that of colours.
RGB = (_colours + _rng.integers(-40, 41, (21, 35, 1))).astype(np.uint8)
GREY = np.repeat(RGB[..., :1], 3, -1)
ALPHA = _rng.integers(0, 256, (21, 35, 1), np.uint8)
COLOUR, OTHER = Image.fromarray(RGB), Image.fromarray(255 - RGB)
ANIMATED = {"save_all": True, "append_images": [OTHER]}
TRANSPARENT = Image.fromarray(np.dstack([RGB, ALPHA]))


def _jpegs():
  def jpeg(image=COLOUR, encoding="JPEG", quality=95, **settings):
    return encode(image, encoding, quality=quality, **settings)

  for sampling in ("4:4:4", "4:2:2", "4:2:0"):
    yield f"JPEG, {sampling}", Kind(jpeg(subsampling=sampling), RGB, loss=10)
  for quality, loss in [(75, 40), (100, 6)]:
    encoded = jpeg(quality=quality)
    yield f"JPEG, quality {quality}", Kind(encoded, RGB, loss=loss)
  yield "JPEG, progressive", Kind(jpeg(progressive=True), RGB, loss=10)
  restarts = jpeg(restart_marker_blocks=1)
  yield "JPEG, restart markers", Kind(restarts, RGB, loss=10)
  yield "JPEG, RGB", Kind(jpeg(keep_rgb=True), RGB, loss=10)
  grey = jpeg(Image.fromarray(GREY[..., 0]))
  yield "JPEG, grey", Kind(grey, GREY, "its grey", 10)
  exif = Image.Exif()
  exif[0x0112] = 6
  rotated = Kind(jpeg(exif=exif), RGB, "its colours, not rotated", 10)
  yield "JPEG, rotated by EXIF", rotated
  several = jpeg(encoding="MPO", **ANIMATED)
  yield "JPEG, several (MPO)", Kind(several, RGB, "the first picture", 10)

  # `light` is what each ink lets through: 255 is all. Adobe's files hold that,
  # and so does Pillow's, with Adobe's marker: it writes 255 less the inks.
  def cmyk(light):
    return jpeg(Image.frombytes("CMYK", (35, 21), light.tobytes()))

  key = (255 - ALPHA // 2).astype(np.uint8)
  seen = (RGB.astype(int) * key // 255).astype(np.uint8)
  light = np.dstack([RGB, key])
  kind = Kind(b"", seen, "colour times key", 10)
  inks = cmyk(255 - light)
  yield "JPEG, CMYK of Adobe", kind._replace(encoded=inks)
  inks, marker = cmyk(light), b"\xff\xee\0\x0eAdobe"
  start = inks.index(marker)
  inks = inks[:start] + inks[start + 16 :]
  yield "JPEG, CMYK without Adobe's marker", kind._replace(encoded=inks)
  luma = np.asarray(OTHER.convert("YCbCr"))
  inks = bytearray(cmyk(255 - np.dstack([luma, key])))
  inks[start + 15] = 2  # Adobe's number of YCCK.
  yield "JPEG, YCCK", kind._replace(encoded=bytes(inks))


def _pngs():
  yield "PNG, RGB", Kind(encode(COLOUR), RGB)
  yield "PNG, RGBA", Kind(encode(TRANSPARENT), RGB)
  grey = Image.fromarray(GREY[..., 0])
  yield "PNG, grey", Kind(encode(grey), GREY, "its grey")
  both = encode(Image.merge("LA", [grey, Image.fromarray(ALPHA[..., 0])]))
  yield "PNG, grey and alpha", Kind(both, GREY, "its grey")
  for bits in (1, 2, 4):
    few = GREY >> (8 - bits)
    kind = Kind(png(few[..., :1], bits, 0), few * (255 // (2**bits - 1)))
    yield f"PNG, {bits}-bit grey", kind._replace(decoded="0 to 255")
    numbers, palette = few[..., :1], RGB[0, : 2**bits]
    chunks = [chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", b"\0\x80")]
    kind = Kind(png(numbers, bits, 3, *chunks), palette[numbers[..., 0]])
    yield f"PNG, transparent {bits}-bit palette", kind
  palette = COLOUR.quantize(200)
  pixels = np.asarray(palette.convert("RGB"))
  yield "PNG, palette", Kind(encode(palette), pixels)
  encoded = encode(palette, transparency=bytes(range(200)))
  yield "PNG, palette with alpha", Kind(encoded, pixels)
  encoded = encode(COLOUR, transparency=tuple(RGB[0, 0].tolist()))
  yield "PNG, RGB with a transparent colour", Kind(encoded, RGB)
  deep = _rng.integers(0, 2**16, (21, 35, 4)).astype(np.uint16)
  high = (deep >> 8).astype(np.uint8)
  names = {0: "grey", 4: "grey and alpha", 2: "RGB", 6: "RGBA"}
  for channels, number in enumerate(names, 1):
    encoded = png(deep[..., :channels], 16, number)
    pixels = np.repeat(high[..., :1], 3, -1) if channels < 3 else high[..., :3]
    kind = Kind(encoded, pixels, "the high 8 bits")
    yield f"PNG, 16-bit {names[number]}", kind
  yield "PNG, interlaced", Kind(png(RGB, 8, 2, interlaced=True), RGB)
  gamma = with_chunks(encode(COLOUR), chunk(b"gAMA", struct.pack(">I", 90_000)))
  yield "PNG, gamma", Kind(gamma, RGB)
  encoded = encode(COLOUR, **ANIMATED)
  yield "PNG, animated", Kind(encoded, RGB, "the first frame")


def _others():
  palette = COLOUR.quantize(16)
  pixels = np.asarray(palette.convert("RGB"))
  gif = encode(palette, "GIF")
  yield "GIF", Kind(gif, pixels)
  on_black = pixels * (np.asarray(palette) != 3)[..., None]
  encoded = encode(palette, "GIF", transparency=3)
  yield "GIF, transparent", Kind(encoded, on_black, "its colours, on black")
  encoded = encode(palette, "GIF", **ANIMATED)
  yield "GIF, animated", Kind(encoded, pixels, "the first frame")
  screen = np.empty((25, 45, 3), np.uint8)
  screen[:] = palette.getpalette()[:3]
  screen[:21, :35] = pixels
  encoded = gif[:6] + struct.pack("<HH", 45, 25) + gif[10:]
  kind = Kind(encoded, screen, "all of the screen")
  yield "GIF, frame smaller than the screen", kind

  yield "BMP, RGB", Kind(encode(COLOUR, "BMP"), RGB)
  yield "BMP, RGBA", Kind(encode(TRANSPARENT, "BMP"), RGB)
  grey = Image.fromarray(GREY[..., 0])
  yield "BMP, grey", Kind(encode(grey, "BMP"), GREY, "its grey")
  encoded = encode(palette, "BMP")
  yield "BMP, palette", Kind(encoded, pixels)
  black_or_white = Image.fromarray(GREY[..., 0] > 127)
  pixels = np.asarray(black_or_white.convert("RGB"))
  encoded = encode(black_or_white, "BMP")
  yield "BMP, 1 bit", Kind(encoded, pixels, "black and white")

  lossless = {"lossless": True, "exact": True}
  yield "WebP, lossless", Kind(encode(COLOUR, "WEBP", **lossless), RGB)
  yield "WebP", Kind(encode(COLOUR, "WEBP", quality=95), RGB, loss=12)
  encoded = encode(TRANSPARENT, "WEBP", **lossless)
  yield "WebP, alpha", Kind(encoded, RGB)
  encoded = encode(COLOUR, "WEBP", **lossless, **ANIMATED)
  yield "WebP, animated", Kind(encoded, RGB, "the first frame")


KINDS = dict([*_jpegs(), *_pngs(), *_others()])


def decode(encoded):
  image = pictures.decode(encoded)
  assert image.mode == "RGB"
  return np.asarray(image)


def difference(found, expected):
  return np.abs(found.astype(int) - expected).max()


def difference_from_tensorflow(kind):
  """In words, where TensorFlow makes something else of it."""
  import tensorflow as tf

  try:
    theirs = tf.io.decode_image(
      kind.encoded, channels=3, expand_animations=False
    )
  except tf.errors.InvalidArgumentError:
    return "an error"
  found = decode(kind.encoded)
  if theirs.shape != found.shape:
    return "another size"
  return str(difference(found, theirs.numpy()))


def page(difference_of):
  rows = [
    f"| {name} | {kind.decoded} | {difference_of(kind)} |\n"
    for name, kind in KINDS.items()
  ]
  return PAGE + "".join(rows)


if __name__ == "__main__":
  print(page(difference_from_tensorflow), end="")
