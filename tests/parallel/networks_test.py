"""Several networks trained in one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_flax import step as step_lib, train
from resnet_flax.parallel import evaluate, networks, program
from resnet_flax.run import errors, experiment as experiment_lib, load, metrics
from tests.helpers import (
  Programs,
  assert_identical,
  at_event,
  changed,
  die,
  initial,
  layout_of,
  run_steps,
  saved_steps,
  untimed,
)

slow = pytest.mark.slow


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution", "chunks", "chunk_size"),
  [
    (1, 1, "in_turn", 1, 1),
    (1, 3, "in_turn", 3, 1),
    (1, 3, "vectorized", 1, 3),
    (2, 1, "in_turn", 1, 1),
    (2, 3, "in_turn", 2, 2),
    (2, 3, "vectorized", 1, 4),
    (8, 3, "in_turn", 1, 4),
    (8, 20, "in_turn", 3, 8),
  ],
)
def test_what_is_put_is_got(
  tiny_config, num_devices, num_seeds, execution, chunks, chunk_size
):
  layout = layout_of(tiny_config, num_devices, num_seeds, execution)
  assert layout.chunk_size == chunk_size
  trees = [
    {"a": np.full((2, 3), seed), "key": jax.random.key(seed)}
    for seed in range(num_seeds)
  ]
  put = layout.put(trees)
  assert len(put.chunks) == chunks
  got = layout.get(put)
  assert len(got) == num_seeds
  for tree, other in zip(trees, got, strict=True):
    np.testing.assert_array_equal(tree["a"], other["a"])
    assert (
      jax.random.key_data(tree["key"]) == jax.random.key_data(other["key"])
    ).all()


def test_networks_share_no_memory(tiny_config):
  """A step that donates one network's state leaves the other states."""
  layout = layout_of(tiny_config, 1, 2)
  same = jnp.arange(5.0)
  first, second = layout.put([same, same]).chunks
  jax.jit(lambda x: x + 1, donate_argnums=0)(first).block_until_ready()
  np.testing.assert_array_equal(second, same)
  np.testing.assert_array_equal(same, np.arange(5.0))


@pytest.fixture(scope="module")
def config(make_tiny_config, tmp_path_factory):
  config = make_tiny_config(tmp_path_factory.mktemp("cache"))
  config.seed = 4
  config.seed_execution = "in_turn"
  return config


def five_steps(config, layout, compiled=None):
  """The losses of each of five steps and the state then, for each seed."""
  experiment, split, state, key = initial(config, layout)
  with pytest.MonkeyPatch.context() as patch:
    if compiled is not None:
      patch.setattr(program, "compile_function", lambda *_, **__: compiled)
    training = program.create(config, experiment, state, split, key, layout)
  state, found = run_steps(training, state, [0, 1], layout, 5)
  losses = [
    [float(each.sums["loss"]) for each in of_seeds] for of_seeds in found
  ]
  return np.transpose(losses), layout.get(state)


@pytest.fixture(scope="module")
def alone(config):
  """A function of the seed: the losses of five steps, and the state then."""

  layout = layout_of(config)
  experiment, split, state, key = initial(config, layout)
  training = program.create(config, experiment, state, split, key, layout)

  @functools.cache
  def run(seed):
    layout = layout_of(changed(config, seed=seed))
    return five_steps(config, layout, training.compiled)

  return run


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution", "exact"),
  [
    pytest.param(1, 3, "in_turn", True, marks=slow),
    (2, 3, "in_turn", True),
    pytest.param(8, 3, "in_turn", False, marks=slow),
    (1, 3, "vectorized", False),
  ],
)
def test_each_seed_is_what_it_is_alone(
  config, alone, num_devices, num_seeds, execution, exact
):
  """Padded, too: two devices share three seeds."""
  layout = layout_of(config, num_devices, num_seeds, execution)
  losses, states = five_steps(config, layout)
  assert layout.seeds == (4, 5, 6)
  for k, seed in enumerate(layout.seeds):
    expected_losses, (expected,) = alone(seed)
    if exact:
      assert_identical(states[k], expected)
      np.testing.assert_array_equal(losses[k], expected_losses[0])
    else:
      # The first step rounds differently; the following ones start from there.
      np.testing.assert_allclose(losses[k, 0], expected_losses[0, 0], 1e-5)
      np.testing.assert_allclose(losses[k], expected_losses[0], 1e-3)


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution"),
  [(2, 1, "in_turn"), (2, 3, "in_turn"), (1, 3, "vectorized")],
)
def test_shapes_are_those_of_what_is_put(
  config, num_devices, num_seeds, execution
):
  """Of everything that makes a program: dtypes and shardings, too."""
  layout = layout_of(config, num_devices, num_seeds, execution)
  one = experiment_lib.abstract_state(
    ConfigDict(config.to_dict() | {"num_seeds": 1}),
    experiment_lib.build(config),
  )
  tree = one, jax.eval_shape(lambda: jax.random.key(0))
  put = layout.put(
    [
      jax.tree.map(jnp.zeros_like, (one, jax.random.key(seed)))
      for seed in layout.seeds
    ]
  )
  jax.tree.map(
    lambda shape, array: (
      (
        (shape.shape, shape.dtype, shape.sharding)
        == (array.shape, array.dtype, array.sharding)
      )
      or pytest.fail(f"{shape} is not {array.aval} on {array.sharding}")
    ),
    layout.shapes(tree),
    put,
  )


@pytest.fixture(scope="module")
def two_seeds(config):
  return ConfigDict(config.to_dict() | {"num_seeds": 2})


@pytest.fixture(scope="module")
def run(two_seeds):
  """Trains two seeds; later starts use the first one's programs."""
  programs = Programs()

  def train_it(workdir, config=two_seeds, num_devices=1, **arguments):
    devices = jax.devices()[:num_devices]
    return programs.train(config, workdir, devices=devices, **arguments)

  return train_it


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two") / "run"
  return workdir, run(workdir)


def test_records_have_each_seed_and_their_mean(finished, two_seeds, tmp_path):
  workdir, records = finished
  assert metrics.MetricsLog(workdir).read() == records
  for record in records:
    assert [each["seed"] for each in record["seeds"]] == [4, 5]
    for key in ("train_loss", "test_loss", "test_accuracy", "test_objective"):
      values = [each[key] for each in record["seeds"]]
      assert record[key] == pytest.approx(np.mean(values))
      assert record[f"{key}_std"] == pytest.approx(np.std(values, ddof=1))
    assert 0 <= record["test_ensemble_accuracy"] <= 1
    # Of all images of both.
    assert record["images_per_second"] * record[
      "epoch_seconds"
    ] == pytest.approx(64)


def test_a_seed_of_a_run_is_the_run_of_that_seed(
  finished, two_seeds, tmp_path, one_device
):
  workdir, records = finished
  config = ConfigDict(two_seeds.to_dict() | {"num_seeds": 1, "seed": 5})
  single = train.train_and_evaluate(
    config, tmp_path / "run", devices=one_device
  )
  of_seed = [metrics.of_seeds(record)[1] for record in records]
  assert untimed(single) == [
    {key: value for key, value in record.items() if key != "seed"}
    for record in untimed(of_seed)
  ]
  for which in load.CHECKPOINTS:
    one = load.load_model(tmp_path / "run", which)
    of_two = load.load_model(workdir, which, seed=5)
    assert (of_two.seed, of_two.step) == (one.seed, one.step)
    jax.tree.map(np.testing.assert_array_equal, of_two.variables, one.variables)
  # What one run holds is not mixed up with the other.
  with pytest.raises(errors.WorkdirError, match=r"num_seeds \(1 there, 2 here"):
    train.train_and_evaluate(two_seeds, tmp_path / "run", devices=one_device)


@pytest.mark.parametrize("num_devices", [2, pytest.param(8, marks=slow)])
def test_scores_of_a_workdir(finished, num_devices):
  workdir, records = finished
  devices = jax.devices()[:num_devices]
  scores = load.evaluate_workdir(workdir, "latest", devices=devices)
  last = records[-1]
  assert scores["accuracy"] == pytest.approx(last["test_accuracy"])
  assert scores["accuracy_std"] == pytest.approx(last["test_accuracy_std"])
  assert scores["ensemble_loss"] == pytest.approx(last["test_ensemble_loss"])
  assert [each["step"] for each in scores["seeds"]] == [8, 8]
  best = load.evaluate_workdir(workdir, "best", devices=devices)
  for each, record in zip(
    best["seeds"], metrics.best_records(records, "accuracy"), strict=True
  ):
    assert (each["seed"], each["step"]) == (record["seed"], record["step"])
    assert each["accuracy"] == pytest.approx(record["test_accuracy"])


def test_a_seed_that_was_not_trained_is_named(finished):
  workdir, _ = finished
  assert load.load_model(workdir).seed == 4
  with pytest.raises(errors.ConfigError, match=r"seed=6 .* from 4 to 5"):
    load.load_model(workdir, seed=6)


@pytest.mark.parametrize("num_devices", [2, pytest.param(8, marks=slow)])
def test_resumes_bit_identically(
  finished, two_seeds, run, tmp_path, num_devices
):
  """Also on two devices, one for each seed; on four for each, sums differ."""
  workdir, records = finished
  config = ConfigDict(two_seeds.to_dict())
  config.checkpoint.every_steps = 3
  with pytest.raises(SystemExit):
    run(tmp_path / "run", config, on_event=at_event("step", 7, die))
  assert saved_steps(tmp_path / "run")[-1] == 6
  resumed = run(tmp_path / "run", config, num_devices)
  if num_devices == 8:
    for ours, theirs in zip(resumed, records, strict=True):
      assert ours["step"] == theirs["step"]
      assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)
    return
  assert untimed(resumed) == untimed(records)
  for seed in (4, 5):
    assert_identical(
      load.load_model(workdir, "latest", seed=seed).variables,
      load.load_model(tmp_path / "run", "latest", seed=seed).variables,
    )


def test_the_best_epoch_of_each_seed_is_kept(
  two_seeds, run, tmp_path, monkeypatch
):
  config = ConfigDict(two_seeds.to_dict())
  config.num_epochs = 5

  def scripted(eval_step, state, *arguments, **keywords):
    """The first seed is best after epoch 1, the second after epoch 0."""
    epoch = state.step // 4 - 1
    return evaluate.Scores(
      [
        {"loss": 1.0, "objective": 1.0, "accuracy": -abs(epoch - best)}
        for best in (1, 0)
      ],
      {"loss": 1.0, "accuracy": 0.5},
    )

  monkeypatch.setattr(evaluate, "evaluate", scripted)
  run(tmp_path / "run", config)
  assert saved_steps(tmp_path / "run") == [4, 8, 16, 20]
  assert load.load_model(tmp_path / "run", seed=4).step == 8
  assert load.load_model(tmp_path / "run", seed=5).step == 4


def test_a_seed_that_diverges_is_named(two_seeds, tmp_path, run, monkeypatch):
  read = networks.Layout.get

  def diverging(self, trees):
    of_seeds = read(self, trees)
    if isinstance(of_seeds[0], step_lib.StepMetrics):
      of_seeds[1] = of_seeds[1].replace(finite=np.asarray(False))
    return of_seeds

  monkeypatch.setattr(networks.Layout, "get", diverging)
  with pytest.raises(
    errors.NonFiniteError, match="of seed 5 is not finite after step 0"
  ):
    run(tmp_path / "run", two_seeds)
  assert '"seed": 5' in (tmp_path / "run/nonfinite_step.json").read_text()
