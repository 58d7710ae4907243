"""The main command with Flax's own convolution and batch norm.

  python -m experiments.cpu_training.plain_flax --config=configs/v1_depth20.py
    --workdir=DIR [--config.num_epochs=8]

Data, initialisation, order, augmentation, optimizer and loop are those of
`resnet_flax.main`, so that two runs differ in those two layers, and in the
compiler option that suits ours, alone.
"""

from unittest import mock

from jax import lax

from resnet_flax import main
from resnet_flax.models.kernels import batch_norm, convolution
from resnet_flax.parallel import mesh
from resnet_flax.run import process

# The counterpart that the tests compare with.
from tests.models.flax_batch_norm import FlaxBatchNorm


def run() -> None:
  """Runs `resnet_flax.main` with the two layers replaced."""
  with (
    mock.patch.object(
      convolution, "conv_general_dilated", lax.conv_general_dilated
    ),
    mock.patch.object(batch_norm, "BatchNorm", FlaxBatchNorm),
    mock.patch.object(mesh, "compiler_options", return_value={}),
  ):
    main.run()


if __name__ == "__main__":
  process.use_huge_pages()
  run()
