"""Saves random weights in PyTorch's files, with PyTorch's logits of images.

  python torch_reference.py --name=resnet18 --folder=DIR [--weights=FILE]

With --weights, a network strictly loads FILE and predicts DIR/inputs.npy. This
needs torch, torchvision and safetensors, and nothing of this repository.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

BATCH = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CifarBlock(nn.Module):
  """Two 3x3 convolutions, with option A where the shape changes."""

  def __init__(self, channels_in, channels, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(channels)
    self.pad = channels // 4 if stride != 1 else 0

  def forward(self, x):
    """Maps [B, C, H, W] to the block's output."""
    y = F.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    if self.pad:
      x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
    return F.relu(x + y)


class CifarResNet(nn.Module):
  """The ResNet of 6n+2 layers for CIFAR-10, with the usual names."""

  def __init__(self, depth):
    super().__init__()
    blocks = (depth - 2) // 6
    self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(16)
    self.layer1 = self._stage(16, 16, blocks, 1)
    self.layer2 = self._stage(16, 32, blocks, 2)
    self.layer3 = self._stage(32, 64, blocks, 2)
    self.linear = nn.Linear(64, 10)

  def _stage(self, channels_in, channels, blocks, stride):
    first = CifarBlock(channels_in, channels, stride)
    rest = [CifarBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)

  def forward(self, x):
    """Maps [B, 3, 32, 32] to logits."""
    x = F.relu(self.bn1(self.conv1(x)))
    x = self.layer3(self.layer2(self.layer1(x)))
    return self.linear(x.mean((2, 3)))


def build(name):
  """Returns the network and the side of its images."""
  if name.startswith("cifar"):
    return CifarResNet(int(name.removeprefix("cifar"))), 32
  return getattr(torchvision.models, name)(weights=None), 224


@torch.no_grad()
def randomize(model, side):
  """Makes every parameter and statistic matter, and keeps logits near 10.

  Running statistics are measured on a batch, so that deep networks neither
  explode nor die, and are then changed at random.
  """
  norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
  for norm in norms:
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(0, 0.2)
    norm.momentum = 1.0
  for module in model.modules():
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
      module.bias.normal_(0, 0.1)
  model.train()
  model(torch.randn(4, 3, side, side))
  model.eval()
  for norm in norms:
    norm.momentum = 0.1
    spread = norm.running_var.sqrt()
    norm.running_mean += 0.2 * spread * torch.randn_like(spread)
    norm.running_var *= torch.empty_like(spread).uniform_(0.5, 1.5)
  head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
  scale = 10 / model(torch.randn(BATCH, 3, side, side)).abs().max()
  head.weight *= scale
  head.bias *= scale


def save(model, name, folder):
  """Writes the weights in every file format of published weights."""
  state = model.state_dict()
  safetensors.torch.save_file(state, str(folder / "weights.safetensors"))
  if name.startswith("cifar"):
    # Training scripts with DataParallel save checkpoints in this form.
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save(
      {"state_dict": wrapped, "best_prec1": 91.25}, folder / "weights.th"
    )
  elif "152" not in name and "vgg" not in name:
    torch.save(state, folder / "weights.pth")


@torch.no_grad()
def main():
  """Writes weights* and reference.npz, which has images and logits."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--name", required=True)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--weights", type=pathlib.Path)
  arguments = parser.parse_args()
  torch.manual_seed(0)
  model, side = build(arguments.name)
  if arguments.weights:
    load = safetensors.torch.load_file
    if arguments.weights.suffix == ".pt":
      load = torch.load
    model.load_state_dict(load(arguments.weights), strict=True)
    inputs = torch.from_numpy(np.load(arguments.folder / "inputs.npy"))
    parts = [model.eval()(x) for x in inputs.permute(0, 3, 1, 2).split(32)]
    np.save(arguments.folder / "logits.npy", torch.cat(parts).numpy())
    print_versions()
    return
  randomize(model, side)
  save(model, arguments.name, arguments.folder)

  rng = np.random.default_rng(0)
  inputs = rng.normal(0, 1, (BATCH, side, side, 3)).astype(np.float32)
  images = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
  prepared = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
  if side != 32:
    prepared = torchvision.transforms.functional.resize(
      prepared, [side, side], antialias=False
    )
  prepared = torchvision.transforms.functional.normalize(prepared, MEAN, STD)
  np.savez(
    arguments.folder / "reference.npz",
    inputs=inputs,
    logits=model(torch.from_numpy(inputs).permute(0, 3, 1, 2)).numpy(),
    images=images,
    image_logits=model(prepared).numpy(),
  )
  print_versions()


def print_versions():
  """Prints the versions of Python and the libraries as JSON."""
  versions = {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "safetensors": safetensors.__version__,
  }
  print(json.dumps(versions))


if __name__ == "__main__":
  main()
