import itertools
import json
import math
import os

import pytest

from resnet_flax.run import errors
from resnet_flax.tools.report import runs
from tests.tools.report import workdirs


def read(*folders):
  return runs.read(runs.find(folders))


def groups_of(*folders):
  return runs.group(read(*folders))


def test_statistic():
  assert runs.Statistic.of([0.5]) == runs.Statistic(0.5, None, 1)
  statistic = runs.Statistic.of([1.0, 2.0, 3.0, 6.0])
  assert (statistic.mean, statistic.n) == (3.0, 4)
  # Of the sample: the sum of squares is 14, divided by 3.
  assert statistic.std == pytest.approx((14 / 3) ** 0.5)


def test_find_is_recursive_and_in_order(tmp_path):
  for name in ("b/one", "a", "b/deep/er/two", ".converting-x/workdir"):
    workdirs.write(tmp_path / name)
  # What a workdir holds is its own.
  workdirs.write(tmp_path / "a" / "damaged" / "copy")
  expected = [tmp_path / "a", tmp_path / "b/deep/er/two", tmp_path / "b/one"]
  assert runs.find([tmp_path]) == expected
  # Each once, however it is reached.
  (tmp_path / "link").symlink_to(tmp_path / "b" / "one")
  again = [tmp_path / "link", tmp_path, tmp_path / "a"]
  assert runs.find(again) == [tmp_path / "link", *expected[:2]]
  assert [run.name for run in read(tmp_path)] == ["a", "b/deep/er/two", "b/one"]


def test_name_of_a_single_run(tmp_path):
  workdirs.write(tmp_path / "run")
  (run,) = read(tmp_path / "run")
  assert run.name == "run"


def test_folder_without_a_run(tmp_path):
  workdirs.write(tmp_path / "run")
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.WorkdirError, match=r"empty contains no run"):
    runs.find([tmp_path, tmp_path / "empty"])
  with pytest.raises(
    errors.WorkdirError, match="missing cannot be read: No such"
  ):
    runs.find([tmp_path / "missing"])


def test_name_that_is_no_text(tmp_path):
  folder = tmp_path / os.fsdecode(b"\xff\n<b>")
  workdirs.write(folder)
  workdirs.write(tmp_path / "other")
  names = [run.name for run in read(tmp_path)]
  assert names == ["other", r"\udcff\n<b>"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "config.json cannot be read"),
    ("[]", "a JSON object"),
    ("{}", "seed must be an integer"),
    ('{"seed": null}', "seed must be an integer"),
    ('{"seed": 0, "num_seeds": "2"}', "num_seeds='2' must be an integer"),
    (
      '{"seed": 0, "eval_every_epochs": null}',
      "eval_every_epochs=None must be",
    ),
    (
      '{"seed": 0, "checkpoint": {"monitor": "x"}}',
      "monitor='x' must be accuracy",
    ),
  ],
)
def test_damaged_config(tmp_path, text, message):
  workdirs.write(tmp_path / "run")
  (tmp_path / "run" / "config.json").write_text(text)
  with pytest.raises(errors.WorkdirError, match=message) as caught:
    read(tmp_path)
  assert str(tmp_path / "run" / "config.json") in str(caught.value)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "a JSON object"),
    ("[]", "a JSON object"),
    (json.dumps(workdirs.make_record(2, 0.5)), "epoch=2 and step=300, not 1"),
    (json.dumps(workdirs.make_record(1, float("nan"))), "train_loss=nan"),
    (json.dumps(workdirs.make_record(1, 1.0, epoch_seconds=0)), "seconds=0"),
    (json.dumps(workdirs.make_record(1, 1.0, step=100)), "step=100, not 1 and"),
    (json.dumps(workdirs.make_record(1, 1.0, test_loss="1")), "test_loss='1'"),
    (json.dumps(workdirs.make_record(1, 1.0, step=None)), "step=None"),
  ],
)
def test_damaged_record(tmp_path, line, message):
  workdirs.write(tmp_path / "run")
  path = tmp_path / "run" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
  with pytest.raises(errors.WorkdirError, match=message) as caught:
    read(tmp_path)
  assert f"{path}, line 2: " in str(caught.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seeds": None}, "seeds must be a list"),
    ({"seeds": []}, r"the seeds \[\], not \[5, 6\]"),
    ({"seeds": ["a", "b"]}, "a JSON object"),
    ({"seeds": [{"seed": 5}, {"seed": 6}]}, "train_loss=None"),
  ],
)
def test_damaged_record_of_seeds(tmp_path, change, message):
  workdirs.write(tmp_path / "run", [[0.5, 0.6]], seed=5, num_seeds=2)
  path = tmp_path / "run" / "metrics.jsonl"
  path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
  with pytest.raises(errors.WorkdirError, match=message):
    read(tmp_path)


def test_seeds_of_another_order(tmp_path):
  workdirs.write(tmp_path / "run", [[0.5, 0.6]], seed=5, num_seeds=2)
  path = tmp_path / "run" / "metrics.jsonl"
  record = json.loads(path.read_text())
  record["seeds"].reverse()
  path.write_text(json.dumps(record) + "\n")
  with pytest.raises(errors.WorkdirError, match=r"seeds \[6, 5\], not"):
    read(tmp_path)


def test_torn_last_line_is_left_out(tmp_path):
  workdirs.write(tmp_path / "run")
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.write('{"epoch": 3, "st')
  (run,) = read(tmp_path)
  assert len(run.records) == 3


def test_damaged_environment(tmp_path):
  workdirs.write(tmp_path / "run")
  (tmp_path / "run" / "environment.json").write_text("[]")
  with pytest.raises(errors.WorkdirError, match=r"environment\.json"):
    read(tmp_path)


@pytest.mark.parametrize(
  ("environment", "device"),
  [
    (
      {"devices": ["cpu"], "cpu_model": "EPYC", "cpu_threads": 2},
      "EPYC, 2 threads",
    ),
    ({"devices": ["TPU v4", "TPU v4"]}, "2 x TPU v4"),
    ({"devices": []}, "unknown"),
  ],
)
def test_device(tmp_path, environment, device):
  workdirs.write(tmp_path / "run")
  path = tmp_path / "run" / "environment.json"
  path.write_text(json.dumps(environment))
  assert read(tmp_path)[0].device == device


def test_time_and_speed(tmp_path):
  workdirs.write(tmp_path / "run")
  (run,) = read(tmp_path)
  assert run.seconds == 10 + 11 + 12
  # All images by all seconds, not the mean of the epochs' speeds.
  assert run.images_per_second == pytest.approx(3 * 3200 / 33)


def test_groups_differ_in_more_than_seeds(tmp_path):
  workdirs.write(tmp_path / "a", [0.1, 0.2, 0.3], seed=0)
  workdirs.write(
    tmp_path / "b", [0.1, 0.2, 0.5], seed=1, log__tensorboard=False
  )
  workdirs.write(tmp_path / "c", model__depth=110)
  workdirs.write(tmp_path / "d", model__depth=56, model__name="plain")
  plain, shallow, deep = groups_of(tmp_path)
  assert [group.name for group in (plain, shallow, deep)] == [
    "plain, depth=56",
    "resnet_v1, depth=20",
    # By size: as text, 110 would come before 20.
    "resnet_v1, depth=110",
  ]
  assert [group.number for group in (plain, shallow, deep)] == [1, 2, 3]
  assert shallow.statistic("last", "test_accuracy") == runs.Statistic.of(
    [0.3, 0.5]
  )
  assert shallow.statistic("last", "test_accuracy").n == 2
  assert deep.statistic("last", "test_accuracy").std is None


def test_runs_on_different_data_are_no_repetitions(tmp_path):
  for seed, data in enumerate(["cifar10-1-aa", "cifar10-1-aa", "cifar10-1-bb"]):
    folder = workdirs.write(tmp_path / str(seed), seed=seed)
    (folder / "environment.json").write_text(json.dumps({"data": data}))
  workdirs.write(tmp_path / "3", seed=3)
  groups = groups_of(tmp_path)
  assert [(group.data, len(group.runs)) for group in groups] == [
    ("cifar10 (cifar10-1-aa)", 2),
    ("cifar10 (cifar10-1-bb)", 1),
    ("cifar10 (unknown)", 1),
  ]
  assert [len(each) for _, each in runs.by_data(groups)] == [1, 1, 1]
  assert groups[0].statistic("last", "test_accuracy").n == 2


def test_one_group_is_called_by_its_network(tmp_path):
  workdirs.write(tmp_path / "a")
  (group,) = groups_of(tmp_path)
  assert (group.data, group.name) == ("cifar10", "resnet_v1, depth=20")


def test_key_that_older_workdirs_lack(tmp_path):
  workdirs.write(tmp_path / "a")
  workdirs.write(tmp_path / "b", seed=1)
  path = tmp_path / "b" / "config.json"
  config = json.loads(path.read_text())
  del config["num_seeds"]
  path.write_text(json.dumps(config))
  assert len(groups_of(tmp_path)) == 1
  del config["augment"]
  path.write_text(json.dumps(config))
  assert len(groups_of(tmp_path)) == 1


def test_names_tell_all_groups_apart(tmp_path):
  """Also groups that differ in a fourth key; no name has a needless key."""
  values = itertools.product(
    ["plain", "resnet_v1"], [20, 56], [64, 128], [0.0, 0.5]
  )
  for k, (name, depth, batch_size, l2) in enumerate(values):
    workdirs.write(
      tmp_path / f"{k:02}",
      model__name=name,
      model__depth=depth,
      batch_size=batch_size,
      optimizer__l2=l2,
      # This tells nothing that the batch size does not.
      optimizer__learning_rate=batch_size / 1000,
    )
  # What differs between data sets alone tells no groups of one apart.
  workdirs.write(tmp_path / "flip", dataset__name="digits", batch_size=32)
  workdirs.write(
    tmp_path / "none",
    dataset__name="digits",
    batch_size=32,
    augment__flip=False,
  )
  *groups, first, second = groups_of(tmp_path)
  names = {group.name for group in groups}
  assert len(names) == 16
  assert "resnet_v1, depth=56, batch_size=128, l2=0.5" in names
  assert (first.name, second.name) == ("flip=false", "flip=true")


def test_short_names_stay_clear():
  configs = [
    {"model.name": "plain", "optimizer.name": name, "a.b1": 1, "c.b1": k}
    for k, name in enumerate(["adam", "sgd"])
  ]
  configs[0]["a.b1"] = 2
  configs.append(configs[0] | {"c.b1": 1})
  configs.append(configs[0] | {"optimizer.name": "sgd"})
  names = runs.labels(configs)
  assert names[0] == "a.b1=2, c.b1=0, optimizer=adam"
  assert len(set(names)) == 4
  long = [{"init_from": "x" * 100 + str(k), "seed": k} for k in range(2)]
  assert runs.labels(long) == [
    f"init_from={each['init_from']}" for each in long
  ]


def test_same_seed_twice_is_counted_once(tmp_path):
  workdirs.write(tmp_path / "a", [0.1], seed=7)
  workdirs.write(tmp_path / "b", [0.1, 0.2, 0.4], seed=7)
  workdirs.write(tmp_path / "c", [0.1, 0.2, 0.4], seed=7)
  (group,) = groups_of(tmp_path)
  assert [run.name for run in group.counted] == ["b"]
  assert group.statistic("last", "test_accuracy") == runs.Statistic(
    0.4, None, 1
  )
  assert [run.name for run in group.runs] == ["a", "b", "c"]


def test_unfinished_runs(tmp_path):
  workdirs.write(tmp_path / "a", [0.3], seed=0)
  workdirs.write(tmp_path / "b", [0.5, 0.1], seed=1)
  workdirs.write(tmp_path / "c", [], seed=2)
  (group,) = groups_of(tmp_path)
  # None is finished: what all that have begun have.
  assert (group.finished, group.num_epochs) == (False, 1)
  assert group.statistic("last", "test_accuracy") == runs.Statistic.of(
    [0.3, 0.5]
  )
  # Once one is finished, the others are not compared with it.
  workdirs.write(tmp_path / "d", [0.1, 0.2, 0.6], seed=3)
  (group,) = groups_of(tmp_path)
  assert (group.finished, group.num_epochs) == (True, 3)
  assert group.statistic("last", "test_accuracy") == runs.Statistic(
    0.6, None, 1
  )


def test_nothing_yet(tmp_path):
  workdirs.write(tmp_path / "a", [])
  (group,) = groups_of(tmp_path)
  assert group.statistic("last", "test_accuracy").n == 0
  assert group.statistic("best", "test_accuracy").n == 0
  assert not group.finished


def test_best_epoch_is_chosen_by_the_monitor(tmp_path):
  workdirs.write(tmp_path / "run", [0.5, 0.7, 0.6])
  (group,) = groups_of(tmp_path)
  assert group.runs[0].chosen_by == "test_accuracy"
  assert group.statistic("best", "test_accuracy").mean == 0.7
  path = tmp_path / "run" / "metrics.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record, validation in zip(records, [0.1, 0.2, 0.3], strict=True):
    record["val_accuracy"] = validation
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  (group,) = groups_of(tmp_path)
  assert group.runs[0].chosen_by == "val_accuracy"
  assert group.statistic("best", "test_accuracy").mean == 0.6


def test_several_seeds_in_one_run(tmp_path):
  accuracies = [[0.1, 0.9], [0.6, 0.6], [0.5, 0.6]]
  workdirs.write(tmp_path / "a", accuracies, seed=3, num_seeds=2)
  workdirs.write(tmp_path / "b", [0.1, 0.2, 0.8], seed=5)
  (group,) = groups_of(tmp_path)
  assert [(run.name, run.seed) for run in group.counted] == [
    ("a", 3),
    ("a", 4),
    ("b", 5),
  ]
  assert group.statistic("last", "test_accuracy") == runs.Statistic.of(
    [0.5, 0.6, 0.8]
  )
  # Each seed at its own best epoch, as if it had been trained alone.
  assert group.statistic("best", "test_accuracy") == runs.Statistic.of(
    [0.6, 0.9, 0.8]
  )
  assert group.curves("train_accuracy").shape == (3, 3)


def test_converted_weights_are_another_start(tmp_path):
  for seed, digest in enumerate(("", "", "one", "two", "two")):
    folder = workdirs.write(tmp_path / str(seed), seed=seed)
    if digest:
      begun = {"source": "a.pt", "sha256": digest}
      (folder / "environment.json").write_text(json.dumps({"converted": begun}))
  groups = groups_of(tmp_path)
  assert sorted(len(group.counted) for group in groups) == [1, 2, 2]
  assert any("a.pt (one)" in group.name for group in groups)


def test_before_the_first_scoring_there_is_no_best_epoch(tmp_path):
  folder = workdirs.write(tmp_path / "a", [0.5, 0.6], eval_every_epochs=2)
  log = folder / "metrics.jsonl"
  records = [json.loads(line) for line in log.read_text().splitlines()]
  first = {k: v for k, v in records[0].items() if not k.startswith("test_")}
  first["evaluation_seconds"] = 0.0
  second = records[1] | {"evaluation_seconds": 4.0}
  log.write_text(json.dumps(first) + "\n")
  (run,) = read(folder)
  assert run.chosen_by is None
  assert math.isnan(run.mean("evaluation_seconds", scored=True))
  log.write_text("".join(json.dumps(each) + "\n" for each in (first, second)))
  (run,) = read(folder)
  assert run.chosen_by == "test_accuracy"
  assert run.mean("evaluation_seconds", scored=True) == 4
