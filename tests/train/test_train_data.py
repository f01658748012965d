from __future__ import annotations

import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from train_files import write_image

from slope_compile.errors import DataError
from slope_compile.recipe import DataSection, ModelSection
from slope_compile.train.data import MEAN, STD, head_classes, load_data, mix, stratified_split
from slope_compile.train.images import MAX_PIXELS, decode


def section(source: str, **keys: object) -> DataSection:
    return DataSection(**{"source": source, "size": 12, "workers": 0, **keys})  # type: ignore[arg-type]


def test_digits_are_the_real_ones_split_evenly() -> None:
    data = load_data(section("digits"), seed=0)
    assert len(data.train) + len(data.validation) == 1797
    assert data.classes == [str(k) for k in range(10)]
    totals = Counter(data.train.labels + data.validation.labels)
    held = Counter(data.validation.labels)
    assert all(abs(held[k] - 0.2 * totals[k]) <= 0.5 for k in range(10))
    image, label = data.validation[0]
    assert image.shape == (3, 12, 12)
    assert image.dtype == torch.float32
    assert type(image) is torch.Tensor
    assert label == data.validation.labels[0]
    # Three equal channels, each normalized by its own statistics: undone, they agree and lie within 0..1.
    grey = image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(grey[0], grey[2])
    assert grey.min() >= -1e-6
    assert grey.max() <= 1 + 1e-6


def test_the_split_does_not_depend_on_the_training_seed() -> None:
    one, two = load_data(section("fake:64"), seed=1), load_data(section("fake:64"), seed=2)
    assert all(torch.equal(one.validation[i][0], two.validation[i][0]) for i in range(len(one.validation)))
    assert not torch.equal(one.train[0][0], two.train[0][0])


@pytest.mark.parametrize("augment", ["light", "imagenet"])
def test_an_item_depends_on_seed_epoch_and_index_alone(augment: str) -> None:
    first = load_data(section("digits", augment=augment), seed=3).train
    second = load_data(section("digits", augment=augment), seed=3).train
    second[7]  # what was read before, and the global generator, must not matter
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(first[5][0], second[5][0])
    assert torch.equal(torch.random.get_rng_state(), before)
    kept = first[5][0]
    first.set_epoch(1)
    assert not torch.equal(first[5][0], kept)
    first.set_epoch(0)
    assert torch.equal(first[5][0], kept)


def test_no_augmentation_and_validation_change_nothing() -> None:
    data = load_data(section("digits", augment="none"), seed=0)
    one = data.train[3][0]
    data.train.set_epoch(4)
    assert torch.equal(data.train[3][0], one)
    assert torch.equal(data.validation[3][0], data.validation[3][0])


def test_fake_images_can_be_told_apart_by_their_class() -> None:
    data = load_data(section("fake:200", augment="none"), seed=0)
    train = torch.stack([data.train[i][0] for i in range(len(data.train))])
    labels = torch.tensor(data.train.labels)
    centres = torch.stack([train[labels == k].mean(0) for k in range(10)])
    held = torch.stack([data.validation[i][0] for i in range(len(data.validation))])
    nearest = (held[:, None] - centres[None]).flatten(2).norm(dim=2).argmin(1)
    assert (nearest == torch.tensor(data.validation.labels)).float().mean() > 0.9
    assert not torch.equal(train[0], train[10])  # the same class, noise of its own


def test_a_head_of_another_size_names_both_counts() -> None:
    data = load_data(section("fake:64"), seed=0)
    assert head_classes(ModelSection(name="x"), data) == 10
    with pytest.raises(DataError, match=r"model\.classes is 7, but fake:64 has 10 classes"):
        head_classes(ModelSection(name="x", classes=7), data)


@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    share=st.floats(0.01, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_a_split_is_stratified_and_complete(counts: list[int], share: float) -> None:
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    train, validation = stratified_split(labels, share, [str(k) for k in range(len(counts))])
    assert sorted(train + validation) == list(range(len(labels)))
    for k, count in enumerate(counts):
        held = sum(labels[i] == k for i in validation)
        assert 1 <= held <= count - 1
        assert abs(held - share * count) <= 1


def test_a_class_of_one_cannot_be_split() -> None:
    with pytest.raises(DataError, match="'b' has a single image"):
        stratified_split([0, 0, 1], 0.5, ["a", "b"])


def test_image_folder_becomes_square_rgb(image_folder: Path) -> None:
    Image.fromarray(np.zeros((30, 50), np.uint8)).save(image_folder / "ant" / "0.png")  # grey, oblong
    rgba = Image.fromarray(np.full((9, 9, 4), 77, np.uint8))
    rgba.save(image_folder / "ant" / "1.png")
    data = load_data(section(f"imagefolder:{image_folder}", validation=0.4), seed=0)
    assert (len(data.train), len(data.validation)) == (6, 4)
    assert all(data.train[i][0].shape == (3, 12, 12) for i in range(6))


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "dangling", "bomb", "strip"])
def test_an_image_that_does_not_decode_is_named_refused_or_skipped(image_folder: Path, kind: str) -> None:
    bad = image_folder / "ant" / "2.jpg"
    spoil(bad, kind)
    with pytest.raises(DataError) as error:
        load_data(section(f"imagefolder:{image_folder}"), seed=0)
    assert str(bad) in str(error.value)
    assert "1 of 11 images" in str(error.value)
    data = load_data(section(f"imagefolder:{image_folder}", bad_images="skip"), seed=0)
    assert list(data.skipped) == [str(bad)]
    assert len(data.train) + len(data.validation) == 10
    for split in (data.train, data.validation):
        assert all(split[i][0].isfinite().all() for i in range(len(split)))


def spoil(path: Path, kind: str) -> None:
    if kind == "truncated":
        write_image(path, side=64)
        path.write_bytes(path.read_bytes()[:-900])
    elif kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "dangling":
        path.symlink_to(path.with_name("gone.jpg"))
    elif kind == "bomb":
        path.write_bytes(png_header(60_000, 60_000))
    else:
        Image.new("L", (1, 5_000)).save(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    side = int(MAX_PIXELS**0.5) + 1
    path.write_bytes(png_header(side, side))
    with pytest.raises(DataError, match=f"{side} x {side} pixels are more than {MAX_PIXELS}"):
        decode(str(path))


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 32768], [65535, 256]], np.uint16)).save(path)
    assert np.asarray(decode(str(path)))[..., 0].tolist() == [[0, 128], [255, 1]]


def test_a_class_whose_images_are_all_broken_is_named(image_folder: Path) -> None:
    for path in (image_folder / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="class 'bee' has no training image"):
        load_data(section(f"imagefolder:{image_folder}", bad_images="skip"), seed=0)


def test_mixed_seeds_are_fixed_for_all_time() -> None:
    assert mix(0, 0, 0) != mix(0, 0, 1) != mix(0, 1, 0) != mix(1, 0, 0)
    assert mix(1, 2) == int.from_bytes(
        __import__("hashlib").blake2b(struct.pack("<QQ", 1, 2), digest_size=4).digest(), "little"
    )
