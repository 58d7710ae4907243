import jax
import numpy as np
import pytest

from resnet_flax.parallel import mesh as mesh_lib, transfer


class OfAnotherHost:
  """A sharding with devices that belong to another process."""

  is_fully_addressable = False

  def __init__(self, sharding, own):
    self._sharding, self._own = sharding, own
    self.mesh, self.spec = sharding.mesh, sharding.spec

  def addressable_devices_indices_map(self, shape):
    indices = self._sharding.devices_indices_map(shape)
    return {d: index for d, index in indices.items() if d.id in self._own}


@pytest.fixture
def put(monkeypatch):
  """A function of a sharding and rows: what each own device gets."""

  def put_parts(sharding, shape, part):
    indices = sharding.addressable_devices_indices_map(shape)
    return {device.id: part(index) for device, index in indices.items()}

  monkeypatch.setattr(transfer, "_put_parts", put_parts)
  return transfer.put_rows


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
  found = transfer.own_rows(sharding, 16)
  np.testing.assert_array_equal(found, list(rows))
  parts = put(whole[found], sharding, 16)
  assert parts.keys() == own
  for device, part in parts.items():
    np.testing.assert_array_equal(part, whole[2 * device : 2 * device + 2])


def test_rows_of_several_seeds(put):
  """Two seeds on four devices each, of which this host has two of either."""
  mesh = mesh_lib.create_mesh(num_seeds=2)
  sharding = mesh_lib.sharding(mesh, mesh_lib.SEED, mesh_lib.DATA)
  sharding = OfAnotherHost(sharding, {2, 3, 6, 7})
  rows = transfer.own_rows(sharding, 8)
  np.testing.assert_array_equal(rows, [4, 5, 6, 7])
  whole = np.arange(2 * 8).reshape(2, 8)
  parts = put(whole[:, rows], sharding, 8)
  for device, part in parts.items():
    seed, column = divmod(device, 4)
    expected = whole[seed : seed + 1, 2 * column : 2 * column + 2]
    np.testing.assert_array_equal(part, expected)


def test_one_host_feeds_all():
  sharding = mesh_lib.sharding(mesh_lib.create_mesh(), mesh_lib.DATA)
  rows = transfer.own_rows(sharding, 8)
  np.testing.assert_array_equal(rows, range(8))
  placed = transfer.put_rows(np.arange(8), sharding, 8)
  assert placed.sharding == sharding
  np.testing.assert_array_equal(jax.device_get(placed), range(8))
