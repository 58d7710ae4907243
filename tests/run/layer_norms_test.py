"""Norms of each layer against the same by hand, and how they are logged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import step as step_lib
from resnet_flax.data import normalize
from resnet_flax.models.kernels import grouping
from resnet_flax.parallel import program
from resnet_flax.run import (
  errors,
  experiment as experiment_lib,
  layer_norms,
  rules,
)
from tests.helpers import (
  Programs,
  assert_identical,
  at_event,
  die,
  layout_of,
  restore,
  untimed,
)
from tests.run.metrics_test import all_events, events

KEY = jax.random.key(3)
# Of the short networks below.
LAYERS = {
  "resnet_v1": (
    "stem_conv",
    "stage1_block1/conv1",
    "stage1_block1/conv2",
    "stage2_block1/conv1",
    "stage2_block1/conv2",
    "stage2_block1/shortcut_conv",
    "stage2_block2/conv1",
    "stage2_block2/conv2",
    "stage2_block3/conv1",
    "stage2_block3/conv2",
    "head",
  ),
  "highway": (
    "stem_conv",
    "stage1_block1/conv1",
    "stage1_block1/conv2",
    "stage1_block1/gate_conv",
    "stage2_block1/conv1",
    "stage2_block1/conv2",
    "stage2_block1/gate_conv",
    "stage2_block2/conv1",
    "stage2_block2/conv2",
    "stage2_block2/gate_conv",
    "stage2_block3/conv1",
    "stage2_block3/conv2",
    "stage2_block3/gate_conv",
    "head",
  ),
}


def make_experiment(name, **model):
  """Two stages, quick to compile: one block, and three with two alike."""
  config = base.get_config()
  config.model.update({"name": name, "depth": 20, "num_filters": 4, **model})
  config.optimizer.update({"name": "sgd", "learning_rate": 0.1, "l2": 0.01})
  experiment = experiment_lib.build(config)
  filters = experiment.model.stage_filters[:2]
  return dataclasses.replace(
    experiment,
    model=experiment.model.clone(stage_sizes=(1, 3), stage_filters=filters),
    image_shape=(8, 8, 3),
  )


def arguments(experiment):
  """State, images, labels and key of a step."""
  state = step_lib.create_train_state(
    experiment,
    jax.random.key(0),
    normalize.placeholder("none", experiment.image_shape),
  )
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, *experiment.image_shape), np.uint8)
  return state, images, np.arange(6, dtype=np.int32), KEY


def leaf(tree, name):
  return functools.reduce(lambda node, key: node[key], name.split("/"), tree)


@functools.cache
def by_hand(name, norm):
  """Gradient, outputs and new parameters, without the tested code."""
  experiment = make_experiment(name, norm=norm)
  state, images, labels, key = arguments(experiment)

  @jax.jit
  def compute(state):
    keys = step_lib.step_keys(key, 0)
    augmented, _ = experiment.augment(
      keys["augmentation"], state.normalization(images), labels
    )

    def loss(params):
      logits, updated = experiment.model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        augmented,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
      )
      chosen = jax.nn.log_softmax(logits)[jnp.arange(6), labels]
      return -jnp.mean(chosen), updated["intermediates"]

    gradient, outputs = jax.grad(loss, has_aux=True)(state.params)
    new_state, _ = step_lib.train_step(experiment, state, images, labels, key)
    return gradient, outputs, new_state.params

  return jax.device_get((state.params, *compute(state)))


@pytest.mark.parametrize(
  ("name", "model"),
  [
    pytest.param("resnet_v1", {}, id="plain"),
    pytest.param(
      "resnet_v1",
      {"scan": True, "remat": True},
      id="scan+remat",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "highway",
      {"norm": "none", "scan": True},
      id="scan without batch norm",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_norms_are_those_by_hand(name, model):
  experiment = make_experiment(name, **model)
  assert layer_norms.layer_names(experiment) == LAYERS[name]
  step = jax.jit(functools.partial(layer_norms.measured_step, experiment))
  new_state, _, norms = step(*arguments(experiment))
  before, gradient, outputs, after = by_hand(
    name, model.get("norm", "batch_norm")
  )
  expected = {"gradient": [], "activation": [], "update_ratio": []}
  for layer in LAYERS[name]:
    kernel, new = (leaf(tree, layer)["kernel"] for tree in (before, after))
    (output,) = leaf(outputs, layer)["__call__"]
    expected["gradient"].append(
      np.linalg.norm(leaf(gradient, layer)["kernel"].ravel())
    )
    expected["activation"].append(np.sqrt(np.mean(np.square(output))))
    expected["update_ratio"].append(
      np.linalg.norm((new - kernel).ravel()) / np.linalg.norm(kernel.ravel())
    )
  for quantity, values in expected.items():
    measured = getattr(norms, quantity)
    assert measured.dtype == jnp.float32
    np.testing.assert_allclose(measured, values, rtol=2e-4, err_msg=quantity)
    assert len(set(values)) == len(values)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
    new_state.params,
    after,
  )


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_norm_of_what_has_no_square(factor):
  x = jnp.asarray([[3.0, 0.0], [0.0, -4.0]]) * factor
  np.testing.assert_allclose(grouping.norm_of(x), 5 * factor, rtol=1e-6)


def test_norm_of_zero_and_of_what_is_not_finite():
  assert float(grouping.norm_of(jnp.zeros(3))) == 0
  assert float(grouping.norm_of(jnp.asarray([1, -jnp.inf]))) == np.inf
  assert np.isnan(grouping.norm_of(jnp.asarray([1, jnp.nan])))


def test_tags():
  norms = layer_norms.LayerNorms([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])
  assert layer_norms.scalars(("a/conv1", "head"), norms) == {
    "layers/gradient/a/conv1": 1.0,
    "layers/gradient/head": 2.0,
    "layers/activation/a/conv1": 3.0,
    "layers/activation/head": 4.0,
    "layers/update_ratio/a/conv1": 5.0,
    "layers/update_ratio/head": 6.0,
  }


def test_needs_tensorboard(tiny_config):
  tiny_config.log_layer_norms_every = 3
  with pytest.raises(
    errors.ConfigError, match=r"=3 .* must .* log.tensorboard"
  ):
    rules.check(tiny_config, num_devices=1)
  tiny_config.log.tensorboard = True
  rules.check(tiny_config, num_devices=1)


@pytest.mark.slow
def test_training_is_the_same_with_and_without(
  tiny_config, tmp_path, one_device
):
  """Bit-identical, also if a run that logs is killed and resumes."""
  tiny_config.log.tensorboard = True
  tiny_config.checkpoint.every_steps = 3
  straight, logging = tmp_path / "straight", tmp_path / "logging"
  run = functools.partial(Programs().train, devices=one_device)
  expected = run(tiny_config, straight)

  tiny_config.log_layer_norms_every = 3
  # The last checkpoint is the one of step 6.
  with pytest.raises(SystemExit):
    run(tiny_config, logging, on_event=at_event("step", 7, die))
  records = run(tiny_config, logging)
  assert untimed(records) == untimed(expected)
  assert_identical(
    restore(tiny_config, logging, 8), restore(tiny_config, straight, 8)
  )

  names = layer_norms.layer_names(experiment_lib.build(tiny_config))
  found = [e for e in events(logging / "tensorboard") if "layers/" in e[1]]
  assert {(step, tag) for step, tag, _ in found} == {
    (step, f"layers/{quantity}/{name}")
    for step in (0, 3, 6)
    for quantity in ("gradient", "activation", "update_ratio")
    for name in names
  }
  assert all(0 < value < 1e3 for *_, value in found)
  # What the killed run wrote before the step it goes on from stays.
  starts = [
    event.step
    for event in all_events(logging / "tensorboard")
    if event.HasField("session_log")
  ]
  assert starts == [0, 6]
  assert not [
    tag for _, tag, _ in events(straight / "tensorboard") if "layers/" in tag
  ]


def test_several_seeds_have_tags_of_their_own(tiny_config, monkeypatch):
  tiny_config.seed = 4
  tiny_config.log_layer_norms_every = 2
  layout = layout_of(tiny_config, num_seeds=2)
  experiment = experiment_lib.build(tiny_config)
  names = layer_norms.layer_names(experiment)

  def measured(state, images, labels, key):
    rows = [jnp.full(len(names), seed, jnp.float32) for seed in layout.seeds]
    norms = [layer_norms.LayerNorms(row, row, row) for row in rows]
    return (layout.put(norms),)

  monkeypatch.setattr(program, "compile_function", lambda *_, **__: measured)
  written = {}
  hook = layer_norms.create_hook(
    *(tiny_config, experiment, None, None, layout),
    write=lambda step, values: written.setdefault(step, {}).update(values),
  )
  for step in range(4):
    hook(step, None, program.Batch(1, (), lambda: (None, None)))
  assert set(written) == {0, 2}
  assert len(written[0]) == 2 * 3 * len(names)
  assert written[0]["seed_4/layers/gradient/head"] == 4
  assert written[2]["seed_5/layers/activation/stem_conv"] == 5
