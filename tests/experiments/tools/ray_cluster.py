"""A Ray cluster of two nodes on this machine, in a process of its own.

Ray starts its processes by fork, of which JAX warns in a process that has it.

python -m tests.experiments.tools.ray_cluster
  prints the cluster's address, and ends with its standard input.
"""

import sys

from ray.cluster_utils import Cluster


def main():
  cluster = Cluster(
    initialize_head=True,
    head_node_args={
      "num_cpus": 0,
      "include_dashboard": False,
      # Death is to be noticed sooner.
      "_system_config": {
        "health_check_period_ms": 500,
        "health_check_initial_delay_ms": 0,
      },
    },
  )
  try:
    for _ in range(2):
      cluster.add_node(num_cpus=1)
    # After what Ray prints.
    print(f"address={cluster.address}", flush=True)
    sys.stdin.read()
  finally:
    cluster.shutdown()


if __name__ == "__main__":
  main()
