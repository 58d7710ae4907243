from resnet_flax import errors


def test_unknown_name_suggests_the_nearest():
  error = errors.unknown_name("key", "depht", ["width", "depth"])
  expected = "key='depht' is not known. Did you mean 'depth'? Known: depth, wid"
  assert str(error).startswith(expected)


def test_unknown_name_suggests_nothing_far_away():
  error = errors.unknown_name("key", "xyz", ["width", "depth"])
  assert "Did you mean" not in str(error)
