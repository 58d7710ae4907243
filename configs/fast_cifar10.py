"""A wide and shallow network on CIFAR-10, in 15 minutes on 2 CPU cores.

Source: WRN-10-2, Zagoruyko and Komodakis 2016 (arXiv:1605.07146); one cycle of
  SGD with Nesterov, Page 2018 ('How to train your ResNet'); alternating flips
  and mirror images in scoring, Jordan 2024 (arXiv:2404.00498).
Expected: 83.8 ± 0.1 % on a JPEG copy of CIFAR-10, n = 3 (experiments/recipes).
Cost: 500,000 images: 13 minutes on 2 CPU cores with AVX512-BF16. On CPUs
  without it we advise --config.model.dtype=float32; that was not measured.
Command: python -m resnet_flax.main --config=configs/fast_cifar10.py
Three times as long: --config.num_epochs=30
"""

from resnet_flax.configs import base


def get_config():
  """A small network, with the options that help a run of few epochs."""
  config = base.get_config()
  config.batch_size = 128
  config.num_epochs = 10
  config.label_smoothing = 0.1
  config.normalization = "channel"
  config.dataset.test_crops = 2
  config.augment.name = "crop_flip"
  config.augment.alternating_flip = True

  config.model.name = "wide_resnet"
  config.model.depth = 10
  config.model.widen_factor = 2
  config.model.conv_bias = False
  # At 0.99 the running statistics would average too many of the 3,900 steps.
  config.model.batch_norm_momentum = 0.9
  config.model.dtype = "bfloat16"

  config.optimizer.name = "sgd"
  config.optimizer.nesterov = True
  config.optimizer.learning_rate = 0.2
  config.optimizer.l2 = 0.0
  config.optimizer.weight_decay = 5e-4
  config.schedule.name = "onecycle"
  return config
