"""Compares the input pipeline's speed and memory with decoding alone.

python -m experiments.streaming --folder=generated [--images=2000]
  [--workers=2] [--rounds=10] [--memory_epochs=3] [--out=results.json]
"""

import json
import pathlib

from configs import imagenet_resnet50
from experiments.streaming import generated, measurement
from experiments.tools import flag_types
from resnet_flax import data as datasets
from resnet_flax.data import streaming
from resnet_flax.run import environment, files as files_lib, process

# This many images take two or three seconds.
_IMAGES_TIMED = 1536


def main(argv: list[str]) -> None:
  """Measures all settings in turn and prints each round as JSON."""
  parser = process.Parser("python -m experiments.streaming")
  add = parser.add_argument
  add("--folder", type=pathlib.Path, required=True, help="of the images")
  add("--images", type=flag_types.count, default=2000)
  add(
    "--workers", type=flag_types.count, default=2, help="processes that decode"
  )
  add("--rounds", type=flag_types.count, default=10)
  add("--memory_epochs", type=flag_types.count, default=3)
  add("--out", type=flag_types.output)
  flags = parser.parse_args(argv[1:])
  if flags.images < 256:
    parser.error("--images must be at least 256")
  if not flags.folder.exists():
    generated.prepare(flags.folder, {"train": flags.images, "validation": 50})
  config = imagenet_resnet50.get_config()
  config.dataset.data_dir = str(flags.folder)
  config.dataset.num_workers = flags.workers
  split = datasets.load(config.dataset, "random_resized_crop").train
  assert isinstance(split, streaming.StreamedSplit)
  alone = measurement.Alone(split, flags.workers)
  pipelines = {
    way: measurement.Pipeline(split, way) for way in measurement.WAYS
  }
  rounds = []
  for _ in range(flags.rounds):
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
  memory = measurement.memory_over_epochs(split, flags.memory_epochs)
  print(measurement.table(rounds, memory))
  if flags.out:
    results = {
      "environment": environment.describe([]),
      "images": len(split),
      "workers": flags.workers,
      "rounds": rounds,
      "memory_mib": memory,
    }
    files_lib.write_json(flags.out, results)


if __name__ == "__main__":
  process.run(main)
