import jax
import numpy as np
import pytest

from resnet_flax.parallel import mesh as mesh_lib


class OfAnotherHost:
  """A sharding of whose devices this process has only some."""

  is_fully_addressable = False

  def __init__(self, sharding, own):
    self._sharding, self._own = sharding, own
    self.mesh = sharding.mesh

  def addressable_devices_indices_map(self, shape):
    indices = self._sharding.devices_indices_map(shape)
    return {d: index for d, index in indices.items() if d.id in self._own}


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


@pytest.fixture
def put(monkeypatch):
  """A function of a sharding and rows: what each own device gets."""

  def put_parts(sharding, shape, part):
    indices = sharding.addressable_devices_indices_map(shape)
    return {device.id: part(index) for device, index in indices.items()}

  monkeypatch.setattr(mesh_lib, "_put_parts", put_parts)
  return mesh_lib.put_rows


@pytest.mark.parametrize(
  ("own", "rows"),
  [
    ({0, 1, 2, 3}, range(8)),
    ({4, 5, 6, 7}, range(8, 16)),
    # Neighbours on the network need not be neighbours in the mesh.
    ({6, 1}, [2, 3, 12, 13]),
  ],
)
def test_each_host_feeds_the_rows_of_its_devices(put, own, rows):
  whole = np.arange(16 * 3).reshape(16, 3)
  sharding = OfAnotherHost(
    mesh_lib.sharding(mesh_lib.create_mesh(), mesh_lib.DATA), own
  )
  found = mesh_lib.own_rows(sharding, 16, axis=0)
  np.testing.assert_array_equal(found, list(rows))
  parts = put(whole[found], sharding, 16, axis=0)
  assert parts.keys() == own
  for device, part in parts.items():
    np.testing.assert_array_equal(part, whole[2 * device : 2 * device + 2])


def test_rows_of_several_seeds(put):
  """Two seeds on four devices each, of which this host has two of either."""
  mesh = mesh_lib.create_mesh(num_seeds=2)
  sharding = mesh_lib.sharding(mesh, mesh_lib.SEED, mesh_lib.DATA)
  sharding = OfAnotherHost(sharding, {2, 3, 6, 7})
  rows = mesh_lib.own_rows(sharding, 8, axis=1)
  np.testing.assert_array_equal(rows, [4, 5, 6, 7])
  whole = np.arange(2 * 8).reshape(2, 8)
  parts = put(whole[:, rows], sharding, 8, axis=1)
  for device, part in parts.items():
    seed, column = divmod(device, 4)
    expected = whole[seed : seed + 1, 2 * column : 2 * column + 2]
    np.testing.assert_array_equal(part, expected)


def test_one_host_feeds_all():
  sharding = mesh_lib.sharding(mesh_lib.create_mesh(), mesh_lib.DATA)
  rows = mesh_lib.own_rows(sharding, 8, axis=0)
  np.testing.assert_array_equal(rows, range(8))
  placed = mesh_lib.put_rows(np.arange(8), sharding, 8, axis=0)
  assert placed.sharding == sharding
  np.testing.assert_array_equal(jax.device_get(placed), range(8))
