"""Images per second and memory of the input pipeline, beside decoding alone.

python -m experiments.input_pipeline --folder=generated --images=2000
"""

import json
import pathlib
import statistics

from absl import app, flags

from configs import imagenet_resnet50
from experiments.input_pipeline import generated, measurement
from resnet_flax import datasets, environment
from resnet_flax.datasets import streaming

_FOLDER = flags.DEFINE_string("folder", None, "Where the images are put.")
_IMAGES = flags.DEFINE_integer("images", 2000, "How many there are.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that decode.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often all is measured.")


def main(argv: list[str]) -> None:
  """Measures all in turn and prints it as JSON."""
  del argv
  folder = pathlib.Path(str(_FOLDER.value))
  if not folder.exists():
    generated.prepare(folder, {"train": _IMAGES.value, "validation": 50})
  config = imagenet_resnet50.get_config()
  config.dataset.data_dir = str(folder)
  config.dataset.num_workers = _WORKERS.value
  split = datasets.load(config.dataset, "random_resized_crop").train
  assert isinstance(split, streaming.StreamedSplit)
  rounds = []
  for epoch in range(_ROUNDS.value):
    rounds.append(
      {
        "alone": measurement.alone(split, _WORKERS.value),
        "pipeline": measurement.pipeline(split, epoch),
      }
    )
    print(json.dumps(rounds[-1]), flush=True)
  ratios = {
    key: statistics.median(
      each["pipeline"][key] / each["alone"][key] for each in rounds
    )
    for key in ("images_per_second", "cpu_ms_per_image")
  }
  print(
    json.dumps(
      {
        "cpu": environment.cpu_model(),
        "threads": environment.num_cpu_threads(),
        "images": len(split),
        "workers": _WORKERS.value,
        "median_ratios": ratios,
        "rounds": rounds,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  flags.mark_flag_as_required("folder")
  app.run(main)
