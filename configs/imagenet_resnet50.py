"""ResNet-50 on ImageNet by the paper's own recipe.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition",
  section 3.4: SGD with momentum 0.9, batch 256, rate 0.1 divided by 10, decay
  of 1e-4 * w on all weights, shorter side 256 to 480, random crop of 224, flip.
Differences: the rate drops after 30 and 60 of 90 epochs, as in the usual
  reimplementations, not when the error stops falling. Images are normalised by
  each channel's mean and deviation, not by a mean image. Section 3.4's colour
  augmentation (Krizhevsky et al. 2012) is missing. Batch norm takes the
  statistics of 256 images, not of 32 on each of eight GPUs
  (--config.model.batch_norm_groups=8). Scores use moving averages; the authors
  took averages after training. The stem's max pool pads on both sides, as in
  torchvision, not only at the end, as in Caffe. Scores use one central crop;
  the paper's tables 2 and 3 use ten: --config.dataset.test_crops=10
Expected: 24.7 % top-1 error with one crop (the authors' repository), 22.85 %
  with ten (table 3). Neither has been reproduced here.
Cost: 115 million images at 3.9 G multiply-adds, for several GPUs or a TPU.
Command: python -m resnet_flax.main --config=configs/imagenet_resnet50.py
Other depths: --config.model.depth=18 (34, 101, 152); without shortcuts:
  --config.model.name=plain_imagenet --config.model.depth=34
  --config.model.stride_in_3x3=true
"""

from resnet_flax.configs import base


def get_config():
  """The recipe of He et al. 2015 for ImageNet."""
  config = base.get_config()
  config.batch_size = 256
  config.num_epochs = 90
  config.eval_batch_size = 256
  config.normalization = "imagenet"
  config.dataset.name = "imagenet2012"
  config.augment.name = "scale_crop"
  config.model.name = "resnet_imagenet"
  config.model.depth = 50
  config.model.stride_in_3x3 = False
  config.model.padding = "symmetric"
  config.model.conv_bias = False
  config.model.batch_norm_momentum = 0.9
  config.model.batch_norm_epsilon = 1e-5
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.1
  config.optimizer.l2 = 0.5e-4  # The paper's decay is the gradient 1e-4 * w.
  config.optimizer.l2_weights = "all"
  config.schedule.drop_percents = (33, 66)
  config.schedule.drop_factors = (0.1, 0.01)
  return config
