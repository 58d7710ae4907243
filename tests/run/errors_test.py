from resnet_flax.run import errors


def test_unknown_name_suggests_the_nearest():
  error = errors.unknown_name("key", "depht", ["width", "depth"])
  expected = "key='depht' is not known. Did you mean 'depth'? Known: depth, wid"
  assert str(error).startswith(expected)


def test_unknown_name_suggests_nothing_far_away():
  error = errors.unknown_name("key", "xyz", ["width", "depth"])
  assert "Did you mean" not in str(error)


def test_a_message_is_one_line_whatever_it_names():
  error = errors.DataError("a b/é\n\x1b[2J\udcff\u2028.tar.gz is missing")
  expected = r"a b/é\n\x1b[2J\udcff\u2028.tar.gz is missing"
  assert str(error) == expected
  assert str(error).encode()


def test_a_name_of_any_length_is_shown_short_and_soon():
  error = errors.unknown_name("key", "x" * 10**6, ["width", "x" * 1000])
  assert len(str(error)) < 1300
