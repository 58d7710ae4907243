import pytest

from resnet_flax.parallel import mesh as mesh_lib


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "groups"),
  [
    (1, 1, 1),
    (1, 5, 1),
    (8, 1, 1),
    (8, 2, 2),
    (8, 3, 4),
    (8, 5, 8),
    (8, 30, 8),
    (6, 2, 2),
    (6, 4, 6),
    (7, 2, 7),
  ],
)
def test_groups_of_devices(num_devices, num_seeds, groups):
  assert mesh_lib.num_groups(num_devices, num_seeds) == groups
