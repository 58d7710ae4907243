"""Decodes pictures to RGB, as TensorFlow's `decode_image(channels=3)` does.

As in TFDS, transparency is dropped and EXIF's orientation is not applied. An
animated picture gives its first frame. docs/pictures.md lists every kind with
its difference from TensorFlow's pixels.
"""

import io
import struct
from typing import Any

import numpy as np

# Pillow knows many more formats, and some of them start other programs.
_ENCODINGS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# ImageNet's largest picture has 61 million pixels.
_MOST_PIXELS = 2**26
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}


def decode(encoded: bytes) -> Any:
  """Returns a Pillow image of mode RGB; bad bytes may raise any exception."""
  from PIL import Image

  file = io.BytesIO(_without_extras(encoded))
  with Image.open(file, formats=_ENCODINGS) as image:
    if image.width * image.height > _MOST_PIXELS:
      raise ValueError(
        f"it has {image.width} x {image.height} pixels; a picture must have at"
        f" most {_MOST_PIXELS:,}"
      )
    image.load()  # Pillow decodes only now.
    if image.mode == "RGB":
      return image
    if image.mode.startswith("I"):  # Grey of 16 bits, which Pillow would clip.
      high = np.asarray(image).astype(np.int64) >> 8
      return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":
      # Pillow takes all CMYK as inverted, TensorFlow only with Adobe's marker.
      light = np.asarray(image).astype(np.int64)
      if "adobe" in image.info:
        light = 255 - light
      rgb = light[..., :3] * light[..., 3:] // 255
      return Image.fromarray(rgb.astype(np.uint8))
    if image.format == "GIF":  # TensorFlow puts the first frame on black.
      black = Image.new("RGBA", image.size, "black")
      return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _without_extras(encoded: bytes) -> bytes:
  """Keeps only the PNG chunks that make pixels: Pillow rejects some others."""
  if not encoded.startswith(_PNG):
    return encoded
  chunks, start = [_PNG], len(_PNG)
  while start + 8 <= len(encoded):
    length, kind = struct.unpack(">I4s", encoded[start : start + 8])
    end = start + 12 + length
    if kind in _PNG_CHUNKS:
      chunks.append(encoded[start:end])
    start = end
  return b"".join(chunks)
