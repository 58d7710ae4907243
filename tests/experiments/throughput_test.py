import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.throughput import (
  __main__ as benchmark,
  environments,
  flops,
  processes,
  report,
)
from experiments.throughput.programs import PROGRAMS
from experiments.throughput.workers import measure, ours, plain
from experiments.tools import markdown
from resnet_flax.run import errors, experiment

SETTING = (20, 32)
# Trainable ones, of Keras's own ResNet v1.
PARAMETERS = {8: 78_186, 20: 273_066}
PEERS = pathlib.Path(
  os.environ.get("RESNET_FLAX_PEERS") or environments.DEFAULT
)


def window(round_number, program, speed, kind="train"):
  return {
    "round": round_number,
    "program": program,
    "depth": SETTING[0],
    "batch_size": SETTING[1],
    "kind": kind,
    "steps": 10,
    "seconds": 10 * SETTING[1] / speed,
    "waiting_cpu_seconds": 0.0,
  }


def about(program, **changes):
  return {
    "program": program,
    "depth": SETTING[0],
    "batch_size": SETTING[1],
    "build_seconds": 5.0,
    "peak_megabytes": 700.0,
    "huge_page_megabytes": 100.0,
    "parameters": PARAMETERS[20],
    "threads": 2,
    "libraries": {"some": "1.0"},
    **changes,
  }


@pytest.fixture
def results():
  """Three rounds of ours, two of a peer; the last round was interrupted."""
  return {
    "date": "2026-12-01",
    "settings": {"rounds": 3, "seconds": 1.0, "threads": 2},
    "environment": {
      "git_commit": "0123456789",
      "cpu_model": "a CPU",
      "cpu_generation": "stepping 1",
    },
    "load_average": [0.1, 0.1, 0.1],
    "programs": [
      about("ours"),
      about("keras"),
      {
        **{"program": "torch_compiled", "depth": 20, "batch_size": 32},
        "left_out": "it failed\nno compiler",
      },
    ],
    "windows": [
      window(0, "ours", 100.0),
      window(0, "ours", 1000.0, "infer"),
      window(0, "keras", 200.0),
      window(0, "keras", 500.0, "infer"),
      window(1, "keras", 80.0),
      window(1, "ours", 120.0),
      window(2, "ours", 400.0),
    ],
  }


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
  task = measure.Task(20, batch_size=jax.device_count())
  return experiment.build(ours.build_config(task)).model


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
  speeds = (
    report.by_round(results, SETTING, program, "train")
    for program in ("ours", "keras")
  )
  assert report.ratios(*speeds) == pytest.approx([0.5, 1.5])


def test_tables_show_what_was_measured(results):
  tables = report.tables(results)
  gflops = 120 * flops.training(20) / 1e9
  rows = tables["training"].splitlines()
  assert (
    f"| 20 | 32 | resnet_flax | 120 (100–400) | 1 | {gflops:.0f} " in rows[2]
  )
  assert "| 20 | 32 | Keras (TensorFlow) | 140 (80–200) | 1.00 (0.50" in rows[3]
  assert "| 500 (500–500) | 2.00 (2.00–2.00) |" in tables["inference"]
  assert "| PyTorch, compiled | left out |" + 5 * "  |" in tables["programs"]
  assert "n = 3 rounds" in tables["setting"]
  assert "PyTorch" not in "\n".join(rows)


def test_bfloat16_is_compared_with_our_bfloat16(results):
  results["windows"] = [
    window(0, "ours", 100.0),
    window(0, "ours_bfloat16", 300.0),
    window(0, "torch_bfloat16", 150.0),
  ]
  ratio = report.compared(results, SETTING, "torch_bfloat16", "train")
  assert ratio == "2.00 (2.00–2.00)"


def test_pipeline_costs_what_real_data_take_longer(results):
  results["windows"] = [
    window(0, "ours_data", 100.0),
    window(0, "ours_data", 105.0, "resident"),
  ]
  assert "| 5.0% (5.0%–5.0%) |" in report.tables(results)["pipeline"]


def test_tables_of_a_run_that_broke_off_early(results):
  del results["windows"][1:]
  assert report.tables(results)["training"].count("\n") == 2
  results["windows"] = [window(0, "torch", 300.0)]
  assert "| PyTorch | 300 (300–300) | – |" in report.tables(results)["training"]


def test_report_is_remade_from_the_raw_figures(results, tmp_path, capsys):
  (tmp_path / "results.json").write_text(json.dumps(results))
  report.write(tmp_path)
  assert (tmp_path / "throughput.png").stat().st_size > 10_000
  tables = report.tables(results).values()
  assert capsys.readouterr().out == "\n\n".join(tables) + "\n"


def test_the_pages_have_places_for_all_tables(results):
  for page, tables in report.pages(results).items():
    for name, table in tables.items():
      markdown.replace(page.read_text(), name, report.COMMAND, table)


def test_the_pages_show_the_published_results():
  results = json.loads((report.PUBLISHED / "results.json").read_text())
  for page, tables in report.pages(results).items():
    text = page.read_text()
    for name, table in tables.items():
      assert markdown.replace(text, name, report.COMMAND, table) == text


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
  peers = {program.peer for program in PROGRAMS.values() if program.peer}
  assert peers == set(environments.PEERS)


def test_results_are_not_overwritten(results, tmp_path):
  path = tmp_path / "results.json"
  path.write_text(json.dumps(results))
  with pytest.raises(errors.UserError, match="another --out"):
    benchmark.benchmark(benchmark.parse([f"--out={tmp_path}"]))
  assert json.loads(path.read_text()) == results


@pytest.mark.parametrize(
  "flag",
  ["--depths=21", "--depths=x", "--programs=ours,jax", "--rounds=0"],
)
def test_unusable_flags_are_refused(flag, capsys):
  with pytest.raises(SystemExit):
    benchmark.parse(["--out=x", flag])
  assert flag.partition("=")[0] in capsys.readouterr().err


def test_only_the_results_may_differ_from_the_commit(tmp_path):
  with pytest.raises(errors.UserError, match="must be a git checkout"):
    benchmark.check_clean(tmp_path, tmp_path)
  subprocess.run(["git", "init", "-q", tmp_path], check=True)
  out = tmp_path / "results"
  out.mkdir()
  (out / "results.json").touch()
  benchmark.check_clean(tmp_path, out)
  (tmp_path / "code.py").touch()
  with pytest.raises(errors.UserError, match=r"\(\?\? code\.py\)"):
    benchmark.check_clean(tmp_path, out)


# Answers as a worker does, without a framework.
FAKE = """
import json, sys
print(json.dumps({"kinds": ["train", "infer"]}), flush=True)
for line in sys.stdin:
  kind, seconds = line.split()
  if kind == sys.argv[1]:
    raise SystemExit("no more")
  answer = {"kind": kind, "steps": 3, "seconds": float(seconds)}
  print(json.dumps(answer), flush=True)
"""


def fake(dies_at=""):
  return [sys.executable, "-c", FAKE, dies_at]


def run_fakes(tmp_path, monkeypatch, **workers):
  """Runs a benchmark of three rounds; returns its results."""
  monkeypatch.setattr(benchmark, "commands", lambda *_: workers)
  monkeypatch.setattr(benchmark, "check_clean", lambda *_: None)
  arguments = ["--rounds=3", "--seconds=8", "--batch_sizes=8"]
  flags = benchmark.parse([f"--out={tmp_path}", *arguments])
  try:
    benchmark.benchmark(flags)
  finally:
    results = json.loads((tmp_path / "results.json").read_text())
  return results


def test_programs_take_turns_in_alternating_order(tmp_path, monkeypatch):
  results = run_fakes(tmp_path, monkeypatch, ours=fake(), plain=fake())
  windows = results["windows"]
  order = [w["program"] for w in windows if w["kind"] == "train"]
  assert order == ["ours", "plain", "plain", "ours", "ours", "plain"]
  assert {(w["kind"], w["seconds"]) for w in windows} == {
    ("train", 8.0),
    ("infer", 4.0),
  }
  # Blocked processes wait for nothing.
  assert max(w["waiting_cpu_seconds"] for w in windows) < 0.5


def test_a_benchmark_that_breaks_off_keeps_its_windows(tmp_path, monkeypatch):
  with pytest.raises(errors.UserError, match="no more"):
    run_fakes(tmp_path, monkeypatch, ours=fake(), plain=fake("infer"))
  windows = json.loads((tmp_path / "results.json").read_text())["windows"]
  assert [(w["program"], w["kind"]) for w in windows] == [
    ("ours", "train"),
    ("ours", "infer"),
    ("plain", "train"),
  ]


def test_a_program_that_cannot_be_built_is_left_out(
  tmp_path, monkeypatch, capsys
):
  broken = [sys.executable, "-c", "raise SystemExit('no compiler')"]
  results = run_fakes(tmp_path, monkeypatch, ours=fake(), torch=broken)
  assert "no compiler" in results["programs"][1]["left_out"]
  assert "torch is left out" in capsys.readouterr().err
  assert {w["program"] for w in results["windows"]} == {"ours"}


@pytest.mark.slow
def test_our_workers_have_the_same_network_and_batch():
  # Every one of the tests' devices needs an image.
  task = measure.Task(depth=8, batch_size=jax.device_count())
  facts = []
  for program in (ours.Program(task), plain.Program(task)):
    requests = ["train 0", "infer 0"]
    found, *windows = measure.answers(program, requests, warm_up=0)
    assert [w["kind"] for w in windows] == ["train", "infer"]
    assert all(w["steps"] == 3 and w["seconds"] > 0 for w in windows)
    facts.append((found["parameters"], found["batch"]))
  assert facts == [(PARAMETERS[8], measure.digest(*task.batch()))] * 2


@pytest.mark.skipif(
  not all(
    (PEERS / name / "bin" / "python").is_file() for name in environments.PEERS
  ),
  reason=f"{PEERS} has no environments of Keras and PyTorch; see"
  " experiments/throughput/environments.py and RESNET_FLAX_PEERS",
)
def test_all_programs_have_the_same_network_and_batch(monkeypatch):
  # Workers have one device, as in the benchmark, and JAX's own compiler.
  monkeypatch.delenv("XLA_FLAGS")
  # One of each framework; the others differ in dtype or compilation.
  names = ("ours", "plain", "keras", "torch")
  workers = benchmark.commands(names, PEERS)
  found = []
  setting = {"depth": 8, "batch_size": 8}
  with processes.started(workers, setting, 2, found) as built:
    assert list(built) == list(names), found
    for worker in built.values():
      assert worker.ask("train 0")["steps"] == 3
  images, labels = measure.Task(**setting).batch()
  for each in found:
    assert each["parameters"] == PARAMETERS[8]
    assert each["batch"] == measure.digest(images, labels)
    assert each["threads"] == 2


def test_a_batch_is_known_in_any_order():
  images, labels = measure.Task(batch_size=4).batch()
  assert measure.digest(images, labels) == measure.digest(
    images[::-1].astype(float), labels[::-1]
  )
  others = (labels + 1) % measure.NUM_CLASSES
  assert measure.digest(images, labels) != measure.digest(images, others)
