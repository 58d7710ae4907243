"""One process of a run on several hosts that meets a signal at a given step.

python -m tests.distributed_worker STEP SIGNAL FLAGS...
"""

import os
import signal
import sys

from resnet_flax import main
from resnet_flax.run import progress


def send_at(number, count):
  """Sends itself a signal when it has been told of so many steps."""
  take, counted = progress.Progress.step, []

  def step(self, of_seeds):
    take(self, of_seeds)
    counted.append(1)
    if len(counted) == count:
      os.kill(os.getpid(), number)

  progress.Progress.step = step


if __name__ == "__main__":
  send_at(signal.Signals[sys.argv[2]], int(sys.argv[1]))
  del sys.argv[1:3]
  main.run()
