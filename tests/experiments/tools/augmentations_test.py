import pytest
from PIL import Image

from experiments.tools import augmentations


@pytest.mark.slow
def test_the_sheet_is_drawn(cifar_data_dir, tmp_path, monkeypatch):
  published = augmentations.PAGE
  monkeypatch.setattr(augmentations, "PAGE", tmp_path / "sheet.png")
  augmentations.main()
  with Image.open(published) as old, Image.open(augmentations.PAGE) as new:
    assert new.size == old.size
    assert len(new.getcolors()) > 100
