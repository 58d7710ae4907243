"""Compares the input pipeline's speed and memory with decoding alone.

python -m experiments.streaming --folder=generated [--images=2000]
  [--workers=2] [--rounds=10] [--memory_epochs=3] [--out=results.json]
"""

import json
import pathlib

from absl import app, flags

from configs import imagenet_resnet50
from experiments.streaming import generated, measurement
from resnet_flax import data as datasets
from resnet_flax.data import streaming
from resnet_flax.run import environment, files as files_lib

_FOLDER = flags.DEFINE_string("folder", None, "Folder for the images.")
_IMAGES = flags.DEFINE_integer(
  "images", 2000, "Number of images.", lower_bound=256
)
_WORKERS = flags.DEFINE_integer(
  "workers", 2, "Processes that decode.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 10, "Measurements of the speed.", lower_bound=1
)
_MEMORY_EPOCHS = flags.DEFINE_integer(
  "memory_epochs", 3, "Epochs that measure memory.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "", "JSON file for the raw figures.")

# They take two or three seconds.
_IMAGES_TIMED = 1536


def main(argv: list[str]) -> None:
  """Measures all settings in turn and prints each round as JSON."""
  del argv
  folder = pathlib.Path(str(_FOLDER.value))
  if not folder.exists():
    generated.prepare(folder, {"train": _IMAGES.value, "validation": 50})
  config = imagenet_resnet50.get_config()
  config.dataset.data_dir = str(folder)
  config.dataset.num_workers = _WORKERS.value
  split = datasets.load(config.dataset, "random_resized_crop").train
  assert isinstance(split, streaming.StreamedSplit)
  alone = measurement.Alone(split, _WORKERS.value)
  pipelines = {
    way: measurement.Pipeline(split, way) for way in measurement.WAYS
  }
  rounds = []
  for _ in range(_ROUNDS.value):
    # Pairs are measured close together: speed changes within seconds.
    rounds.append(
      {
        way: {
          "alone": alone.measure(_IMAGES_TIMED),
          "pipeline": pipeline.measure(_IMAGES_TIMED),
        }
        for way, pipeline in pipelines.items()
      }
    )
    print(json.dumps(rounds[-1]), flush=True)
  alone.close()
  for pipeline in pipelines.values():
    pipeline.close()
  memory = measurement.memory_over_epochs(split, _MEMORY_EPOCHS.value)
  print(measurement.table(rounds, memory))
  if _OUT.value:
    files_lib.write_json(
      pathlib.Path(_OUT.value),
      {
        "cpu": environment.cpu()["cpu_model"],
        "threads": environment.num_cpu_threads(),
        "images": len(split),
        "workers": _WORKERS.value,
        "rounds": rounds,
        "memory_mb": memory,
      },
    )


if __name__ == "__main__":
  flags.mark_flag_as_required("folder")
  app.run(main)
