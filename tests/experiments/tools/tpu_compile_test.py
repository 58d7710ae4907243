"""What is compiled for TPUs, and how the compiler's text is read."""

import importlib.util
import json
import os
import re

import jax
import pytest

from experiments.tools import markdown
from experiments.tools.tpu_compile import (
  chips,
  compilation,
  hlo,
  records,
  table,
)
from resnet_flax.parallel import networks as seeds
from resnet_flax.run import errors
from tests.helpers import run_module

# In the manner of libtpu's text, with what a step on a TPU has and more.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias), {2}: (3, {}) }, entry_computation_layout={(f32[16]{0:T(128)})->f32[16]{0:T(128)}}

%region_1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.1 (p: f32[128,32,32,16]) -> f32[128,32,32,16] {
  %p = f32[128,32,32,16]{0,3,2,1:T(8,128)} parameter(0)
  %k = f32[3,3,16,16]{3,2,1,0:T(8,128)S(1)} constant({...})
  ROOT %convolution.1 = f32[128,32,32,16]{0,3,2,1:T(8,128)} convolution(%p, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

%async_computation (q: f32[8]) -> f32[64] {
  %q = f32[8]{0:T(128)} parameter(0)
  ROOT %all-gather.9 = f32[64]{0:T(128)} all-gather(%q), channel_id=7, dimensions={0}
}

%body (s: (s32[], f32[16,32,32,16])) -> (s32[], f32[16,32,32,16]) {
  %s = (s32[]{:T(128)}, f32[16,32,32,16]{3,0,2,1:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[16,32,32,16]{3,0,2,1:T(8,128)} get-tuple-element(%s), index=1
  %k.1 = f32[3,3,16,16]{3,2,1,0:T(8,128)S(1)} constant({...})
  %convolution.2 = f32[16,32,32,16]{3,0,2,1:T(8,128)} convolution(%x, %k.1), window={size=3x3 pad=1_1x1_1}
  %mean = f32[16]{0:T(128)} constant({...})
  %all-reduce.3 = f32[16]{0:T(128)} all-reduce(%mean), channel_id=3, to_apply=%region_1, metadata={op_name="jit(step)/while/bn/reduce_sum" stack_frame_id=1}
  ROOT %t = (s32[]{:T(128)}, f32[16,32,32,16]{3,0,2,1:T(8,128)}) tuple(%i, %convolution.2)
}

%condition (s.1: (s32[], f32[16,32,32,16])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[16,32,32,16]{3,0,2,1:T(8,128)}) parameter(0)
  ROOT %less = pred[]{:T(512)} constant(true)
}

%never (n: f32[16]) -> f32[16] {
  %n = f32[16]{0} parameter(0)
  ROOT %all-reduce.99 = f32[16]{0} all-reduce(%n), to_apply=%region_1
}

ENTRY %main.1_spmd (x.1: f32[128,32,32,16], w: bf16[64,10]) -> f32[128,32,32,16] {
  %x.1 = f32[128,32,32,16]{0,3,2,1:T(8,128)} parameter(0)
  %w = bf16[64,10]{0,1:T(8,128)(2,1)} parameter(1)
  %v = f32[16]{0:T(128)S(1)} constant({...})
  %fusion.1 = f32[128,32,32,16]{0,3,2,1:T(8,128)} fusion(%x.1), kind=kOutput, calls=%fused_computation.1
  %all-reduce.1 = (f32[16]{0:T(128)S(1)}, /*index=1*/bf16[64,10]{0,1:T(8,128)(2,1)}) all-reduce(%v, /*index=1*/%w), channel_id=1, to_apply=%region_1, metadata={op_name="jit(step)/transpose(jvp(ResNet))/head/reduce_sum"}, backend_config={"x":{"n":"7"}}
  %all-reduce-start.2 = f32[16]{0:T(128)} all-reduce-start(f32[16]{0:T(128)S(1)} %v), channel_id=2, to_apply=%region_1
  %all-reduce-done.2 = f32[16]{0:T(128)} all-reduce-done(%all-reduce-start.2)
  %collective-permute-start.1 = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%v), source_target_pairs={{0,1}}
  %collective-permute-done.1 = f32[16]{0} collective-permute-done(%collective-permute-start.1)
  %part = f32[8]{0:T(128)} slice(%v), slice={[0:8]}
  %all-gather-start.9 = ((f32[8]{0}), f32[64]{0}, u32[]) all-gather-start(%part), calls=%async_computation
  %all-gather-done.9 = f32[64]{0} all-gather-done(%all-gather-start.9)
  %custom-call.1 = s32[16,2]{1,0:T(8,128)} custom-call(%v), custom_call_target="GatherScatterIndicesBitpacked"
  %init = (s32[], f32[16,32,32,16]{3,0,2,1:T(8,128)}) tuple(%v)
  %while.1 = (s32[], f32[16,32,32,16]{3,0,2,1:T(8,128)}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0"}}
  ROOT %copy.1 = f32[128,32,32,16]{0,3,2,1:T(8,128)} copy(%fusion.1)
}
"""  # noqa: E501


def test_collectives():
  found = [
    (each["kind"], each["arrays"], each["bytes"], each["count"])
    for each in hlo.parse(PROGRAM).collectives()
  ]
  assert sorted(found) == [
    ("all-gather", 1, 32, 1),
    # One, and one of a loop of three rounds.
    ("all-reduce", 1, 64, 1 + 3),
    ("all-reduce", 2, 64 + 2 * 640, 1),
    ("collective-permute", 1, 64, 1),
  ]
  names = {each["op_name"] for each in hlo.parse(PROGRAM).collectives()}
  assert "jit(step)/while/bn/reduce_sum" in names


def test_loops_that_count_to_a_constant():
  """As XLA prints them for TPUs."""
  without = PROGRAM.replace('"known_trip_count":{"n":"3"},', "")

  def convolutions(condition):
    text = without.replace(
      "  ROOT %less = pred[]{:T(512)} constant(true)", condition
    )
    assert text != without
    return hlo.parse(text).count("convolution") - 1

  count = """\
  %count = s32[]{:T(128)} constant(5)
  %j = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %count), direction=LT"""
  assert convolutions(count) == 5
  assert convolutions(count.replace("LT", "NE")) == 1
  # A number that the program is given.
  assert convolutions(count.replace("constant(5)", "copy(%j)")) == 1


def test_what_else_a_program_has():
  module = hlo.parse(PROGRAM)
  assert module.count("convolution") == 1 + 3
  assert module.count("while") == 1
  assert module.custom_calls() == {"GatherScatterIndicesBitpacked": 1}
  assert module.host_transfers() == []
  assert module.num_aliased() == 3
  # 16 channels as minor axis fill an eighth of a tile's 128.
  data = 128 + 3 * 16
  assert module.convolution_padding() == (128 + 3 * 8 * 16) / data


@pytest.mark.parametrize(
  "line",
  [
    "%infeed.1 = ((f32[16]{0}), token[]) infeed(%token)",
    "%outfeed.1 = token[] outfeed(%v, %token)",
    "%send.1 = (f32[16]{0}, u32[], token[]) send(%v, %token), channel_id=9,"
    " is_host_transfer=true",
    '%c = f32[16]{0} custom-call(%v), custom_call_target="xla_ffi_python_cpu_'
    'callback"',
    '%c = f32[16]{0} custom-call(%v), custom_call_target="MoveToHost"',
    "%c = f32[16]{0:T(128)S(5)} copy(%v)",
  ],
)
def test_host_transfers_are_found(line):
  before = "  %init = ("
  module = hlo.parse(PROGRAM.replace(before, f"  {line}\n{before}"))
  assert len(module.host_transfers()) == 1


@pytest.mark.parametrize(
  ("text", "padded"),
  [
    ("f32[16]{0:T(128)}", 512),
    ("f32[64,10]{0,1:T(8,128)}", 16 * 128 * 4),
    ("bf16[64,10]{0,1:T(8,128)(2,1)}", 16 * 128 * 2),
    ("f32[3,3,16,16]{3,2,1,0:T(8,128)S(1)}", 9 * 16 * 128 * 4),
    ("f32[3,5]{1,0}", 60),
    ("pred[]{:T(512)}", 1),
  ],
)
def test_padding(text, padded):
  (array,) = hlo._arrays(text)
  assert array.padded_bytes == padded


def test_text_without_a_program():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse("HloModule empty\n")


def test_roofline():
  chip = chips.CHIPS["v4"]
  # A device of one core of two has half of everything.
  model = chips.roofline(chip, 1, flops=275e9, num_bytes=60e6)
  assert model["compute_seconds"] == pytest.approx(2e-3)
  assert model["memory_seconds"] == pytest.approx(1e-4)
  assert model["seconds"] == model["compute_seconds"]
  model = chips.roofline(chip, 2, flops=0, num_bytes=12e9)
  assert model["seconds"] == pytest.approx(1e-2)


@pytest.mark.parametrize(
  "topology", ["v9:2x2", "v5e", "v5e:", "v5e:8", "v5e:0x2", "v5e:2x2\n", "tpu"]
)
def test_topologies_that_are_none(topology):
  with pytest.raises(errors.ConfigError, match="for example v4:2x2x1, v5e:2x4"):
    compilation.topology_devices(topology)


def test_missing_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.ConfigError, match=r"pip install .*\[tpu-aot\]"):
    compilation.topology_devices("v5e:2x4")


def test_the_compilers_refusal_is_one_line(monkeypatch):
  def refuse(**arguments):
    raise RuntimeError("INVALID_ARGUMENT: 3x3\nis not divisible")

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
  monkeypatch.setattr(compilation.topologies, "get_topology_desc", refuse)
  with pytest.raises(errors.ConfigError, match="3x3 is not divisible") as info:
    compilation.topology_devices("v5e:3x3")
  assert "\n" not in str(info.value)


@pytest.fixture
def config(tiny_config):
  tiny_config.normalization = "none"
  return tiny_config


def test_batch_that_cannot_be_divided(config):
  config.batch_size = 9
  with pytest.raises(errors.ConfigError, match="for example 8 or 16"):
    compilation.trace(config, jax.devices()[:8])


def test_traced_evaluation_takes_whole_batches(config):
  config.eval_batch_size = 99
  config.num_seeds = 2
  layout = seeds.Layout.create(config, jax.devices()[:4])
  # Four devices, two for each seed.
  assert compilation.eval_batch_size(config, layout) == 100


@pytest.fixture(scope="module")
def record(make_tiny_config, tmp_path_factory):
  """What the command makes, of a program for two CPUs."""
  config = make_tiny_config(tmp_path_factory.mktemp("cache"))
  described = compilation.describe(config, "v5e:2x4", jax.devices()[:2], 1)
  arguments = ["--config=x.py", "--config.batch_size=8", "--config.seed=0"]
  return {"arguments": arguments, **described}


def test_transfers_are_refused(record):
  compilation.check_transfers(record)
  step = {**record["eval"], "host_transfers": ["%send.1"]}
  with pytest.raises(errors.UserError, match=r"eval step has 1 .*%send\.1"):
    compilation.check_transfers({**record, "eval": step})


def test_description(record):
  assert record["num_devices"] == 2
  assert record["memory_bytes"] == 16e9
  step = record["train"]
  assert step["images_per_device"] == 4
  assert step["aliased_arrays"] == step["state_arrays"] > 50
  assert step["host_transfers"] == record["eval"]["host_transfers"] == []
  # On a CPU every sum over the batch is an all-reduce of its own or with
  # others: at least those of seven batch norms, there and back.
  kinds = {each["kind"] for each in step["collectives"]}
  assert "all-reduce" in kinds
  assert step["collective_count"] >= 14
  # Every parameter has a gradient.
  assert step["collective_bytes"] > 4 * 5000
  assert step["model_flops"] == 3 * 4 / 50 * record["eval"]["model_flops"]
  assert step["roofline"]["seconds"] == max(
    step["roofline"]["compute_seconds"], step["roofline"]["memory_seconds"]
  )
  total = step["memory"]["total"]
  assert total >= step["memory"]["temporary"] + step["memory"]["arguments"]
  json.dumps(record)


def test_tables(record):
  lines = table.steps_table([record]).splitlines()
  assert len(lines) == 4
  assert len({line.count("|") for line in lines}) == 1
  assert "| resnet_v1 8, seed=0 | float32 | v5e:2x4 | train | 4 |" in lines[2]
  lines = table.program_table([record]).splitlines()
  assert "all-reduce" in lines[2]
  arrays = record["train"]["state_arrays"]
  assert f"{arrays} of {arrays} arrays" in lines[2]


def test_records_are_added_and_replaced(tmp_path, record):
  path = tmp_path / "results.jsonl"
  assert records.read(path) == []
  records.add(path, record)
  other = record | {"topology": "v4:2x2x1"}
  records.add(path, other)
  records.add(path, record | {"num_devices": 5})
  assert records.read(path) == [record | {"num_devices": 5}, other]
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["[]", '{"result": 1}', "3"])
def test_a_file_of_something_else_is_kept(tmp_path, record, content):
  path = tmp_path / "notes.json"
  path.write_text(content)
  with pytest.raises(errors.DataError, match="cannot be read"):
    records.add(path, record)
  assert path.read_text() == content


def test_arguments():
  argv = ["x", "--config=a.py", "--topology=v5e:2x4", "--config.seed=3"]
  assert records.arguments(argv) == ["--config=a.py", "--config.seed=3"]


def test_readme_has_the_tables_of_the_records():
  text = table.README.read_text()
  assert text == table.with_tables(text)


def test_committed_results_have_what_the_readme_claims():
  for result in records.read(table.RESULTS):
    assert result["train"]["host_transfers"] == []
    assert result["eval"]["host_transfers"] == []
    step = result["train"]
    assert step["aliased_arrays"] == step["state_arrays"]
    assert step["memory"]["total"] < result["memory_bytes"]


def test_markers_that_are_missing():
  with pytest.raises(ValueError, match="is missing"):
    markdown.replace("no table", "steps", "python -m x", "| a |")


def test_programs_for_gpus(config):
  """XLA's own convolutions: one forward and two backward, less the stem's."""
  result = compilation.lower(config, jax.devices()[:4])
  # Seven and two shortcuts.
  assert result["train"]["convolutions"] == 3 * 9 - 1
  assert result["eval"]["convolutions"] == 9
  for step in result.values():
    assert step["loops"] == 0
    # Such as oneDNN's on CPUs.
    assert step["custom_calls"] == {}


def test_command_line_ends_in_one_line():
  flags = "--config=configs/v1_depth20.py", "--topology=v9:2x2"
  ended = run_module("experiments.tools.tpu_compile", *flags)
  assert ended.returncode == 2
  assert re.fullmatch(r"error: --topology=v9:2x2 .*\n", ended.stderr)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
def test_compiles_for_a_tpu(config, monkeypatch):
  """Takes a minute or two."""
  monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
  config.batch_size = 32
  devices = compilation.topology_devices("v5e:2x4")
  result = compilation.describe(config, "v5e:2x4", devices, 1)
  step = result["train"]
  assert result["device_kind"] == "TPU v5 lite"
  assert step["aliased_arrays"] == step["state_arrays"]
  assert step["host_transfers"] == []
  # Seven batch norms, there and back; the weights' gradients; the counts.
  assert step["collective_count"] == 2 * 7 + 2
  assert step["loops"] == 0
