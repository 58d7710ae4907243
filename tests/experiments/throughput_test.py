import functools
import json
import math
import sys

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.throughput import (
  __main__ as benchmark,
  environments,
  flops,
  report,
)
from experiments.throughput.workers import measure, ours, plain
from resnet_flax.run import errors

SETTING = (20, 32)


def measurement(round_number, program, train, **changes):
  return {
    "round": round_number,
    "program": program,
    "depth": SETTING[0],
    "batch_size": SETTING[1],
    "train_images_per_second": train,
    "inference_images_per_second": 4 * train,
    "matmul_gflops": 200.0,
    "compile_seconds": 5.0,
    "peak_megabytes": 700.0,
    "libraries": {"some": "1.0"},
    "python": "3.11.7",
    "threads": 2,
    **changes,
  }


@pytest.fixture
def results():
  """Three rounds of ours, two of a peer; the last round was interrupted."""
  return {
    "settings": {"rounds": 3, "seconds": 1.0},
    "measurements": [
      measurement(0, "ours", 100.0),
      measurement(0, "keras", 200.0),
      measurement(1, "keras", 80.0),
      measurement(1, "ours", 120.0),
      measurement(2, "ours", 400.0),
    ],
  }


def training_speeds(results, program):
  return report.by_round(
    results, SETTING, program, lambda m: m["train_images_per_second"]
  )


def test_flops_of_resnet20_by_hand():
  # Stem; stages of equal cost but for the first convolution of stages 2 and 3,
  # which has half as many input channels, and their shortcuts; head.
  conv = 32 * 32 * 9 * 16 * 16
  stem, shortcut, head = 32 * 32 * 9 * 3 * 16, 16 * 16 * 16 * 32, 64 * 10
  expected = stem + 6 * conv + 2 * (5 * conv + conv // 2 + shortcut) + head
  assert expected == 40_813_184
  assert flops.inference(20) == 2 * expected
  assert flops.training(20) == 2 * (3 * expected - stem)


def test_flops_agree_with_the_networks_own_program():
  model = our_model()
  # Ours stands in the program twice: for CPUs and for others.
  model = model.clone(
    conv=functools.partial(model.conv, conv_general_dilated=None)
  )

  def initialise_and_predict(images):
    key = jax.random.key(0)
    return model.init_with_output(key, images, train=False)[0]

  images = jax.ShapeDtypeStruct((1, *measure.IMAGE_SHAPE), "float32")
  jaxpr = jax.make_jaxpr(initialise_and_predict)(images).jaxpr
  assert 2 * multiply_adds(jaxpr) == flops.inference(20)


def our_model():
  # Every one of the tests' devices needs an image.
  task = measure.Task(20, batch_size=jax.device_count(), seconds=0.0)
  return ours.build_experiment(task)[1].model


def multiply_adds(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:3])
    elif equation.primitive.name == "dot_general":
      total += math.prod(equation.invars[1].aval.shape)
    total += sum(map(multiply_adds, jaxprs_in_params(equation.params)))
  return total


def test_ratios_pair_what_was_measured_in_one_round(results):
  pairs = report.ratios(
    training_speeds(results, "ours"), training_speeds(results, "keras")
  )
  assert pairs == [0.5, 1.5]


def test_spread_is_median_least_and_most():
  assert report.spread([3.0, 1.0, 9.0], ".0f") == "3 (1–9)"
  assert report.spread([], ".0f") == "–"


def test_tables_show_what_was_measured(results):
  text = report.tables(results)
  gflops = 120 * flops.training(20) / 1e9
  assert f"| 20 | 32 | resnet_flax | 120 (100–400) | 1 | {gflops:.0f} " in text
  assert "| 20 | 32 | Keras (TensorFlow) | 140 (80–200) | 1.00 (0.50" in text
  assert "PyTorch" not in text


def test_tables_of_a_run_that_broke_off_early(results):
  results["measurements"][1:] = [measurement(0, "torch", 300.0, batch_size=128)]
  assert "| 20 | 128 | resnet_flax | – |" in report.tables(results)


def test_report_is_remade_from_the_raw_figures(results, tmp_path, capsys):
  (tmp_path / "results.json").write_text(json.dumps(results))
  report.write(tmp_path)
  assert (tmp_path / "throughput.png").stat().st_size > 10_000
  assert capsys.readouterr().out == report.tables(results) + "\n"


def test_missing_environment_says_how_to_make_it(tmp_path):
  with pytest.raises(errors.UserError, match=r"environments --peers="):
    benchmark.commands(["ours", "torch"], tmp_path)


def test_ours_and_plain_need_no_other_environment(tmp_path):
  assert list(benchmark.commands(["ours", "plain"], tmp_path)) == [
    "ours",
    "plain",
  ]


def test_environments_have_requirements():
  folder = environments.ROOT / "experiments" / "throughput" / "requirements"
  assert {path.stem for path in folder.iterdir()} == set(environments.PEERS)
  peers = {peer for _, peer in benchmark.PROGRAMS.values() if peer}
  assert peers == set(environments.PEERS)


def test_results_are_not_overwritten(results, tmp_path):
  path = tmp_path / "results.json"
  path.write_text(json.dumps(results))
  with pytest.raises(errors.UserError, match="another --out"):
    benchmark.benchmark(benchmark.parse([f"--out={tmp_path}"]))
  assert json.loads(path.read_text()) == results


@pytest.mark.parametrize(
  "flag", ["--depths=21", "--depths=x", "--programs=ours,jax"]
)
def test_unusable_flags_are_refused(flag, capsys):
  with pytest.raises(SystemExit):
    benchmark.parse(["--out=x", flag])
  assert flag.partition("=")[0] in capsys.readouterr().err


def test_interrupted_benchmark_keeps_what_it_has(tmp_path, monkeypatch):
  calls = []

  def fake_measure(command, settings):
    calls.append((command[-1].rpartition(".")[2], settings["depth"]))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return {"train_images_per_second": 1.0}

  monkeypatch.setattr(benchmark, "_measure", fake_measure)
  flags = benchmark.parse(
    [f"--out={tmp_path}", "--programs=ours,plain", "--batch_sizes=8"]
  )
  with pytest.raises(KeyboardInterrupt):
    benchmark.benchmark(flags)
  assert calls == [("ours", 20), ("plain", 20), ("ours", 56)]
  kept = json.loads((tmp_path / "results.json").read_text())
  assert [m["program"] for m in kept["measurements"]] == ["ours", "plain"]


def test_order_alternates_from_round_to_round(tmp_path, monkeypatch):
  order = []

  def fake_measure(command, settings):
    del settings
    order.append(command[-1].rpartition(".")[2])
    return {"train_images_per_second": 1.0}

  monkeypatch.setattr(benchmark, "_measure", fake_measure)
  arguments = ["--programs=ours,plain", "--depths=8", "--batch_sizes=8"]
  benchmark.benchmark(
    benchmark.parse([f"--out={tmp_path}", "--rounds=2", *arguments])
  )
  assert order == ["ours", "plain", "plain", "ours"]


def test_worker_that_fails_is_an_error_with_its_words():
  with pytest.raises(errors.UserError, match="no module named"):
    benchmark._measure(
      [sys.executable, "-c", "raise SystemExit('no module named')"],
      {"depth": 8},
    )


def test_ours_and_plain_are_the_same_network():
  for model in (our_model(), plain.ResNet(blocks=3)):
    shapes = jax.eval_shape(
      lambda model=model: model.init(
        jax.random.key(0),
        jax.numpy.zeros((1, *measure.IMAGE_SHAPE)),
        train=False,
      )
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == 274_442


def test_the_batch_is_the_same_for_all():
  task = measure.Task(depth=8, batch_size=4, seconds=0.0)
  pixels, labels = task.batch()
  assert (pixels, labels) == task.batch()
  assert len(pixels) == 4 * 32 * 32 * 3
  assert len(labels) == 4
  assert max(labels) < measure.NUM_CLASSES
