"""ResNet-20 on CIFAR-10 by the paper's own recipe.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition",
  section 4.2: SGD with momentum, batch 128, drops at 32k and 48k of 64k steps
  (epochs 82 and 123 of 164), pad-and-crop, parameter-free shortcuts (option
  A), no convolution bias, decay of 1e-4 * w on all weights.
Differences: batch norm takes the statistics of 128 images, not of 64 on each of
  two GPUs (--config.model.batch_norm_groups=2); scores use moving averages.
Expected: 8.75 % test error (table 6); 6.61 ± 0.16 % at depth 110 (best of five
  6.43 %).
Cost: 8.2 million images.
Command: python -m resnet_flax.main --config=configs/he2015_depth20.py
Depth 110 (--config.model.depth=110) also warms up at rate 0.01.
"""

from resnet_flax.configs import base


def get_config():
  """The recipe of He et al. 2015."""
  config = base.get_config()
  config.batch_size = 128
  config.num_epochs = 164
  config.augment.name = "crop_flip"
  config.model.shortcut = "A"
  config.model.padding = "symmetric"
  config.model.conv_bias = False
  config.model.batch_norm_momentum = 0.9
  config.model.batch_norm_epsilon = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.1
  config.optimizer.l2 = 0.5e-4  # The paper's decay is the gradient 1e-4 * w.
  config.optimizer.l2_weights = "all"
  config.schedule.drop_percents = (50, 75)
  config.schedule.drop_factors = (0.1, 0.01)
  config.schedule.drop_inclusive = True
  config.schedule.warmup_learning_rate = 0.01
  return config
