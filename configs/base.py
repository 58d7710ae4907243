"""Every configuration key, once, with its default and its meaning.

The defaults are the Keras CIFAR-10 ResNet example. The other files of this
folder are deltas over this one; a key may be overridden on the command line
after `--config`, for example `--config.model.depth=56`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The Keras recipe: ResNet-20 v1, batch 32, 200 epochs, Adam."""
  config = ConfigDict()

  # Seeds initialisation, epoch order and augmentation.
  config.seed = 0
  # Train this many networks in one program, with the seeds seed, seed + 1, ...
  # Devices are divided among them; each has batch_size images per step.
  config.num_seeds = 1
  # Networks that share a device are trained 'in_turn' (each as it would be
  # alone, to the bit) or 'vectorized' (in one call). 'auto': in turn on CPUs;
  # elsewhere what a few steps of either show to be faster when the run begins.
  config.seed_execution = "auto"
  # Images per step, over all devices. A last, smaller batch is dropped.
  config.batch_size = 32
  # Training steps that one program does. More than one need the training split
  # on the devices, and end at signals and at checkpoints by the clock only
  # where a call ends. 0: one on CPUs and for images of more than 64 pixels a
  # side, elsewhere 32 where the split fits.
  config.steps_per_call = 0
  # Passes over the training split; also scales the schedule.
  config.num_epochs = 200
  # Images per evaluation call; does not change any result.
  config.eval_batch_size = 500
  # Before every step that this divides, write each layer's norms on the step's
  # batch (see layer_norms.py) to TensorBoard; 0 turns it off. Takes about the
  # time of a step, which counts as training.
  config.log_layer_norms_every = 0
  # Train on labels of which this share goes to all classes alike (Szegedy et
  # al. 2015, section 7). Training losses are of those labels; scores are of
  # the true ones.
  config.label_smoothing = 0.0
  # Start from the best checkpoint of this workdir, with a new head if it has
  # other classes, instead of from random weights. Empty: do not.
  config.init_from = ""
  # What is subtracted from images / 255. Measured on the training split:
  # 'pixel_mean' (mean image), 'channel' (mean and standard deviation of each
  # channel). Fixed, for published weights: 'imagenet' (torchvision's), 'caffe'
  # (He et al.'s and keras.applications'). Or 'none'.
  config.normalization = "pixel_mean"

  config.dataset = ConfigDict()
  # 'cifar10', 'cifar100' or 'digits'; or, read from a prepared copy while
  # training, 'imagenet2012' or 'tfds/NAME' for any other set that TFDS has
  # prepared as ArrayRecord with the features 'image' and 'label'.
  config.dataset.name = "cifar10"
  # TFDS data directory. Empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
  config.dataset.data_dir = ""
  # A local copy of the official binary archive, used instead of a download
  # when data_dir holds no prepared copy.
  config.dataset.archive = ""
  # Where decoded images are cached. Empty: the user's cache directory.
  config.dataset.cache_dir = ""
  # Height and width of images that are decoded while training.
  config.dataset.image_size = 224
  # Processes that decode them; -1: as many as there are CPU threads, 0: none,
  # but two threads. Of several seeds each has its own. Does not change any
  # result.
  config.dataset.num_workers = -1
  # Train on a fixed, class-balanced subset of this many images; 0 takes all.
  config.dataset.train_examples = 0
  # Hold out this many training images (stratified). With 0, as in the recipe,
  # the best checkpoint is chosen on the test split. Where images are decoded
  # while training, neither these nor the above look at classes.
  config.dataset.validation_examples = 0
  # 10: score each image that is decoded while training by the mean of the
  # probabilities of ten crops (Krizhevsky et al. 2012, section 4.1), the
  # corners and the centre and their mirror images, instead of the centre's.
  config.dataset.test_crops = 1
  # Chooses the held-out images; apart from `seed` so that runs with other
  # seeds are validated on the same images.
  config.dataset.split_seed = 0

  config.augment = ConfigDict()
  # 'shift_flip' (continuous shift by up to 10 %), 'crop_flip' (pad 4, random
  # crop) or 'none' (no augmentation at all). For images that are decoded while
  # training also 'scale_crop' (He et al. 2015: shorter side 256 to 480 for
  # crops of 224) and 'random_resized_crop' (8 to 100 % of the area, sides 3:4
  # to 4:3), which are cut from the whole image.
  config.augment.name = "shift_flip"
  # Flip left-right with probability one half.
  config.augment.flip = True

  config.model = ConfigDict()
  # For small images: 'resnet_v1', 'plain', 'preact', 'highway' (depth 6n+2)
  # and 'resnet_v2' (9n+2). For large ones: 'resnet_imagenet' (18, 34, 50, 101,
  # 152), 'plain_imagenet' (18, 34), 'vgg' (19) and 'alexnet' (8).
  config.model.name = "resnet_v1"
  # Weighted layers, shortcuts not counted.
  config.model.depth = 20
  # Channels of the stem and of the first stage's 3x3 convolutions. 0: as
  # usual, 16, and 64 for large images.
  config.model.num_filters = 0
  # Size of the head; 0: the data set's classes. Another one can be loaded and
  # used, but neither trained nor scored.
  config.model.num_classes = 0
  # Resize images to this height and width, on the device, as the networks for
  # large images need it for small ones. 0: leave them as they are.
  config.model.input_size = 0
  # Compute dtype, 'float32' or 'bfloat16'; parameters and statistics stay
  # float32.
  config.model.dtype = "float32"
  # Where a block changes shape: 'keras' (1x1 convolution without batch norm),
  # 'A' (no parameters: strided identity, zero channels) or 'B' (1x1
  # convolution with batch norm). 'C' is B in every block. 'default' is the
  # family's: keras for resnet_v1 and resnet_v2, A for preact and highway, B
  # for resnet_imagenet, and 'none' for the others, which have no shortcuts.
  config.model.shortcut = "default"
  # resnet_imagenet from depth 50 on: the 3x3 convolution of a bottleneck
  # carries the stride (torchvision, 'v1.5'), not its first 1x1 (the paper).
  config.model.stride_in_3x3 = True
  # highway: where the transform gates' bias starts. The deeper the network,
  # the lower: -1 to -7 are the papers' values.
  config.model.gate_bias = -2.0
  # The networks for small images and vgg: with batch norm or without.
  config.model.batch_norm = True
  # vgg and alexnet: share of the units that are dropped before dense layers.
  config.model.dropout = 0.5
  # 'same' pads (0, 1) at stride 2, 'symmetric' pads (1, 1) as the paper's
  # Caffe code does.
  config.model.padding = "same"
  # Whether convolutions have a bias. One that feeds a batch norm does
  # nothing, but the Keras example has it.
  config.model.conv_bias = True
  # Share of the old running statistics that is kept at each step.
  config.model.batch_norm_momentum = 0.99
  # Added to the variance (Keras's value, not Flax's).
  config.model.batch_norm_epsilon = 1e-3
  # Normalise this many equal parts of a batch each by its own statistics, as
  # pmap does with a part for each device; the running statistics take the
  # parts' mean. With as many parts as devices, or a multiple, no layer waits
  # for another device.
  config.model.batch_norm_groups = 1
  # Keep only each block's input for the backward pass, which computes the rest
  # again. Pays where activations do not fit into memory; costs about one more
  # forward pass. On a CPU it saves memory only together with scan.
  config.model.remat = False
  # Run the blocks of a stage, all but its first, as one loop, so that a deeper
  # network has no more convolutions to compile; what is done to each weight,
  # as by the optimizer, still grows. Pays for deep networks, where compilation
  # or, together with remat, memory is what limits them. On a CPU steps take as
  # long with oneDNN's convolutions; XLA's own are slow in a loop. Checkpoints
  # are the same with and without.
  config.model.scan = False

  config.optimizer = ConfigDict()
  # 'adam' or 'sgd'.
  config.optimizer.name = "adam"
  # The initial rate, which the schedule multiplies.
  config.optimizer.learning_rate = 1e-3
  # Adam's share of the old first moment that is kept at each step.
  config.optimizer.b1 = 0.9
  # The same for the second moment.
  config.optimizer.b2 = 0.999
  # Added to the root of Adam's second moment (Keras's value, not Optax's).
  config.optimizer.epsilon = 1e-7
  # SGD's heavy-ball momentum.
  config.optimizer.momentum = 0.9
  # The objective adds l2 * sum(w**2), without a half, so the gradient gains
  # 2 * l2 * w before the optimizer sees it.
  config.optimizer.l2 = 1e-4
  # Which weights: 'conv_kernels' (the Keras example), 'kernels' (of dense
  # layers, too) or 'all' (He et al.: biases and batch norms, too).
  config.optimizer.l2_weights = "conv_kernels"

  config.schedule = ConfigDict()
  # 'drops', by the drop_ keys, or 'cosine': half of one, from learning_rate
  # to 0 at the end of the run.
  config.schedule.name = "drops"
  # Before that, let the rate rise from 0 in equal steps for so many epochs.
  config.schedule.linear_warmup_epochs = 0.0
  # Drop k comes at the first 0-based epoch after drop_percents[k] % of
  # num_epochs: 81, 121, 161 and 181 of 200.
  config.schedule.drop_percents = (40, 60, 80, 90)
  # The rate is learning_rate * drop_factors[k] from drop k on.
  config.schedule.drop_factors = (1e-1, 1e-2, 1e-3, 0.5e-3)
  # True: drop at the epoch that the percentage names, not after it.
  config.schedule.drop_inclusive = False
  # He et al. 2015 §4.2: train deep networks at this rate until the training
  # error falls under warmup_error. 0 turns it off.
  config.schedule.warmup_learning_rate = 0.0
  # The error, a fraction, of about the last 50 batches.
  config.schedule.warmup_error = 0.8
  # Shallower networks do not warm up.
  config.schedule.warmup_min_depth = 110

  config.plateau = ConfigDict()
  # Also multiply the rate by `factor` when the monitored loss (with L2, as
  # Keras reports it) stalls. Off: in the original example the schedule sets
  # the rate again every epoch, so its ReduceLROnPlateau has no effect.
  config.plateau.enabled = False
  # What the rate is multiplied by: the square root of 0.1.
  config.plateau.factor = 0.31622776601683794
  # Epochs without improvement before the rate is reduced.
  config.plateau.patience = 5
  # Epochs after a reduction in which none is counted (Keras counts the last
  # of them).
  config.plateau.cooldown = 0
  # An improvement smaller than this is none.
  config.plateau.min_delta = 1e-4
  # The plateau never takes the rate below this.
  config.plateau.min_lr = 0.5e-6

  config.checkpoint = ConfigDict()
  # Also save after every step that this divides; 0 saves only by the clock and
  # at the end of each epoch.
  config.checkpoint.every_steps = 0
  # Also save when the last checkpoint is older; 0 turns it off.
  config.checkpoint.every_minutes = 10.0
  # What chooses the best epoch: 'accuracy', 'loss' (cross-entropy) or
  # 'objective' (with the L2 term), of the validation split if there is one,
  # else of the test split.
  config.checkpoint.monitor = "accuracy"

  config.log = ConfigDict()
  # Write TensorBoard event files to the workdir.
  config.log.tensorboard = True
  # Without a terminal: seconds between progress lines within an epoch.
  config.log.interval_seconds = 30.0

  return config.lock()
