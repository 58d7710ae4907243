import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from configs import base
from resnet_flax import data, step as step_lib
from resnet_flax.data import normalize, types
from resnet_flax.parallel import evaluate
from resnet_flax.run import experiment as experiment_lib
from tests import helpers

layout_of = functools.partial(helpers.layout_of, base.get_config())


def split_of(count, size=2):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
  labels = rng.integers(0, 10, count).astype(np.int32)
  return types.whole_split(images, labels)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 8))
def test_every_image_is_in_exactly_one_batch(count, batch_size, num_devices):
  split = split_of(count)
  size = evaluate.call_size(split, batch_size, num_devices)
  assert size % num_devices == 0
  # As of two hosts, one of which has the first rows.
  every, own = np.arange(size), np.arange(size // 2)
  parts = (own, every[len(own) :]) if num_devices > 1 else (every,)
  seen = [[] for _ in range(-(-count // size))]
  for rows in parts:
    batches = list(evaluate.padded_batches(split, size, rows))
    assert len(batches) == len(seen)
    for batch, (images, labels, mask) in zip(seen, batches, strict=True):
      # One size, so that one program serves all.
      assert len(images) == len(labels) == len(mask) == len(rows)
      batch.append((images[mask], labels[mask]))
  images, labels = zip(*(part for batch in seen for part in batch), strict=True)
  np.testing.assert_array_equal(np.concatenate(images), split.images)
  np.testing.assert_array_equal(np.concatenate(labels), split.labels)


def test_crops_count_as_images_of_a_call():
  split = split_of(40)
  assert evaluate.call_size(split, 30, 4) == 32
  split = types.whole_split(split.images, split.labels, num_crops=10)
  assert evaluate.call_size(split, 30, 4) == 4
  assert evaluate.call_size(split, 5, 1) == 1


@pytest.fixture(scope="module")
def scored():
  """A network, a split and its scores computed image by image."""
  config = base.get_config()
  config.model.update({"depth": 8, "num_filters": 4})
  experiment = experiment_lib.build(config)
  state = step_lib.create_train_state(
    experiment,
    jax.random.key(0),
    normalize.placeholder("pixel_mean", (32, 32, 3)),
  )
  split = split_of(21, 32)
  apply = jax.jit(functools.partial(step_lib.apply_eval, experiment.model))
  logits = apply(state, jnp.asarray(split.images))
  rows = np.arange(len(split))
  losses = -np.asarray(jax.nn.log_softmax(logits))[rows, split.labels]
  expected = {
    "loss": losses.mean(),
    "objective": losses.mean() + experiment.optimizer.penalty(state.params),
    "accuracy": np.mean(np.argmax(logits, -1) == split.labels),
    "top5": np.mean(np.argsort(-logits, -1)[:, :5] == split.labels[:, None])
    * 5,
  }
  return experiment, state, split, expected


@pytest.mark.parametrize(
  ("batch_size", "num_devices"), [(5, 1), (8, 2), (21, 8), (100, 1)]
)
def test_scores_do_not_depend_on_batches_or_devices(
  scored, batch_size, num_devices
):
  experiment, state, split, expected = scored
  layout = layout_of(num_devices)
  scores = evaluate.evaluate(
    evaluate.create_eval_step(experiment, layout),
    layout.put([state]),
    split,
    batch_size,
    layout,
  )
  assert scores.ensemble is None
  (of_network,) = scores.networks
  assert of_network.keys() == expected.keys()
  for name, value in expected.items():
    assert of_network[name] == pytest.approx(float(value), rel=1e-5)


def test_a_lost_image_is_noticed(scored):
  experiment, state, split, _ = scored
  layout = layout_of(1)
  step = evaluate.create_eval_step(experiment, layout)

  def losing(state, images, labels, mask):
    return step(state, images, labels, mask.at[0].set(False))

  with pytest.raises(AssertionError, match="scored 20 of 21 images"):
    evaluate.evaluate(losing, layout.put([state]), split, 100, layout)


def test_the_real_test_split_is_counted_whole(cifar_data_dir):
  config = base.get_config()
  config.dataset.data_dir = cifar_data_dir
  split = data.load(config.dataset).test
  batches = evaluate.padded_batches(split, 128, np.arange(128))
  assert sum(mask.sum() for _, _, mask in batches) == 10_000


def test_evaluation_compiles_once(scored, monkeypatch):
  experiment, state, split, _ = scored
  traced, eval_step = [], step_lib.eval_step

  def counting(*arguments):
    traced.append(1)
    return eval_step(*arguments)

  monkeypatch.setattr(step_lib, "eval_step", counting)
  layout = layout_of(1)
  step = evaluate.create_eval_step(experiment, layout)
  evaluate.evaluate(step, layout.put([state]), split, 8, layout)
  assert len(traced) == 1


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_ensemble_averages_probabilities(scored, num_devices):
  experiment, state, split, expected = scored
  # So that the head of the second one prefers other classes.
  head = state.params["head"] | {"bias": jnp.linspace(-2, 2, 10)}
  other = state.replace(params=state.params | {"head": head})
  layout = layout_of(num_devices, num_seeds=3)
  states = [state, other, state]
  scores = evaluate.evaluate(
    evaluate.create_eval_step(experiment, layout),
    layout.put(states),
    split,
    5,
    layout,
  )
  for name, value in expected.items():
    assert scores.networks[0][name] == pytest.approx(float(value), rel=1e-5)
  assert scores.networks[2] == scores.networks[0]
  assert scores.networks[1] != scores.networks[0]
  apply = jax.jit(functools.partial(step_lib.apply_eval, experiment.model))
  logits = [apply(each, jnp.asarray(split.images)) for each in states]
  mean = np.mean([jax.nn.softmax(each) for each in logits], axis=0)
  chosen = mean[np.arange(len(split)), split.labels]
  assert scores.ensemble["loss"] == pytest.approx(
    -np.log(chosen).mean(), rel=1e-5
  )
  assert scores.ensemble["accuracy"] == pytest.approx(
    np.mean(mean.argmax(-1) == split.labels)
  )
