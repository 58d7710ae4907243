"""Every configuration key, stated once: default, values, meaning.

`configs/base.py`, the checks of values, `--help` and `docs/configuration.md`
are made from `KEYS`. Constraints between keys are in `run/rules.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from resnet_flax.run.keys import (
  ADDRESS,
  ARGUMENTS,
  BOOLEAN,
  PATH,
  Key,
  choice,
  integer,
  number,
  positive,
  tuple_of,
)

LAST_SEED = 2**32 - 1
_GROUPED = ("resnext", "resnet_imagenet")
_SMALL = ("resnet_v1", "resnet_v2", "preact", "wide_resnet", "highway")
_DROPPED = ("preact", "wide_resnet")
_RESIDUAL = (*_SMALL, *_GROUPED)
_RESNETS = (*_RESIDUAL, "plain", "plain_imagenet")
_NORM = choice("batch_norm", "group_norm", "none")
_NORMALIZATION = choice("pixel_mean", "channel", "imagenet", "caffe", "none")
_DATASET = choice(
  "cifar10", "cifar100", "digits", "imagenet2012", "folder", prefix="tfds/"
)
_AUGMENT = choice(
  "shift_flip", "crop_flip", "scale_crop", "random_resized_crop", "none"
)
_BAD_IMAGES = choice("error", "skip")
_EXECUTION = choice("auto", "in_turn", "vectorized")
_OPTIMIZERS = "adam", "sgd", "adamw", "lamb", "lion", "muon"
_SCHEDULES = "drops", "cosine", "constant", "onecycle", "warmup_stable_decay"
_L2_WEIGHTS = choice("conv_kernels", "kernels", "all")
_MONITOR = choice("accuracy", "loss", "objective")
_STABLE_DECAY = ("warmup_stable_decay",)
_PERCENTS, _FACTORS = tuple_of(integer(1, 100)), tuple_of(positive())
_SHORTCUT = choice("default", "keras", "A", "B", "C", "none")

_KEYS = (
  Key("seed", 0, integer(0, LAST_SEED)).means(
    "Seed of the initial weights, the order of images, augmentation, dropout."
  ),
  Key("num_seeds", 1, integer(1, 1000)).means(
    "Networks trained in one program, with the seeds seed, seed + 1, ... They"
    " share the devices; each takes batch_size images per step."
  ),
  Key("seed_execution", "auto", _EXECUTION, may_differ=True).means(
    "How networks share a device. in_turn: each bit-identical to its run alone."
    " vectorized: all in one call, which rounds differently. auto: in_turn on"
    " CPUs, else vectorized."
  ),
  Key("batch_size", 32, integer(1)).means(
    "Images per step, over all devices. A last, smaller batch is dropped."
  ),
  Key("steps_per_call", 0, integer(0), may_differ=True).means(
    "Training steps per call. Several need the training split on every device;"
    " signals and timed saves then wait for a call's end. 0: 32, but 1 on CPUs,"
    " for images of over 64 pixels a side, and if the split is streamed or too"
    " large for a device."
  ),
  Key("num_epochs", 200, integer(1)).means(
    "Passes over the training split. The schedule scales with them."
  ),
  Key("eval_every_epochs", 1, integer(1)).means(
    "Epochs from one scoring to the next. The last epoch is always scored."
  ),
  Key("eval_batch_size", 500, integer(1, 2**16), may_differ=True).means(
    "Images per evaluation call. This may change the last digits of a loss, so"
    " six digits decide the best epoch and a plateau."
  ),
  Key("log_layer_norms_every", 0, integer(0), may_differ=True).means(
    "Write each layer's norms (run/layer_norms.py) to TensorBoard before each"
    " step that is a multiple of this; takes about a step's time. 0: never."
  ),
  Key("label_smoothing", 0.0, number(0, 1)).means(
    "Share of each label that is spread evenly over all classes, in training"
    " only (Szegedy et al. 2015, section 7). Scores use the true labels."
  ),
  Key("average_batch_norm", "recompute", choice("recompute", "average")).means(
    "Running statistics of ema and swa. recompute: at an epoch's end, from up"
    " to 5,000 training images (at least a batch), not augmented. average: like"
    " the weights."
  ),
  Key("init_from", "", PATH).means(
    "Workdir whose best checkpoint gives the initial weights, but with a random"
    " head if dataset.name or the classes differ. Empty: random weights."
  ),
  Key("normalization", "pixel_mean", _NORMALIZATION).means(
    "How images / 255 are normalised. Measured on training images: pixel_mean"
    " (mean image), channel. Fixed: imagenet (torchvision), caffe (VGG means)."
  ),
  Key("dataset.name", "cifar10", _DATASET).means(
    "imagenet2012, tfds/NAME (a set that TFDS has as ArrayRecord with the"
    " features image and label) and folder (your pictures in data_dir) are"
    " decoded while training; the others are in memory."
  ),
  Key("dataset.data_dir", "", PATH, may_differ=True).means(
    "TFDS data directory. Empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets."
    " For name=folder it holds train/CLASS/*, and perhaps val/ and test/, or"
    " CLASS/*: see docs/use.md."
  ),
  Key("dataset.archive", "", PATH, may_differ=True).means(
    "Local copy of CIFAR's official archive, used instead of a download."
  ),
  Key("dataset.cache_dir", "", PATH, may_differ=True).means(
    "Where decoded images are cached. Empty: the user's cache directory."
  ),
  Key("dataset.image_size", 224, integer(1, 2048)).means(
    "Side in pixels of images decoded while training. Without random crops they"
    " are cut to the central 224/256 of the shorter side, unless of this size"
    " or by dataset.test_crops=10."
  ),
  Key("dataset.num_workers", -1, integer(-1, 256), may_differ=True).means(
    "Processes per seed that decode images while training. 0: two threads. -1:"
    " one per CPU thread, but 0 for fewer than 10,000 images of 224x224."
  ),
  Key("dataset.bad_images", "error", _BAD_IMAGES, may_differ=True).means(
    "What to do with an image that cannot be decoded, in streamed sets. error:"
    " stop. skip: log it, train on the next good one instead, do not score it."
  ),
  Key("dataset.test_crops", 1, choice(1, 2, 10)).means(
    "Views per image; their mean probabilities are scored. 2: the image and its"
    " mirror image. 10: ten crops (Krizhevsky et al. 2012, section 4.1), only"
    " for images that are decoded while training."
  ),
  Key("dataset.train_examples", 0, integer(0)).means(
    "Size of a fixed training subset, balanced except in TFDS streams. 0: all."
  ),
  Key("dataset.validation_examples", 0, integer(0)).means(
    "Training images to hold out, stratified except in streamed TFDS sets. 0:"
    " the best epoch is chosen on a folder's val/ or validation/, else on test."
  ),
  Key("dataset.split_seed", 0, integer(0, LAST_SEED)).means(
    "Seed of the choice of held-out images, independent of `seed`."
  ),
  Key("augment.name", "shift_flip", _AUGMENT).means(
    "shift_flip: continuous shift by up to 10 %. crop_flip: pad 4, random crop."
    " none: neither, nor augment.flip. Only for images decoded while training:"
    " scale_crop (He et al. 2015: shorter side 256 to 480 for crops of 224),"
    " random_resized_crop (8 to 100 % of the area, sides 3:4 to 4:3)."
  ),
  Key("augment.flip", True, BOOLEAN).means("Mirror images at random."),
  Key("augment.alternating_flip", False, BOOLEAN).means(
    "Instead of at random, mirror an image every other epoch (Jordan 2024)."
  ),
  Key("augment.trivial_augment", False, BOOLEAN).means(
    "One random operation on each image's bytes (Mueller and Hutter 2021)."
  ),
  Key("augment.cutout", 0, integer(0, 2048)).means(
    "Side of a square that is set to 0 (DeVries and Taylor 2017: 16). 0: off."
  ),
  Key("augment.mixup", 0.0, number(0, 1e6)).means(
    "Alpha of mixup, done last (Zhang et al. 2018: 1 or 0.2). 0: off."
  ),
  Key("augment.cutmix", 0.0, number(0, 1e6)).means(
    "Alpha of CutMix, also done last (Yun et al. 2019: 1). With mixup, each"
    " batch draws one of the two. 0: off."
  ),
  Key("model.name", "resnet_v1", choice(*_RESNETS, "vgg", "alexnet")).means(
    "For small images: resnet_v1, plain, preact and highway (depth 6n+2),"
    " resnet_v2 and resnext (9n+2), wide_resnet (6n+4). For large ones:"
    " resnet_imagenet (18, 34, 50, 101, 152), plain_imagenet (18, 34), vgg"
    " (19), alexnet (8)."
  ),
  Key("model.depth", 20, integer(1, 2000)).means(
    "Weighted layers except shortcuts; for wide_resnet all convolutions."
  ),
  Key("model.num_filters", 0, integer(0, 1024), _RESNETS).means(
    "Channels of the stem. 0: 16; 64 for resnext and for large images."
  ),
  Key("model.widen_factor", 10, integer(1, 64), ("wide_resnet",)).means(
    "Ratio of the first stage's channels to the stem's: 10 in WRN-28-10."
  ),
  Key("model.groups", 0, integer(0, 1024), _GROUPED).means(
    "Groups of a bottleneck's 3x3 convolution. 0: 8 for resnext, else 1."
  ),
  Key("model.group_width", 0, integer(0, 4096), _GROUPED).means(
    "Channels of each group in the first stage. 0: the stem's channels."
  ),
  Key("model.squeeze_excitation", 0, integer(0, 1024), _RESNETS).means(
    "Reduction ratio of squeeze-and-excitation (Hu et al. 2018: 16). 0: off."
  ),
  Key("model.stochastic_depth", 0.0, number(0, 1), _RESIDUAL).means(
    "Chance that a batch skips the last block's branch. Block l of L has l / L"
    " of this chance (Huang et al. 2016)."
  ),
  Key("model.num_classes", 0, integer(0, 10**6)).means(
    "Size of the head. 0: the data set's classes; with another size a network"
    " can be loaded and used, but neither trained nor scored."
  ),
  Key("model.input_size", 0, integer(0, 2048)).means(
    "Side in pixels to which the device resizes images. 0: it does not."
  ),
  Key("model.dtype", "float32", choice("float32", "bfloat16")).means(
    "Dtype of the computation. Parameters and statistics stay float32. bfloat16"
    " is slow on CPUs without AVX512-BF16 or AMX."
  ),
  Key("model.shortcut", "default", _SHORTCUT).means(
    "Shortcut where a block changes shape. keras: 1x1 convolution. A: strided"
    " identity, zero channels. B: 1x1 convolution, batch norm. C: B in every"
    " block. default: keras (resnet_v1, resnet_v2, wide_resnet), A (preact,"
    " highway), B (resnext, resnet_imagenet)."
  ),
  Key("model.stride_in_3x3", True, BOOLEAN, ("resnet_imagenet",)).means(
    "From depth 50 on, the stride is in a bottleneck's 3x3 convolution"
    " (torchvision, v1.5), not in its first 1x1 (the paper)."
  ),
  Key("model.gate_bias", -2.0, number(-100, 100), ("highway",)).means(
    "Initial bias of the transform gates. In He et al. 2016, depth 110 fails"
    " with 0 to -5 and trains with -6."
  ),
  Key("model.norm", "batch_norm", _NORM, (*_RESNETS, "vgg")).means(
    "Normalisation layers; group_norm: Wu and He 2018."
  ),
  Key("model.weight_standardization", False, BOOLEAN).means(
    "Standardise convolution kernels: mean 0, variance 1 (Qiao et al. 2019)."
  ),
  Key("model.block_dropout", 0.0, number(0, 1), _DROPPED).means(
    "Share of activations dropped between a block's convolutions."
  ),
  Key("model.dropout", 0.5, number(0, 1), ("vgg", "alexnet")).means(
    "Share of units dropped before dense layers."
  ),
  Key("model.padding", "same", choice("same", "symmetric")).means(
    "At stride 2: same pads (0, 1), symmetric (1, 1) as the paper's code."
  ),
  Key("model.conv_bias", True, BOOLEAN).means(
    "Whether convolutions have a bias, as in the Keras example."
  ),
  Key("model.batch_norm_momentum", 0.99, number(0, 1)).means(
    "Share of the old running statistics that is kept at each step."
  ),
  Key("model.batch_norm_epsilon", 1e-3, positive()).means(
    "Added to the variance (Keras's value, not Flax's)."
  ),
  Key("model.batch_norm_groups", 1, integer(1), (*_RESNETS, "vgg")).means(
    "Parts of a batch that have their own statistics, as with pmap; running"
    " statistics take their mean. Multiples of the devices save communication."
  ),
  Key("model.remat", False, BOOLEAN, _RESNETS, may_differ=True).means(
    "Recompute a block's activations in the backward pass: saves memory, costs"
    " about one forward pass. On CPUs it saves memory only with scan."
  ),
  Key("model.scan", False, BOOLEAN, _RESNETS, may_differ=True).means(
    "Run the blocks of one shape in a stage as a loop, so that deep networks"
    " compile faster. Slow on CPUs without oneDNN. Checkpoints are the same."
  ),
  Key("optimizer.name", "adam", choice(*_OPTIMIZERS, prefix="optax/")).means(
    "optax/NAME: an optimizer of Optax that needs no more than gradients and"
    " weights, such as optax/nadam."
  ),
  Key("optimizer.learning_rate", 1e-3, positive()).means("The base rate."),
  Key("optimizer.b1", 0.9, number(0, 1), ("adam",)).means("Adam's beta_1."),
  Key("optimizer.b2", 0.999, number(0, 1), ("adam",)).means("Adam's beta_2."),
  Key("optimizer.epsilon", 1e-7, positive(), ("adam",)).means(
    "Added to the root of the second moment (Keras's value, not Optax's)."
  ),
  Key("optimizer.momentum", 0.9, number(0, 1), ("sgd",)).means("SGD momentum."),
  Key("optimizer.nesterov", False, BOOLEAN, ("sgd",)).means(
    "Use Nesterov's form of momentum."
  ),
  Key("optimizer.arguments", "", ARGUMENTS).means(
    "Optax's arguments, for all but adam and sgd. In muon, Adam (adam_b1, ...)"
    " trains all but convolution kernels; consistent_rms=0.2 fits Adam's rates."
  ),
  Key("optimizer.clip_norm", 0.0, number(0)).means(
    "Clip the objective's gradient to this global norm, before weight decay is"
    " added. 0: off."
  ),
  Key("optimizer.accumulate_steps", 1, integer(1)).means(
    "Batches per update, also across epochs: their mean gradient at the last"
    " batch's rate. Schedules and records still count each batch as a step."
  ),
  Key("optimizer.weight_decay", 0.0, number(0)).means(
    "Adds weight_decay * w to the gradient. Decoupled for adamw, lamb, lion,"
    " muon and others whose weight_decay Optax masks (not adadelta, cocob, dog,"
    " dowg, lars). Not in the objective; needs l2=0."
  ),
  Key("optimizer.l2", 1e-4, number(0)).means(
    "Adds l2 * sum(w**2) to the objective, as in Keras. Its gradient is"
    " 2 * l2 * w, as with a coupled weight_decay twice as large."
  ),
  Key("optimizer.l2_weights", "conv_kernels", _L2_WEIGHTS).means(
    "What l2 and weight_decay act on. conv_kernels: as in the Keras example."
    " kernels: also those of dense layers. all: also biases and batch norms."
  ),
  Key("schedule.name", "drops", choice(*_SCHEDULES)).means(
    "drops: by the drop_ keys. cosine: half a cosine from learning_rate to 0."
    " constant: learning_rate; a run can be lengthened. onecycle: linearly from"
    " 0 to learning_rate and back. warmup_stable_decay: learning_rate, then a"
    " linear fall to 0; a run can be lengthened until the fall."
  ),
  Key("schedule.peak_percent", 30, integer(1, 99), ("onecycle",)).means(
    "The share of the steps in which onecycle rises."
  ),
  Key("schedule.decay_percent", 20, integer(1, 100), _STABLE_DECAY).means(
    "The share of the epochs in which warmup_stable_decay falls."
  ),
  Key("schedule.linear_warmup_epochs", 0.0, number(0)).means(
    "Epochs of a linear warm-up from 0 to learning_rate. 0: off."
  ),
  Key("schedule.drop_percents", (40, 60, 80, 90), _PERCENTS).means(
    "Drop k comes at the first 0-based epoch after drop_percents[k] % of"
    " num_epochs: 81, 121, 161 and 181 of 200."
  ),
  Key("schedule.drop_factors", (0.1, 0.01, 1e-3, 5e-4), _FACTORS).means(
    "The rate is learning_rate * drop_factors[k] from drop k on."
  ),
  Key("schedule.drop_inclusive", False, BOOLEAN).means(
    "Drop at the epoch that the percentage names, not after it."
  ),
  Key("schedule.warmup_learning_rate", 0.0, number(0)).means(
    "Rate of deep networks until the training error is below warmup_error (He"
    " et al. 2015, section 4.2). 0: off."
  ),
  Key("schedule.warmup_error", 0.8, positive(1)).means(
    "Training error, mean of about 50 batches, that ends warmup_learning_rate."
  ),
  Key("schedule.warmup_min_depth", 110, integer(0)).means(
    "Shallower networks do not use warmup_learning_rate."
  ),
  Key("ema.decay", 0.0, number(0, 1)).means(
    "Also score a moving average of the weights. Step n (0-based) keeps the"
    " share min(decay, (1+n)/(10+n)) of the old average. Raw weights choose the"
    " best epoch. 0: off."
  ),
  Key("swa.start_epoch", 0, integer(0)).means(
    "Also score the mean of the weights that epochs end with, from this 0-based"
    " epoch on (Izmailov et al. 2018). Raw weights choose the best one. 0: off."
  ),
  Key("plateau.enabled", False, BOOLEAN).means(
    "Also multiply the rate by plateau.factor when the loss with L2 stalls."
    " Off by default: in the Keras example, the schedule undoes it before the"
    " next epoch."
  ),
  Key("plateau.factor", 0.31622776601683794, positive(1)).means(
    "Factor on the rate. The default is the square root of 0.1."
  ),
  Key("plateau.patience", 5, integer(1)).means("Epochs without improvement."),
  Key("plateau.cooldown", 0, integer(0)).means(
    "Epochs after a reduction that patience ignores (Keras counts the last)."
  ),
  Key("plateau.min_delta", 1e-4, positive()).means("The least improvement."),
  Key("plateau.min_lr", 5e-7, number(0)).means("Lowest rate a plateau sets."),
  Key("checkpoint.every_steps", 0, integer(0), may_differ=True).means(
    "Also save after each step that is a multiple of this. 0: do not."
  ),
  Key("checkpoint.every_minutes", 10.0, number(0), may_differ=True).means(
    "Also save when the last checkpoint is older than this. 0: do not."
  ),
  Key("checkpoint.mirror", "", ADDRESS, may_differ=True).means(
    "Address of a copy of the workdir that outlives this machine: gs:// or"
    " s3://BUCKET/FOLDER, or a folder on another disk. The copy fills a workdir"
    " that is missing or behind. Empty: no copy."
  ),
  Key("checkpoint.monitor", "accuracy", _MONITOR).means(
    "Chooses the best epoch, on the validation split if there is one, else on"
    " the test split. objective: the loss with its L2 term."
  ),
  Key("log.tensorboard", True, BOOLEAN, may_differ=True).means(
    "Write TensorBoard event files to the workdir."
  ),
  Key("log.norms", False, BOOLEAN, may_differ=True).means(
    "Record train_gradient_norm (of the cross-entropy) and train_weight_norm,"
    " over all arrays, averaged over an epoch."
  ),
  Key("log.interval_seconds", 30.0, number(0), may_differ=True).means(
    "Without a terminal: seconds between lines of progress within an epoch."
  ),
)

KEYS = {key.name: key for key in _KEYS}
# The keys that may have other values when a run is resumed.
MAY_DIFFER = tuple(key.name for key in _KEYS if key.may_differ)


def default_config() -> ConfigDict:
  """All keys with their defaults, locked: the Keras CIFAR-10 recipe."""
  nested: dict[str, Any] = {}
  for key in KEYS.values():
    part, _, name = key.name.rpartition(".")
    (nested.setdefault(part, {}) if part else nested)[name] = key.default
  return ConfigDict(nested).lock()
