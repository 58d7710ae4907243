"""Averaged weights: against NumPy, over kills, devices, seeds and commands."""

import functools

import jax
import numpy as np
import pytest

from resnet_flax import train
from resnet_flax.parallel import many_steps
from resnet_flax.run import errors, load, metrics
from resnet_flax.tools import comparison
from resnet_flax.tools.export import command as export
from resnet_flax.tools.report import report
from tests.helpers import (
  Programs,
  assert_identical,
  assert_same_run,
  at_event,
  changed,
  die,
  initial,
  layout_of,
  restore,
  untimed,
)

slow = pytest.mark.slow
NUM_EPOCHS = 3


@pytest.fixture(scope="module")
def programs():
  return Programs()


@pytest.fixture(scope="module")
def config_of(make_tiny_config, tmp_path_factory):
  """A function of the average, '' for none: 3 epochs of 4 steps."""
  cache = tmp_path_factory.mktemp("cache")

  def make(kind, **values):
    config = changed(make_tiny_config(cache), num_epochs=NUM_EPOCHS, **values)
    config.checkpoint.every_steps = 3
    if kind == "ema":
      config.ema.decay = 0.5
    if kind == "swa":
      config.swa.start_epoch = 1
    return config

  return make


@pytest.fixture(scope="module")
def straight(config_of, tmp_path_factory, programs):
  """A function of the average and of devices: a run's workdir."""

  @functools.cache
  def run(kind, num_devices=1):
    workdir = tmp_path_factory.mktemp(f"{kind}{num_devices}")
    devices = jax.devices()[:num_devices]
    programs.train(config_of(kind), workdir, devices=devices)
    return workdir

  return run


def assert_close(one, other):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-7),
    *(one, other),
  )


def states_of(config, layout, steps_per_call=1):
  """For each seed its states, the first one and those after each call."""
  experiment, split, state, key = initial(config, layout)
  training = many_steps.create(
    *(config, experiment, state, split, key, layout),
    steps_per_call=steps_per_call,
  )
  found = [layout.get(state)]
  for epoch in range(NUM_EPOCHS):
    for batch in training.batches(epoch, 0):
      state, _ = training.step(state, batch)
      found.append(layout.get(state))
  return [*zip(*found, strict=True)]


def in_numpy(kind, states):
  """The average after each step, in float64."""
  average, found = states[0].variables, []
  for n, state in enumerate(states[1:]):
    if kind == "ema":
      keep = min(0.5, (1 + n) / (10 + n))
      average = jax.tree.map(
        lambda old, new, keep=keep: keep * np.float64(old) + (1 - keep) * new,
        *(average, state.variables),
      )
    if kind == "swa" and n in (7, 11):  # The ends of epochs 1 and 2.
      ends = [states[k].variables for k in (8, 12)[: 1 + n // 11]]
      average = jax.tree.map(lambda *x: np.mean(x, 0, np.float64), *ends)
    found.append(average)
  return found


@pytest.mark.parametrize(
  ("execution", "scan"),
  [("in_turn", False), pytest.param("vectorized", True, marks=slow)],
)
@pytest.mark.parametrize("kind", ["ema", pytest.param("swa", marks=slow)])
def test_the_average_is_that_of_a_loop_in_numpy(
  config_of, kind, execution, scan
):
  config = config_of(kind, num_seeds=2)
  config.model.scan = scan
  for states in states_of(config, layout_of(config, 1, 2, execution)):
    expected = in_numpy(kind, states)
    for state, average in zip(states[1:], expected, strict=True):
      assert_close(state.average, average)


@slow
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_several_steps_in_one_call(config_of, kind):
  """The result is bit-identical, wherever calls end."""
  config = config_of(kind)
  config.checkpoint.every_steps = 0
  layout = layout_of(config)
  (of_epochs,) = states_of(config, layout, steps_per_call=4)
  ((*_, cut),) = states_of(config, layout, steps_per_call=3)
  assert_identical(of_epochs[-1], cut)
  if kind == "swa":
    _, _, first, last = of_epochs
    ends = first.variables, last.variables
    mean = jax.tree.map(lambda *x: np.mean(x, 0, np.float64), *ends)
    assert_close(last.average, mean)


@pytest.mark.parametrize(
  ("kind", "num_devices"), [("ema", 1), pytest.param("swa", 8, marks=slow)]
)
def test_training_is_the_same_with_and_without(
  config_of, straight, kind, num_devices
):
  """The raw weights and their records are bit-identical."""
  workdir, without = straight(kind, num_devices), straight("", num_devices)
  records = metrics.MetricsLog(workdir).read()
  raw = [{k: v for k, v in r.items() if f"_{kind}_" not in k} for r in records]
  assert untimed(raw) == untimed(metrics.MetricsLog(without).read())
  scored = [f"test_{kind}_accuracy" in record for record in records]
  assert scored == [kind == "ema", True, True]
  state = restore(config_of(kind), workdir)
  assert state.average is not None
  state = state.replace(average=None)
  assert_identical(state, restore(config_of(""), without))


@pytest.mark.parametrize(
  ("kind", "num_devices", "event", "count"),
  [
    ("ema", 1, "step", 6),
    pytest.param("swa", 1, "record", 3, marks=slow),
    pytest.param("ema", 8, "record", 2, marks=slow),
    pytest.param("swa", 8, "step", 11, marks=slow),
  ],
)
def test_a_run_that_died_resumes_bit_identically(
  config_of, straight, programs, tmp_path, kind, num_devices, event, count
):
  config = config_of(kind)
  run = functools.partial(
    programs.train, config, tmp_path, devices=jax.devices()[:num_devices]
  )
  with pytest.raises(SystemExit):
    run(on_event=at_event(event, count, die))
  run()
  assert_same_run(config, tmp_path, straight(kind, num_devices))


@pytest.mark.parametrize("kind", ["ema", pytest.param("swa", marks=slow)])
def test_both_weights_are_loaded_and_scored(config_of, straight, kind):
  workdir = straight(kind)
  record = metrics.MetricsLog(workdir).read()[-1]
  state = restore(config_of(kind), workdir)
  for weights, of in (("raw", ""), (kind, f"{kind}_")):
    loaded = load.load_model(workdir, "latest", weights=weights)
    kept = state.variables if weights == "raw" else state.average
    assert_identical(loaded.variables, kept)
    assert loaded.weights == weights
    scores = load.evaluate_workdir(
      workdir, "latest", weights, devices=jax.devices()[:1]
    )
    for name in ("loss", "accuracy"):
      assert scores[name] == record[f"test_{of}{name}"]
    found = load.predict_test(workdir, 0, "latest", weights, opened={})
    right = found.probabilities.argmax(1) == found.labels
    assert right.mean() == pytest.approx(record[f"test_{of}accuracy"])


@pytest.mark.parametrize(
  ("kind", "weights", "there"),
  [("", "ema", "raw"), ("ema", "swa", "raw and ema"), ("swa", "ema", "raw")],
)
def test_weights_that_were_not_kept(straight, kind, weights, there):
  with pytest.raises(errors.WorkdirError, match=f"{weights}.* has {there}"):
    load.load_model(straight(kind), "latest", weights=weights)


def test_an_epoch_from_before_the_first_average(
  config_of, tmp_path, programs, one_device
):
  with pytest.raises(SystemExit):
    programs.train(
      *(config_of("swa"), tmp_path),
      devices=one_device,
      on_event=at_event("step", 6, die),
    )
  message = r"weights=swa at step \d.*begins after epoch 1.*--checkpoint=latest"
  with pytest.raises(errors.WorkdirError, match=message):
    load.load_model(tmp_path, weights="swa")
  with pytest.raises(errors.WorkdirError, match=r"begins after epoch 1\.$"):
    load.load_model(tmp_path, "latest", weights="swa")


@slow
def test_seeds_are_averaged_as_alone(config_of, tmp_path, one_device):
  config = config_of("ema", num_seeds=2)
  train.train_and_evaluate(config, tmp_path / "two", devices=one_device)
  alone = config_of("ema", seed=1)
  train.train_and_evaluate(alone, tmp_path / "one", devices=one_device)
  one, of_two = (
    load.load_model(tmp_path / name, "latest", seed=1, weights="ema").variables
    for name in ("one", "two")
  )
  assert_identical(one, of_two)
  record = metrics.MetricsLog(tmp_path / "two").read()[-1]
  assert {"test_ema_ensemble_loss", "test_ema_loss_std"} < record.keys()


@slow
def test_a_run_from_other_weights_begins_its_average_with_them(
  config_of, straight, tmp_path, one_device
):
  config = config_of("ema", init_from=str(straight("ema")))
  with pytest.raises(SystemExit):
    train.train_and_evaluate(
      *(config, tmp_path),
      devices=one_device,
      on_event=at_event("step", 1, die),
    )
  average = load.load_model(tmp_path, "latest", weights="ema")
  assert average.step == 0
  best = load.load_model(straight("ema"))
  assert_identical(average.variables, best.variables)


@slow
def test_the_average_in_the_tools(straight, tmp_path):
  workdir = straight("ema")
  record = metrics.MetricsLog(workdir).read()[-1]
  report.make([workdir], tmp_path / "report", "none")
  assert (tmp_path / "report/figures/learning_curves_ema_accuracy.png").exists()
  table = comparison.compare(
    [workdir], [straight("ema", 8)], "ema_accuracy", "last", images=True
  )[0].to_csv()
  accuracy = 100 * record["test_ema_accuracy"]
  assert abs(accuracy - 100 * record["test_accuracy"]) > 0.1
  for row in ("test_ema_accuracy (%)", "test images, right (%)"):
    (line,) = [line for line in table.splitlines() if row in line]
    assert f'",{str(accuracy)[:6]}' in line
  out = tmp_path / "out"
  export.export(workdir, out, "safetensors", which="latest", weights="ema")
  assert (
    f"{record['test_ema_accuracy']:.2%} on 360"
    in (out / "README.md").read_text()
  )
