"""ResNet-50 as torchvision builds it, to load and fine-tune its weights.

Source: He et al. 2015, table 1, with the stride in the 3x3 convolutions.
  Padding, epsilon and normalisation match torchvision's resnet50. CIFAR-10
  images are enlarged to 224x224. The learning rate suits pretrained weights.
Expected: converted weights give torchvision's logits (experiments/weights).
  The accuracy of fine-tuning has not been measured here.
Cost: 10 epochs are half a million images at 4.1 G multiply-adds, for a GPU.
Command: python -m resnet_flax.main --config=configs/resnet50_torchvision.py
  with --config.init_from=runs/resnet50, made by `resnet_flax.convert`.
Other depths: --config.model.depth=18 (34, 101, 152)
"""

from resnet_flax.configs import base


def get_config():
  """Fine-tunes torchvision's ResNet-50."""
  config = base.get_config()
  config.batch_size = 64
  config.num_epochs = 10
  config.eval_batch_size = 100
  config.normalization = "imagenet"
  config.augment.name = "crop_flip"
  config.model.name = "resnet_imagenet"
  config.model.depth = 50
  config.model.input_size = 224
  config.model.padding = "symmetric"
  config.model.conv_bias = False
  config.model.batch_norm_momentum = 0.9
  config.model.batch_norm_epsilon = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.01
  config.optimizer.l2 = 0.5e-4  # The paper's decay is the gradient 1e-4 * w.
  config.optimizer.l2_weights = "all"
  return config
