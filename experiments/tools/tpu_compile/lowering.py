"""Lowers the steps for GPUs with JAX, without a GPU."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
from jaxlib.mlir import ir
from ml_collections import ConfigDict

from experiments.tools.tpu_compile import compilation


def describe(
  config: ConfigDict, devices: Sequence[jax.Device]
) -> dict[str, Any]:
  """Lowers both steps for as many GPUs as there are devices, of any kind.

  Each of `compilation.STEPS` has its `convolutions`, `dots` (products of
  matrices) and `loops`, each counted once per occurrence, and `custom_calls` by
  target, which are code outside StableHLO.
  """
  result = {}
  for name, traced in compilation.trace(config, devices).items():
    lowered = traced.lower(lowering_platforms=("cuda",))
    names: collections.Counter[str] = collections.Counter()
    targets: collections.Counter[str] = collections.Counter()

    def visit(operation, names=names, targets=targets):
      names[operation.name] += 1
      if operation.name == "stablehlo.custom_call":
        targets[str(operation.attributes["call_target_name"]).strip('"')] += 1
      return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    result[name] = {
      "convolutions": names["stablehlo.convolution"],
      "dots": names["stablehlo.dot_general"],
      "loops": names["stablehlo.while"],
      "custom_calls": dict(sorted(targets.items())),
    }
  return result
