"""Images per second and memory of the input pipeline, beside decoding alone.

python -m experiments.input_pipeline --folder=generated [--images=2000]
  [--workers=2] [--rounds=10] [--memory_epochs=3] [--out=results.json]
"""

import json
import pathlib

from absl import app, flags

from configs import imagenet_resnet50
from experiments.input_pipeline import generated, measurement
from experiments.throughput import spread_table
from resnet_flax import datasets, environment, workdir
from resnet_flax.datasets import streaming

_FOLDER = flags.DEFINE_string("folder", None, "Where the images are put.")
_IMAGES = flags.DEFINE_integer(
  "images", 2000, "How many there are.", lower_bound=256
)
_WORKERS = flags.DEFINE_integer(
  "workers", 2, "Processes that decode.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 10, "How often speed is measured.", lower_bound=1
)
_MEMORY_EPOCHS = flags.DEFINE_integer(
  "memory_epochs", 3, "Epochs in which memory is.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", "", "JSON file for the raw figures.")


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
        "around": measurement.around_decoding(split),
        "pipeline": measurement.pipeline(split, epoch),
      }
    )
    print(json.dumps(rounds[-1]), flush=True)
  ratios = {
    key: [each["pipeline"][key] / each["alone"][key] for each in rounds]
    for key in ("images_per_second", "cpu_ms_per_image")
  }
  memory = measurement.memory_over_epochs(split, _MEMORY_EPOCHS.value)
  rows = [
    (f"{way}, {title}", [each[way][key] for each in rounds], ".2f")
    for key, title in (
      ("images_per_second", "images/s"),
      ("cpu_ms_per_image", "CPU time for an image, ms"),
    )
    for way in ("alone", "pipeline")
  ]
  rows += [
    (
      f"to {part} an image, CPU time, ms",
      [each["around"][part] for each in rounds],
      ".2f",
    )
    for part in ("read", "pack")
  ]
  rows += [(f"pipeline / alone, {key}", ratios[key], ".3f") for key in ratios]
  rows += [
    (f"memory of all processes in epoch {epoch}, MB", samples, ".0f")
    for epoch, samples in enumerate(memory)
  ]
  print(spread_table.spread_table(rows))
  if _OUT.value:
    workdir.write_json(
      pathlib.Path(_OUT.value),
      {
        "cpu": environment.cpu_model(),
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
