"""Programs of trained networks: what they compute, and where they run."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from resnet_flax.models.kernels import onednn
from resnet_flax.run import errors
from resnet_flax.tools.export import programs
from tests.tools.export import networks

ROOT = pathlib.Path(__file__).parents[3]
USE = (ROOT / "docs" / "use.md").read_text()
FAST = (
  "resnet_v1, shortcuts A",
  "resnet_v1, input_size 20",
  "preact",
  "highway",
)


@pytest.fixture
def onnx():
  pytest.importorskip("onnxruntime", reason="needs ONNX Runtime, of [dev]")
  return pytest.importorskip("onnx", reason="needs the extra [onnx]")


@pytest.mark.parametrize(
  "title",
  [
    pytest.param(title, marks=[] if title in FAST else pytest.mark.slow)
    for title in networks.NETWORKS
  ],
)
def test_programs_compute_what_predict_does(title, tmp_path, onnx):
  of_onnx, of_stablehlo = networks.errors_of(title, tmp_path)
  onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
  assert of_onnx < 1e-5
  assert of_stablehlo < 1e-5


def test_the_table_is_of_these_networks():
  rows = re.findall(r"^\| (.+) \| (\S+) \| (\S+) \|$", USE, re.M)
  found = {name: worst for name, *worst in rows if name in networks.NETWORKS}
  assert list(found) == list(networks.NETWORKS)
  assert max(float(worst) for pair in found.values() for worst in pair) < 1e-5


def test_stablehlo_needs_nothing_but_jax(tmp_path, monkeypatch):
  loaded = networks.load_random()
  expected = loaded.predict(networks.images())
  # The convolution of which no program can be saved.
  monkeypatch.setattr(onednn, "enabled", True)
  programs.write_stablehlo(loaded, tmp_path)
  program = export.deserialize(
    bytearray((tmp_path / "program.stablehlo").read_bytes())
  )
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert program.nr_devices == 1  # The network is on eight here.
  calls = re.findall(r"custom_call @(\S+)\(", program.mlir_module())
  assert set(calls) == {"shape_assertion"}  # Of JAX itself.
  np.save(tmp_path / "images.npy", networks.images())
  script = """
import sys
import numpy as np
from jax import export

program = export.deserialize(bytearray(open("program.stablehlo", "rb").read()))
images = np.load("images.npy")
one, all = program.call(images[:1]), program.call(images)
np.testing.assert_allclose(one, all[:1], rtol=1e-5)
np.save("probabilities.npy", all)
assert "resnet_flax" not in sys.modules and "flax" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
  np.testing.assert_allclose(
    np.load(tmp_path / "probabilities.npy"), expected, rtol=1e-5
  )


def operations(graph):
  return [node.op_type for node in graph.node]


def test_batch_norms_after_convolutions_are_folded(tmp_path, onnx):
  programs.write_onnx(networks.load_random(), tmp_path)
  found = operations(onnx.load(tmp_path / "model.onnx").graph)
  # Normalising takes a Mul and an Add, each of three blocks a sum.
  assert [found.count(name) for name in ("Conv", "Mul", "Add")] == [9, 1, 4]
  programs.write_onnx(networks.load_random(name="preact"), tmp_path)
  found = operations(onnx.load(tmp_path / "model.onnx").graph)
  # Two blocks begin with a batch norm, the head has one as well.
  assert [found.count(name) for name in ("Conv", "Mul", "Add")] == [7, 4, 7]


def test_a_mean_image_and_any_batch(tmp_path, onnx):
  loaded = networks.load_random("pixel_mean")
  programs.write_onnx(loaded, tmp_path)
  for count in (1, 5):
    images = networks.images(count)
    probabilities = networks.run_onnx(tmp_path / "model.onnx", images)
    np.testing.assert_allclose(probabilities, loaded.predict(images), rtol=1e-5)


def test_neutral_parameters(tmp_path, onnx):
  """A new network has them: nothing is divided by its zeros."""
  from resnet_flax.tools.export import onnx_graph

  def logits(images):
    x = (images.astype(jnp.float32) + jnp.zeros((1, 1, 1, 3))) * 1.0
    return jnp.mean(x, (1, 2)) / 1.0

  path = tmp_path / "model.onnx"
  onnx_graph.write(logits, (4, 4, 3), (), path)
  assert operations(onnx.load(path).graph) == [
    *("Transpose", "Cast", "ReduceMean", "Softmax")
  ]


def test_group_norm_is_written_as_stablehlo_alone(tmp_path, onnx):
  loaded = networks.load_random(norm="group_norm", weight_standardization=True)
  with pytest.raises(errors.ConfigError, match=r"Norm.* cannot be written"):
    programs.write_onnx(loaded, tmp_path)
  programs.write_stablehlo(loaded, tmp_path)
  found = networks.run_stablehlo(
    tmp_path / "program.stablehlo", networks.images()
  )
  expected = loaded.predict(networks.images())
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_block_that_is_not_in_the_package(tmp_path, onnx):
  """Squeeze and excitation, a grouped convolution, sums of pixels."""
  from resnet_flax.tools.export import onnx_graph

  rng = np.random.default_rng(0)
  kernel, grouped, dense, per_pixel, flat = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((3, 3, 3, 4), (3, 3, 2, 4), (4, 4), (1, 8, 8, 4), (256, 4))
  )

  def convolve(x, kernel, groups):
    return jax.lax.conv_general_dilated(
      *(x, kernel, (1, 1), "SAME"),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  def logits(images):
    x = convolve(images.astype(jnp.float32) / 255, kernel, 1)
    x = (x + per_pixel) * per_pixel - x
    gate = jax.nn.sigmoid(jnp.mean(x, (1, 2)) @ dense)
    x = convolve(jax.nn.relu(2 - x * gate[:, None, None, :]), grouped, 2)
    return (jnp.sum(x, (1, 2)) + x.reshape(len(x), -1) @ flat) / 300

  onnx_graph.write(logits, (8, 8, 3), ("a", "b", "c", "d"), tmp_path / "x.onnx")
  images = networks.images()[:, :8, :8]
  np.testing.assert_allclose(
    networks.run_onnx(tmp_path / "x.onnx", images),
    jax.nn.softmax(logits(images)),
    rtol=1e-5,
  )
  with pytest.raises(errors.ConfigError, match="computes sort in a form"):
    onnx_graph.write(
      lambda images: jnp.sort(logits(images)), (8, 8, 3), (), tmp_path / "x"
    )
  with pytest.raises(errors.ConfigError, match="computes div in a form"):
    onnx_graph.write(
      lambda images: 1 / logits(images), (8, 8, 3), (), tmp_path / "x"
    )


def test_the_examples_of_the_documentation(tmp_path, monkeypatch, onnx):
  loaded = networks.load_random()
  names = tuple("0123456789")
  for form in ("stablehlo", "onnx"):
    folder = tmp_path / f"resnet20_{form}"
    folder.mkdir()
    write = getattr(programs, f"write_{form}")
    write(dataclasses.replace(loaded, class_names=names), folder)
  monkeypatch.chdir(tmp_path)
  section = USE[USE.index("## Programs out") :]
  examples = re.findall(r"```python\n(.*?)```", section, re.S)[:2]
  for example in examples:
    found = {}
    exec(example, found)
    assert found["probabilities"].shape == (4, 10)
  assert found["class_names"] == list(names)
