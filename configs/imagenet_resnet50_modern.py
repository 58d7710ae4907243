"""ResNet-50 on ImageNet by a later recipe than the paper's own.

Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD": a large batch, rate
  of 0.1 for each 256 images, five epochs of linear warm-up; He et al. 2018,
  "Bag of Tricks", sections 3.1 and 5: no decay of biases and batch norms, half
  a cosine, label smoothing of 0.1; random-resized crops of Szegedy et al. 2014;
  the stride in the 3x3 convolutions (torchvision's v1.5).
Differences: bfloat16; no batch norm starts at a scale of zero; no mixup, no
  distillation, and one stem convolution as in the paper.
Expected: Goyal et al. report 23.74 % top-1 error with batch 8192 and 90 epochs,
  without cosine and label smoothing (table 1). Not reproduced here.
Cost: 128 million images at 4.1 G multiply-adds, for several GPUs or a TPU.
Command: python -m resnet_flax.main --config=configs/imagenet_resnet50_modern.py
Other batch sizes: --config.batch_size=256 --config.optimizer.learning_rate=0.1
Ten crops, in a run or for its best checkpoint: --config.dataset.test_crops=10
"""

from resnet_flax.configs import imagenet_resnet50


def get_config():
  """Linear warm-up, cosine, label smoothing, bfloat16."""
  config = imagenet_resnet50.get_config()
  config.batch_size = 1024
  config.num_epochs = 100
  config.label_smoothing = 0.1
  config.augment.name = "random_resized_crop"
  config.model.dtype = "bfloat16"
  config.model.stride_in_3x3 = True
  config.optimizer.learning_rate = 0.4
  config.optimizer.l2_weights = "kernels"
  config.schedule.name = "cosine"
  config.schedule.linear_warmup_epochs = 5.0
  return config
