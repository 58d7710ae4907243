"""Writes a network's forward pass as an ONNX graph, operation by operation.

JAX traces the pass for one image. `_operation` translates each operation that
depends on the image, so no block needs export code. All other operations are
computed here and become constants. NHWC values of JAX are NCHW in ONNX.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from resnet_flax.run import errors

# Versions of 2022, which runtimes since then can read.
OPSET, IR_VERSION = 17, 8


@dataclasses.dataclass
class _Value:
  """A value that depends on the image: scale * kernel(x) + shift.

  It is written only when another operation needs it. So the scales and shifts
  of channels, such as a batch norm's, are folded into a kernel and its bias.
  """

  x: Any  # Another `_Value`, or a name in the graph.
  operation: str = ""  # 'Conv' or 'Gemm'; without one, kernel(x) is x.
  kernel: Any = None  # HWIO for 'Conv', IO for 'Gemm'.
  attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
  scale: Any = 1.0
  shift: Any = 0.0
  name: str = ""  # Its name in the graph, once it is written.


class _Graph:
  def __init__(self) -> None:
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self.scope = ""  # The layer that is being written.

  def add(self, operation: str, *inputs: Any, **attributes: Any) -> _Value:
    """Adds a node of values, names or constants with axes in JAX's order."""
    names = [self._name(each) for each in inputs]
    scope = attributes.pop("scope", self.scope)
    name = f"{scope}/{operation}_{len(self.nodes)}"
    node = helper.make_node(operation, names, [name], name, **attributes)
    self.nodes.append(node)
    return _Value(name, name=name)

  def _name(self, operand: Any) -> str:
    if isinstance(operand, str):
      return operand
    if isinstance(operand, _Value):
      operand.name = operand.name or self._write(operand)
      return operand.name
    name = f"constant_{len(self.constants)}"
    array = np.asarray(operand)
    array = np.array(array.transpose(_order(array.ndim)), order="C")
    self.constants.append(numpy_helper.from_array(array, name))
    return name

  def _write(self, value: _Value) -> str:
    x, scale, shift = value.x, np.float32(value.scale), np.float32(value.shift)
    if value.operation:
      kernel = np.asarray(value.kernel) * scale
      bias = np.broadcast_to(shift.ravel(), kernel.shape[-1:])
      if value.operation == "Conv":
        kernel = kernel.transpose(3, 0, 1, 2)  # OHWI, which becomes OIHW.
      return self.add(value.operation, x, kernel, bias, **value.attributes).name
    if np.any(scale != 1):
      x = self.add("Mul", x, scale)
    if np.any(shift != 0):
      x = self.add("Add", x, shift)
    return self._name(x)


def write(
  logits: Callable[[jax.Array], jax.Array],
  image_shape: Sequence[int],
  class_names: Sequence[str],
  path: pathlib.Path,
) -> None:
  """Writes a model that maps images to the softmax of their logits.

  `logits` maps uint8[N, *image_shape] to float32[N, classes]. Raises
  `ConfigError` if `_operation` cannot write one of its operations.
  """
  graph = _Graph()
  image = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
  traced = jax.make_jaxpr(logits)(image)
  images = graph.add("Transpose", "images", perm=_order(4))
  graph.add("Softmax", *_walk(graph, traced, [images]), axis=1)
  graph.nodes[-1].output[0] = "probabilities"
  classes = traced.out_avals[0].shape[1]
  types, value_info = onnx.TensorProto, helper.make_tensor_value_info
  graph_proto = helper.make_graph(
    *(graph.nodes, "resnet_flax"),
    [value_info("images", types.UINT8, ["batch", *image_shape])],
    [value_info("probabilities", types.FLOAT, ["batch", classes])],
    graph.constants,
  )
  opset = helper.make_opsetid("", OPSET)
  model = helper.make_model(
    graph_proto, opset_imports=[opset], ir_version=IR_VERSION
  )
  helper.set_model_props(model, {"class_names": json.dumps(class_names)})
  onnx.save(model, path)


def _walk(
  graph: _Graph, traced: core.ClosedJaxpr, inputs: Sequence[Any]
) -> list[Any]:
  """Adds the nodes of a traced function; returns the values of its outputs."""
  values = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
  values |= zip(traced.jaxpr.invars, inputs, strict=True)

  def read(variables: Sequence[Any]) -> list[Any]:
    return [
      x.val if isinstance(x, core.Literal) else values[x] for x in variables
    ]

  for equation in traced.eqns:
    name, params = equation.primitive.name, equation.params
    operands = read(equation.invars)
    graph.scope = str(equation.source_info.name_stack) or graph.scope
    if name in ("jit", "custom_jvp_call"):
      inner = params["jaxpr" if name == "jit" else "call_jaxpr"]
      results = _walk(graph, inner, operands)
    elif not any(isinstance(each, _Value) for each in operands):
      results = equation.primitive.bind(*operands, **params)
      results = results if equation.primitive.multiple_results else [results]
    else:
      results = [_operation(graph, equation, *operands)]
    if None in results:
      raise errors.ConfigError(
        f"{graph.scope} computes {name} in a form that cannot be written as"
        " ONNX. Pass --format=stablehlo, which holds every network."
      )
    values |= zip(equation.outvars, results, strict=True)
  return read(traced.jaxpr.outvars)


# ---- Operations


def _order(rank: int) -> list[int]:
  """The numbers of JAX's axes in ONNX's order: NHWC becomes NCHW."""
  return [0, 3, 1, 2] if rank == 4 else list(range(rank))


def _by_axis(x: Sequence[Any]) -> np.ndarray:
  """Puts one entry per axis, such as strides, into ONNX's order of axes."""
  return np.array(x)[_order(len(x))]


def _operation(
  graph: _Graph, equation: Any, x: Any, y: Any = None
) -> _Value | None:
  """The value of a traced operation; None if this function cannot write it."""
  name, params = equation.primitive.name, equation.params
  before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  order = _order(len(after))
  dilated = [params.get(f"{what}_dilation", ()) for what in ("lhs", "base")]
  if {1, *itertools.chain(*dilated), params.get("batch_group_count", 1)} != {1}:
    return None
  match name:
    case "add" | "sub" | "mul" | "div":
      return _arithmetic(graph, name, x, y)
    case "dot_general":
      return _dot(graph, equation, x, y)
    case "conv_general_dilated" if not isinstance(y, _Value):
      attributes = {
        "strides": params["window_strides"],
        "pads": np.ravel(params["padding"], order="F"),
        "dilations": params["rhs_dilation"],
        "group": params["feature_group_count"],
        "scope": graph.scope,
      }
      return _Value(x, "Conv", y, attributes)
    case "reduce_window_max" if params["window_dimensions"][0::3] == (1, 1):
      attributes = {
        "kernel_shape": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "pads": np.ravel(params["padding"][1:3], order="F"),
        "dilations": params["window_dilation"][1:3],
      }
      return graph.add("MaxPool", x, **attributes)
    case "reduce_sum" if params["axes"] == (1, 2):
      mean = graph.add("ReduceMean", x, axes=[2, 3], keepdims=0)
      # In a mean, a division by the count follows and cancels this scale.
      return _Value(mean, scale=math.prod(before[1:3]))
    case "max" if not isinstance(y, _Value) and np.all(y == 0):
      return graph.add("Relu", x)
    case "logistic":
      return graph.add("Sigmoid", x)
    case "convert_element_type":
      dtype = helper.np_dtype_to_tensor_dtype(params["new_dtype"])
      return graph.add("Cast", x, to=dtype)
    case "transpose":
      axes = [order.index(params["permutation"][k]) for k in order]
      return graph.add("Transpose", x, perm=axes)
    case "reshape" | "broadcast_in_dim" if math.prod(before) == math.prod(
      after
    ):
      x = graph.add("Transpose", x, perm=np.argsort(_order(len(before))))
      x = graph.add("Reshape", x, [-1, *after[1:]])
      return graph.add("Transpose", x, perm=order)
    case "slice":
      # The traced batch has one image; the node must keep all images.
      stops = [np.iinfo(np.int64).max, *params["limit_indices"][1:]]
      steps = _by_axis(params["strides"] or [1] * len(order))
      bounds = _by_axis(params["start_indices"]), _by_axis(stops)
      return graph.add("Slice", x, *bounds, np.arange(len(order)), steps)
    case "pad":
      first, last, between = _by_axis(params["padding_config"]).T
      if not between.any():
        return graph.add("Pad", x, np.concatenate([first, last]), y)
  return None


def _arithmetic(graph: _Graph, name: str, a: Any, b: Any) -> _Value | None:
  """Adds a node for two values; a constant only changes scale and shift."""
  if isinstance(a, _Value) and isinstance(b, _Value):
    return graph.add(name.capitalize(), a, b)
  is_first = isinstance(a, _Value)
  value, constant = (a, b) if is_first else (b, a)
  constant = np.asarray(constant, np.float64)
  # A kernel can absorb only a scalar or one constant per channel.
  if value.operation and constant.size not in (1, *constant.shape[-1:]):
    value = _Value(value)
  scale, shift = value.scale, value.shift
  if name == "mul" or (name == "div" and is_first):
    factor = constant if name == "mul" else 1 / constant
    scale, shift = scale * factor, shift * factor
  elif name == "div":
    return None
  elif name == "sub" and not is_first:
    scale, shift = -scale, constant - shift
  else:
    shift = shift + (constant if name == "add" else -constant)
  return dataclasses.replace(value, scale=scale, shift=shift, name="")


def _dot(graph: _Graph, equation: Any, a: Any, b: Any) -> _Value | None:
  (axes, axes_of_b), batch = equation.params["dimension_numbers"]
  ranks = [each.aval.ndim for each in equation.invars]
  is_dense = (ranks, axes, axes_of_b) == ([2, 2], (1,), (0,))
  if is_dense and isinstance(a, _Value) and not isinstance(b, _Value):
    return _Value(a, "Gemm", b, {"scope": graph.scope})
  if batch != ((), ()):
    return None
  left, right = [*"abcd"[: ranks[0]]], [*"efgh"[: ranks[1]]]
  for axis, axis_of_b in zip(axes, axes_of_b, strict=True):
    right[axis_of_b] = left[axis]
  # A letter in both operands is summed over.
  result = [k for k in left + right if (k in left) != (k in right)]
  terms = ("".join(_by_axis(each)) for each in (left, right, result))
  formula = "{},{}->{}".format(*terms)
  return graph.add("Einsum", a, b, equation=formula)
