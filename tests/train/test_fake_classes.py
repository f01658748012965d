from __future__ import annotations

import pytest

from slope_compile.recipe import DataSection
from slope_compile.train.data import load_data


@pytest.mark.parametrize(("classes", "shown"), [(None, 10), (4, 4), (1000, 32)])
def test_fake_images_have_as_many_classes_as_the_head(classes: int | None, shown: int) -> None:
    data = load_data(DataSection(source="fake:64", size=8), 0, classes)
    assert len(data.classes) == (classes or 10)
    assert set(data.train.labels) == set(data.validation.labels) == set(range(shown))
