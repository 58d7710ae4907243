"""The programs that are compared."""

from typing import NamedTuple


class Program(NamedTuple):
  """A program and how it is started."""

  title: str
  worker: str  # Its module in `workers`.
  peer: str | None = None  # Its framework's environment; None is ours.
  dtype: str = "float32"  # The convolutions' dtype; parameters are float32.
  mode: str = "usual"  # 'usual', 'compiled' or 'data'; see the worker.

  @property
  def flags(self) -> list[str]:
    """The worker's flags."""
    return [f"--dtype={self.dtype}", f"--mode={self.mode}"]

  @property
  def ours(self) -> str:
    """The key of our program with the same dtype."""
    return "ours" if self.dtype == "float32" else "ours_bfloat16"


_KERAS = ("keras_tensorflow", "keras")
_TORCH = ("pytorch", "torch")
# Neighbours are measured one after the other.
PROGRAMS = {
  "ours_data": Program("resnet_flax, real data", "ours", mode="data"),
  "ours": Program("resnet_flax", "ours"),
  "torch": Program("PyTorch", *_TORCH),
  "torch_compiled": Program("PyTorch, compiled", *_TORCH, mode="compiled"),
  "keras": Program("Keras (TensorFlow)", *_KERAS),
  "keras_xla": Program("Keras (TensorFlow), XLA", *_KERAS, mode="compiled"),
  "plain": Program("stock Flax", "plain"),
  "ours_bfloat16": Program("resnet_flax, bfloat16", "ours", None, "bfloat16"),
  "torch_bfloat16": Program("PyTorch, bfloat16", *_TORCH, "bfloat16"),
  "torch_compiled_bfloat16": Program(
    "PyTorch, compiled, bfloat16", *_TORCH, "bfloat16", "compiled"
  ),
  "keras_bfloat16": Program(
    "Keras (TensorFlow), bfloat16", *_KERAS, "bfloat16"
  ),
}
