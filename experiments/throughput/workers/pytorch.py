"""The recipe's network and training step in PyTorch, channels last.

There is one difference. A 3x3 convolution of stride 2 pads (1, 1) in PyTorch
and (0, 1) in TensorFlow's SAME. The number of operations is the same.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.throughput.workers import measure


def _conv(inputs: int, filters: int, kernel_size: int, strides: int):
  conv = nn.Conv2d(
    inputs, filters, kernel_size, strides, padding=kernel_size // 2
  )
  nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
  nn.init.zeros_(conv.bias)
  return conv


def _norm(filters: int):
  # PyTorch's momentum is the weight of the new batch's statistics.
  return nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01)


class Block(nn.Module):
  """conv-BN-ReLU, conv-BN, add, ReLU."""

  def __init__(self, inputs: int, filters: int, strides: int):
    super().__init__()
    self.conv1 = _conv(inputs, filters, 3, strides)
    self.bn1 = _norm(filters)
    self.conv2 = _conv(filters, filters, 3, 1)
    self.bn2 = _norm(filters)
    self.shortcut = (
      nn.Identity() if inputs == filters else _conv(inputs, filters, 1, strides)
    )

  def forward(self, x):
    """Maps float[B, C, H, W] to the block's output."""
    y = functional.relu(self.bn1(self.conv1(x)))
    return functional.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


def create_model(blocks: int):
  """ResNet v1 with `blocks` blocks in each of three stages."""
  layers = [_conv(3, 16, 3, 1), _norm(16), nn.ReLU()]
  inputs = 16
  for stage in range(3):
    filters = 16 * 2**stage
    for block in range(blocks):
      strides = 2 if stage > 0 and block == 0 else 1
      layers.append(Block(inputs, filters, strides))
      inputs = filters
  head = nn.Linear(inputs, measure.NUM_CLASSES)
  nn.init.kaiming_normal_(head.weight, nonlinearity="relu")
  nn.init.zeros_(head.bias)
  layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]
  return nn.Sequential(*layers)


class Program:
  """Trains and predicts on one batch that stays in memory."""

  libraries = ("torch", "numpy")

  def __init__(self, task: measure.Task):
    torch.set_num_threads(task.threads)
    self._task = task
    images, labels = task.batch()
    nchw = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    self._images = torch.from_numpy(nchw).to(memory_format=torch.channels_last)
    self._labels = torch.from_numpy(labels.astype(np.int64))

  def build(self):
    """Builds the network and its optimizer."""
    torch.manual_seed(0)
    self._model = create_model(self._task.blocks).to(
      memory_format=torch.channels_last
    )
    parameters = list(self._model.parameters())
    kernels = [p for p in parameters if p.dim() == 4]
    others = [p for p in parameters if p.dim() != 4]
    # 2e-4 times a kernel is the gradient of the L2 term, 1e-4 times its square.
    groups = [{"params": kernels, "weight_decay": 2e-4}, {"params": others}]
    optimizer = torch.optim.Adam(groups, 1e-3, eps=1e-7, fused=True)
    compiled = self._task.mode == "compiled"
    model = torch.compile(self._model) if compiled else self._model
    autocast = torch.autocast(
      "cpu", torch.bfloat16, enabled=self._task.dtype == "bfloat16"
    )

    def train(steps: int) -> float:
      model.train()
      for _ in range(steps):
        optimizer.zero_grad()
        with autocast:
          logits = model(self._images)
          loss = functional.cross_entropy(logits, self._labels)
        loss.backward()
        optimizer.step()
        accuracy = (logits.argmax(1) == self._labels).float().mean()
      accuracy.item()
      return loss.item()

    def infer(steps: int) -> None:
      model.eval()
      with torch.inference_mode(), autocast:
        for _ in range(steps):
          model(self._images)

    return {"train": train, "infer": infer}

  def facts(self):
    """Facts from PyTorch: parameters, batch, threads."""
    pixels = (self._images.permute(0, 2, 3, 1) * 255).round()
    return {
      "parameters": sum(p.numel() for p in self._model.parameters()),
      "batch": measure.digest(pixels.numpy(), self._labels.numpy()),
      "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
  measure.serve(Program)
