"""Rematerialised and looped blocks against plain ones."""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import step as step_lib
from resnet_flax.data import normalize as normalization
from resnet_flax.models import registry
from resnet_flax.parallel import mesh as mesh_lib, transfer
from resnet_flax.run import experiment as experiment_lib
from resnet_flax.tools import summary

KEY = jax.random.key(0)
SHAPE = (4, 8, 8, 3)
LARGER = (8, 32, 32, 3)
BOTH = {"remat": True, "scan": True}
CASES = [
  ("resnet_v1", {"remat": True}),
  ("resnet_v1", BOTH),
  ("resnet_v2", {"scan": True}),
  ("resnet_v2", BOTH),
]
every_case = pytest.mark.parametrize(
  ("name", "switches"),
  CASES,
  ids=["+".join([name, *switches]) for name, switches in CASES],
)


@functools.cache
def make(name="resnet_v1", depth=20, **overrides):
  config = base.get_config().model
  # The bias before a batch norm has no gradient but rounding errors.
  config.update({"name": name, "depth": depth, "num_filters": 4})
  config.update({"conv_bias": False, **overrides})
  return registry.create_model(config, num_classes=10)


def shorten(model):
  """Two stages, quick to compile: one block, and three with two alike."""
  return model.clone(stage_sizes=(1, 3), stage_filters=model.stage_filters[:2])


def images_and_labels(shape=SHAPE):
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  return jnp.asarray(images), jnp.arange(shape[0]) % 10


def init(model):
  images, _ = images_and_labels()
  return jax.jit(functools.partial(model.init, train=False))(
    jax.random.key(0), images
  )


@functools.cache
def initial(name):
  """The short network's variables, no statistic at its initial value."""
  variables = init(shorten(make(name)))
  rng = np.random.default_rng(1)
  return variables | {
    "batch_stats": jax.tree.map(
      lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32),
      variables["batch_stats"],
    )
  }


def shapes_of(model):
  return jax.eval_shape(functools.partial(init, model))


def loss(model, params, batch_stats, shape=SHAPE):
  images, labels = images_and_labels(shape)
  experiment = types.SimpleNamespace(model=model, label_smoothing=0.0)
  return step_lib.loss_fn(experiment, params, batch_stats, images, labels, KEY)


def outcome(model, variables):
  """Loss, logits, new statistics, gradients, and logits at inference."""
  images, _ = images_and_labels()

  @jax.jit
  def call(params, batch_stats):
    training = jax.value_and_grad(functools.partial(loss, model), has_aux=True)(
      params, batch_stats
    )
    variables = {"params": params, "batch_stats": batch_stats}
    return training, model.apply(variables, images, train=False)

  return call(variables["params"], variables["batch_stats"])


@functools.cache
def plain_outcome(name):
  return outcome(shorten(make(name)), initial(name))


def assert_close(a, b, tolerance=1e-5):
  """Arrays agree up to a fraction of their largest value."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_allclose(
      x,
      y,
      rtol=tolerance,
      atol=tolerance * np.abs(y).max(),
      err_msg=jax.tree_util.keystr(path),
    )


@every_case
def test_same_results_with_the_same_variables(name, switches):
  """So either can go on with the other's checkpoint."""
  ours = outcome(shorten(make(name, **switches)), initial(name))
  assert_close(ours, plain_outcome(name))


@every_case
def test_initialised_alike(name, switches):
  ours, plain = init(shorten(make(name, **switches))), init(shorten(make(name)))
  assert "stage2_block3" in plain["params"]
  jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_statistics_stay_at_inference():
  variables = initial("resnet_v1")
  images, _ = images_and_labels()
  _, updated = shorten(make(scan=True)).apply(
    variables, images, train=False, mutable=["batch_stats"]
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    updated["batch_stats"],
    variables["batch_stats"],
  )


def test_bfloat16():
  model = shorten(make(dtype="bfloat16", scan=True, remat=True))
  variables = shapes_of(model)
  shapes = jax.eval_shape(
    jax.grad(functools.partial(loss, model), has_aux=True),
    variables["params"],
    variables["batch_stats"],
  )
  gradients, (logits, batch_stats) = shapes
  assert logits.dtype == jnp.float32
  leaves = jax.tree.leaves((gradients, batch_stats))
  assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


def count_convolutions(depth, **switches):
  """Convolutions in the program of a loss's gradient."""
  model = make(depth=depth, **switches)
  variables = shapes_of(model)
  gradient = jax.grad(functools.partial(loss, model), has_aux=True)
  program = jax.make_jaxpr(gradient)(
    variables["params"], variables["batch_stats"]
  )
  return str(program).count("conv_general_dilated[")


@pytest.mark.parametrize(
  "remat", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_deeper_loops_have_no_more_convolutions(remat):
  shallow, deep = (
    count_convolutions(depth, remat=remat, scan=True) for depth in (20, 56)
  )
  assert shallow == deep < count_convolutions(20, remat=remat)


def test_one_block_makes_no_loop():
  assert count_convolutions(14, scan=True) == count_convolutions(14)


def kept_bytes(model):
  """What the forward pass keeps for the backward pass."""
  variables = shapes_of(model)

  def kept(params, batch_stats):
    forward = functools.partial(loss, model, shape=LARGER)
    # The function that takes the backward pass is a tree of what it needs.
    return jax.vjp(forward, params, batch_stats, has_aux=True)[1]

  leaves = jax.tree.leaves(
    jax.eval_shape(kept, variables["params"], variables["batch_stats"])
  )
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_keeps_less(scan):
  with_remat, without = (
    kept_bytes(make(depth=32, remat=remat, scan=scan))
    for remat in (True, False)
  )
  assert with_remat < 0.5 * without


def test_loop_with_remat_needs_less_memory():
  """By the memory that XLA plans."""

  def temporary_bytes(remat):
    model = shorten(make(remat=remat, scan=True)).clone(stage_sizes=(1, 6))
    variables = shapes_of(model)
    forward = functools.partial(loss, model, shape=LARGER)
    lowered = jax.jit(jax.grad(forward, has_aux=True)).lower(
      variables["params"], variables["batch_stats"]
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes

  with_remat, without = temporary_bytes(True), temporary_bytes(False)
  assert with_remat < 0.85 * without


def take_step(images, labels, **switches):
  """What one training step computes, and its program."""
  config = base.get_config()
  config.model.update({"num_filters": 4, "conv_bias": False, **switches})
  config.augment.name = "none"
  experiment = experiment_lib.build(config)
  experiment = dataclasses.replace(experiment, model=shorten(experiment.model))
  key = jax.random.key(0)
  state = step_lib.create_train_state(
    experiment,
    key,
    normalization.placeholder("pixel_mean", experiment.image_shape),
  )
  step = jax.jit(functools.partial(step_lib.train_step, experiment))
  compiled = step.lower(state, images, labels, key).compile()
  new_state, step_metrics = compiled(state, images, labels, key)
  # Adam's first step is little more than the gradient's sign; its moments
  # are not.
  computed = (new_state.opt_state, new_state.batch_stats, step_metrics)
  return computed, compiled.as_text()


@pytest.mark.slow
def test_step_on_a_batch_sharded_over_devices():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (16, 32, 32, 3), np.uint8)
  images[:2] //= 2  # So that devices' own statistics would differ.
  labels = np.arange(16, dtype=np.int32) % 10
  mesh = mesh_lib.create_mesh()
  assert mesh.size == 8
  sharded = transfer.put(
    (images, labels), mesh_lib.sharding(mesh, mesh_lib.DATA)
  )
  ours, program = take_step(*sharded, remat=True, scan=True)
  assert "all-gather" not in program
  plain, _ = take_step(images, labels)
  assert_close(ours, plain, 1e-4)


def reductions_in_main(depth):
  """Reductions that the step's program has outside of other functions."""
  config = base.get_config()
  config.model.update({"depth": depth, "remat": True, "scan": True})
  experiment = experiment_lib.build(config)
  key = jax.random.key(0)
  state = jax.eval_shape(
    functools.partial(step_lib.create_train_state, experiment),
    key,
    normalization.placeholder("pixel_mean", experiment.image_shape),
  )
  images = jax.ShapeDtypeStruct((4, 32, 32, 3), np.uint8)
  labels = jax.ShapeDtypeStruct((4,), np.int32)
  step = functools.partial(step_lib.train_step, experiment)
  program = jax.jit(step).lower(state, images, labels, key).as_text()
  main = re.search(r"func\.func public @main\(.*?\n  }", program, re.DOTALL)
  return main[0].count("stablehlo.reduce(")


def test_deeper_loops_have_no_more_reductions_in_one_computation():
  """On a CPU, XLA's compile time grows as the cube of their number."""
  assert reductions_in_main(32) == reductions_in_main(20)


def test_summary_is_the_same():
  plain, ours = base.get_config(), base.get_config()
  ours.model.update({"remat": True, "scan": True})
  assert summary.summarize(ours) == summary.summarize(plain)
