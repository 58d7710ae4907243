"""Several networks trained in one program."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_flax import data as datasets, experiment as experiment_lib, train
from resnet_flax.parallel import (
  calls as calls_lib,
  epochs,
  mesh as mesh_lib,
  networks as seeds,
)
from resnet_flax.run import checkpoint, errors, load as inference, metrics


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "groups"),
  [
    (1, 1, 1),
    (1, 5, 1),
    (8, 1, 1),
    (8, 2, 2),
    (8, 3, 4),
    (8, 5, 8),
    (8, 30, 8),
    (6, 2, 2),
    (6, 4, 6),
    (7, 2, 7),
  ],
)
def test_groups_of_devices(num_devices, num_seeds, groups):
  assert mesh_lib.num_groups(num_devices, num_seeds) == groups


def layout_of(config, num_devices, num_seeds, execution="in_turn"):
  config = ConfigDict(config.to_dict() | {"num_seeds": num_seeds})
  return seeds.Layout.create(config, jax.devices()[:num_devices], execution)


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution", "calls", "per_call"),
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
  tiny_config, num_devices, num_seeds, execution, calls, per_call
):
  layout = layout_of(tiny_config, num_devices, num_seeds, execution)
  assert (layout.num_calls, layout.per_call) == (calls, per_call)
  trees = [
    {"a": np.full((2, 3), seed), "key": jax.random.key(seed)}
    for seed in range(num_seeds)
  ]
  got = layout.get(layout.put(trees))
  assert len(got) == num_seeds
  for tree, other in zip(trees, got, strict=True):
    np.testing.assert_array_equal(tree["a"], other["a"])
    assert (
      jax.random.key_data(tree["key"]) == jax.random.key_data(other["key"])
    ).all()


def test_networks_share_no_memory(tiny_config):
  """A step that takes one's state away leaves the others'."""
  layout = layout_of(tiny_config, 1, 2)
  same = jnp.arange(5.0)
  first, second = layout.put([same, same]).calls
  jax.jit(lambda x: x + 1, donate_argnums=0)(first).block_until_ready()
  np.testing.assert_array_equal(second, same)
  np.testing.assert_array_equal(same, np.arange(5.0))


@pytest.fixture(scope="module")
def config(make_tiny_config, tmp_path_factory):
  config = make_tiny_config(tmp_path_factory.mktemp("cache"))
  config.seed = 4
  config.seed_execution = "in_turn"
  return config


@pytest.fixture(scope="module")
def alone(config):
  """A function of the seed: the losses of five steps, and the state then."""
  dataset = datasets.load(config.dataset)
  experiment = experiment_lib.build(config)
  compiled = []

  @functools.cache
  def run(seed):
    mesh = mesh_lib.create_mesh(jax.devices()[:1])
    layout = seeds.Layout((seed,), mesh, per_call=1)
    return steps(config, experiment, dataset.train, layout, compiled)

  return run


def steps(config, experiment, split, layout, compiled=None):
  """The losses of each of five steps and the state then, for each seed."""
  state = train.initial_state(config, experiment, split, layout)
  key = train.augmentation_key(layout)
  compiled = [] if compiled is None else compiled
  if not compiled:
    compiled.append(
      calls_lib.compile_train_step(
        experiment, state, config.batch_size, key, layout
      )
    )
  batches = epochs.all_batches(split, config.batch_size, layout)
  losses = []
  for batch in itertools.islice(batches, 5):
    state, step_metrics = compiled[0](state, *batch, key)
    of_seeds = layout.get(step_metrics)
    losses.append([float(each.sums.loss) for each in of_seeds])
  return np.transpose(losses), layout.get(state)


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution", "exact"),
  [
    (1, 3, "in_turn", True),
    (2, 3, "in_turn", True),
    (8, 3, "in_turn", False),
    (1, 3, "vectorized", False),
  ],
)
def test_each_seed_is_what_it_is_alone(
  config, alone, num_devices, num_seeds, execution, exact
):
  """Padded, too: two devices share three seeds."""
  dataset = datasets.load(config.dataset)
  layout = layout_of(config, num_devices, num_seeds, execution)
  losses, states = steps(
    config, experiment_lib.build(config), dataset.train, layout
  )
  assert layout.seeds == (4, 5, 6)
  for place, seed in enumerate(layout.seeds):
    expected_losses, (expected,) = alone(seed)
    if exact:
      jax.tree.map(np.testing.assert_array_equal, states[place], expected)
      np.testing.assert_array_equal(losses[place], expected_losses[0])
    else:
      # The first step rounds differently; the following ones start from there.
      np.testing.assert_allclose(losses[place, 0], expected_losses[0, 0], 1e-5)
      np.testing.assert_allclose(losses[place], expected_losses[0], 1e-3)


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
def run(two_seeds, tmp_path_factory):
  """Trains two seeds; the second start uses the first one's programs."""
  programs = {}

  def remember(patch, module, name):
    function = getattr(module, name)

    def remembering(*arguments):
      key = (name, arguments[-1])
      if key not in programs:
        programs[key] = function(*arguments)
      return programs[key]

    patch.setattr(module, name, remembering)

  def train_it(workdir, config=two_seeds, num_devices=1):
    with pytest.MonkeyPatch.context() as patch:
      remember(patch, calls_lib, "compile_train_step")
      remember(patch, train.evaluate, "jit_eval_step")
      return train.train_and_evaluate(
        config, workdir, devices=jax.devices()[:num_devices]
      )

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
  assert metrics.untimed(single) == [
    {key: value for key, value in record.items() if key != "seed"}
    for record in metrics.untimed(of_seed)
  ]
  for which in inference.CHECKPOINTS:
    one = inference.load_model(tmp_path / "run", which)
    of_two = inference.load_model(workdir, which, seed=5)
    assert (of_two.seed, of_two.step) == (one.seed, one.step)
    jax.tree.map(np.testing.assert_array_equal, of_two.variables, one.variables)
  # What one run holds is not mixed up with the other.
  with pytest.raises(errors.WorkdirError, match=r"num_seeds \(1 there, 2 here"):
    train.train_and_evaluate(two_seeds, tmp_path / "run", devices=one_device)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_scores_of_a_workdir(finished, num_devices):
  workdir, records = finished
  devices = jax.devices()[:num_devices]
  scores = inference.evaluate_workdir(workdir, "latest", devices=devices)
  last = records[-1]
  assert scores["accuracy"] == pytest.approx(last["test_accuracy"])
  assert scores["accuracy_std"] == pytest.approx(last["test_accuracy_std"])
  assert scores["ensemble_loss"] == pytest.approx(last["test_ensemble_loss"])
  assert [each["step"] for each in scores["seeds"]] == [8, 8]
  best = inference.evaluate_workdir(workdir, "best", devices=devices)
  for each, record in zip(
    best["seeds"], metrics.best_records(records, "accuracy"), strict=True
  ):
    assert (each["seed"], each["step"]) == (record["seed"], record["step"])
    assert each["accuracy"] == pytest.approx(record["test_accuracy"])


def test_a_seed_that_was_not_trained_is_named(finished):
  workdir, _ = finished
  assert inference.load_model(workdir).seed == 4
  with pytest.raises(errors.ConfigError, match=r"seed=6 .* from 4 to 5"):
    inference.load_model(workdir, seed=6)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_goes_on_to_the_same_bits(
  finished, two_seeds, run, tmp_path, monkeypatch, num_devices
):
  """Also on two devices, one for each seed; on four for each it rounds."""
  workdir, records = finished
  config = ConfigDict(two_seeds.to_dict())
  config.checkpoint.every_steps = 3
  save = checkpoint.Checkpoints.save

  def die(self, state, notes):
    save(self, state, notes)
    if state.step[0] == 6:
      raise RuntimeError("killed")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", die)
    with pytest.raises(RuntimeError, match="killed"):
      run(tmp_path / "run", config)
  resumed = run(tmp_path / "run", config, num_devices)
  if num_devices == 8:
    for ours, theirs in zip(resumed, records, strict=True):
      assert ours["step"] == theirs["step"]
      assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)
    return
  assert metrics.untimed(resumed) == metrics.untimed(records)
  for seed in (4, 5):
    jax.tree.map(
      np.testing.assert_array_equal,
      inference.load_model(workdir, "latest", seed=seed).variables,
      inference.load_model(tmp_path / "run", "latest", seed=seed).variables,
    )


def test_the_best_epoch_of_each_seed_is_kept(
  two_seeds, run, tmp_path, monkeypatch
):
  config = ConfigDict(two_seeds.to_dict())
  config.num_epochs = 5

  def scripted(eval_step, state, *arguments, **keywords):
    """The first seed is best after epoch 1, the second after epoch 0."""
    epoch = int(state.step) // 4 - 1
    return train.evaluate.Scores(
      [
        {"loss": 1.0, "objective": 1.0, "accuracy": -abs(epoch - best)}
        for best in (1, 0)
      ],
      {"loss": 1.0, "accuracy": 0.5},
    )

  monkeypatch.setattr(train.evaluate, "evaluate", scripted)
  run(tmp_path / "run", config)
  with checkpoint.Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
    assert checkpoints.steps() == [4, 8, 16, 20]
  assert inference.load_model(tmp_path / "run", seed=4).step == 8
  assert inference.load_model(tmp_path / "run", seed=5).step == 4


def test_a_seed_that_diverges_is_named(two_seeds, tmp_path, run, monkeypatch):
  read = train.seeds_lib.Layout.get

  def diverging(self, networks):
    of_seeds = read(self, networks)
    if isinstance(of_seeds[0], train.train_step.StepMetrics):
      of_seeds[1] = of_seeds[1].replace(finite=np.asarray(False))
    return of_seeds

  monkeypatch.setattr(train.seeds_lib.Layout, "get", diverging)
  with pytest.raises(
    errors.NonFiniteError, match="of seed 5 is not finite after step 0"
  ) as caught:
    run(tmp_path / "run", two_seeds)
  assert caught.value.seed == 5
  assert '"seed": 5' in (tmp_path / "run/nonfinite_step.json").read_text()


@pytest.mark.parametrize("faster", ["in_turn", "vectorized"])
def test_the_faster_execution_is_taken(
  two_seeds, monkeypatch, caplog, one_device, faster
):
  """Two seeds are two calls in turn, one if vectorised."""
  caplog.set_level(logging.INFO)
  now = [0.0]
  seconds = {"in_turn": 1.0, "vectorized": 1.5 if faster == "vectorized" else 3}

  def compile_train_step(experiment, state, batch_size, key, layout):
    name = "vectorized" if layout.is_stacked else "in_turn"

    def step(state, images, labels, key):
      now[0] += seconds[name] * layout.num_calls
      return state, None

    return step

  monkeypatch.setattr(calls_lib, "compile_train_step", compile_train_step)
  monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
  chosen = train.faster_execution(
    two_seeds,
    experiment_lib.build(two_seeds),
    datasets.load(two_seeds.dataset).train,
    one_device,
  )
  assert chosen == faster
  assert "2 seeds take 2.0000 s a step in turn" in caplog.text
