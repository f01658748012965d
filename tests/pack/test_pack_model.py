"""A packed model holds what was trained, bit for bit, and gives it back to torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_files import compressed, net, random_codes, save_train
from pack_reader import Reader
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import slope_compile as sc
from slope_compile.codes_file import StoredCodes, save_codes
from slope_compile.compression.api import fold
from slope_compile.errors import ArtifactError, CheckFailedError, ModelError, StorageError
from slope_compile.pack import write
from slope_compile.pack.container import begins_packed
from slope_compile.pack.kept import kept_of_checkpoint
from slope_compile.pack.read import Packed, open_packed
from slope_compile.pack.write import pack_model, pack_run


def same(first: Any, second: Any) -> bool:
    first, second = np.asarray(first), np.asarray(second)
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that a plain model has once it got the compressed weights."""
    fold(model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bits": 2}, {"bits": 3, "granularity": "channel"}, {"bits": 8, "pattern": None}, {"pattern": "1:4"},
        {"pattern": "4:8", "first_last_bits": None}, {"pattern": "2:8", "first_last_bits": 4}, {"activation_bits": 4},
    ],
)  # fmt: skip
def test_a_model_is_packed_and_another_one_gets_it_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(**options)
    codes = sc.codes(model)
    packed = sc.pack(model, tmp_path / "m.slope")
    assert packed.kind == "model" and not packed.files and list(packed.codes) == sorted(codes)
    for name, coded in codes.items():
        found = packed.codes[name]
        assert same(found.codes, coded.codes) and same(found.scale, coded.scale)
        assert (found.bits, found.axis, found.pattern) == (coded.bits, coded.axis, coded.pattern)
    other = net()
    if "activation_bits" in options:
        sc.compress(other, **({"bits": 4} | options))
        fold(other)
    sc.load(tmp_path / "m.slope", model=other)
    expected = plain_state(model)
    assert other.state_dict().keys() == expected.keys()
    assert all(same(other.state_dict()[name], tensor) for name, tensor in expected.items())
    inputs = torch.randn(2, 3, 12, 12)
    assert torch.equal(other.eval()(inputs), model.eval()(inputs))


def test_a_second_reader_finds_the_codes(tmp_path: Path) -> None:
    model = compressed(bits=3, granularity="channel")
    pack_model(model, tmp_path / "m.slope")
    reader = Reader((tmp_path / "m.slope").read_bytes())
    found = reader.coded()
    for name, coded in sc.codes(model).items():
        assert found[name] == (coded.codes.flatten().tolist(), coded.scale.tolist())
    names = [entry["name"] for entry in reader.header["tensors"]]
    state = model.state_dict()
    assert names == sorted(name for name in state if ".parametrizations." not in name)
    assert reader.tensors() == [state[name].numpy().tobytes() for name in names]


def test_a_run_is_packed_and_its_codes_come_back_byte_for_byte(tmp_path: Path) -> None:
    train = save_train(compressed(granularity="channel"), tmp_path / "train")
    packed = pack_run(train, tmp_path / "m.slope")
    checkpoint = load_file(train / "checkpoint.safetensors")
    kept = kept_of_checkpoint(train / "checkpoint.safetensors", packed.codes)
    assert list(packed.tensors) == list(kept) == sorted(name for name in checkpoint if ".parametrizations." not in name)
    assert all(same(packed.tensors[name], checkpoint[name]) and same(kept[name], checkpoint[name]) for name in kept)
    assert packed.restore(tmp_path / "out") == [
        tmp_path / "out/codes.safetensors",
        tmp_path / "out/tensors.safetensors",
    ]
    assert (tmp_path / "out/codes.safetensors").read_bytes() == (train / "codes.safetensors").read_bytes()
    save_file({name: checkpoint[name] for name in kept}, tmp_path / "by-safetensors")
    assert (tmp_path / "out/tensors.safetensors").read_bytes() == (tmp_path / "by-safetensors").read_bytes()
    packed.check()
    with pytest.raises(ArtifactError, match=r"codes\.safetensors exists already"):
        packed.restore(tmp_path / "out")


def test_a_run_and_its_model_give_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = compressed()
    pack_run(save_train(model, tmp_path / "train"), tmp_path / "a.slope")
    pack_model(model, tmp_path / "b.slope")
    pack_model(model, tmp_path / "b.slope")  # over an existing file
    assert (tmp_path / "a.slope").read_bytes() == (tmp_path / "b.slope").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.slope", "b.slope", "train"]


def test_sizes_add_up_to_the_file(tmp_path: Path) -> None:
    packed = sc.pack(compressed(), tmp_path / "m.slope")
    sizes = packed.sizes
    assert sizes.model == (tmp_path / "m.slope").stat().st_size == sizes.weights + sizes.others + sizes.rest
    rows = {row.name: row for row in sizes.tensors}
    assert sum(row.packed for row in sizes.tensors if row.dtype == "codes") == sizes.weights
    middle = rows["3.weight"]
    assert (middle.bits, middle.pattern, middle.elements, middle.nominal) == (4, "2:4", 16 * 8 * 9, 16 * 8 * 9 // 4)
    assert rows["1.running_mean"].dtype == "F32" and rows["1.running_mean"].nominal == 32
    assert begins_packed(packed.path) and not begins_packed(tmp_path) and "codes=3" in repr(packed)


class Everything(nn.Module):
    """Every type that a state dict may hold, scalars, nothing, a tied weight and a layer of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)
        self.again = self.a
        self.norm, self.tied = nn.LayerNorm(16), nn.LayerNorm(16)
        self.tied.weight = self.norm.weight
        kinds = [
            torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
            torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
        ]  # fmt: skip
        for kind in kinds:
            values = torch.arange(6).reshape(2, 3).to(torch.bool if kind is torch.bool else torch.float32).to(kind)
            self.register_buffer(str(kind).replace("torch.", "of_"), values)
        self.register_buffer("scalar", torch.tensor(3))
        self.register_buffer("nothing", torch.zeros(0, 4, dtype=torch.bfloat16))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0, float("inf")]))


def test_every_type_and_tied_tensors_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything()
    sc.compress(model)
    packed = sc.pack(model, tmp_path / "m.slope")
    rows = {row.name: row for row in packed.sizes.tensors}
    assert rows["norm.weight"].packed and not rows["tied.weight"].packed  # kept once
    other = Everything()
    for tensor in other.state_dict().values():
        tensor.zero_()
    sc.load(tmp_path / "m.slope", other)
    fold(model)
    for name, tensor in model.state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        flat = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found, tensor)]
        assert torch.equal(*flat), name
    restored = packed.restore(tmp_path / "out")[1]
    with safe_open(restored, "pt") as file:
        assert set(file.keys()) == set(packed.tensors)
        assert file.get_tensor("of_bfloat16").dtype is torch.bfloat16


def test_a_model_that_does_not_fit_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.slope"
    sc.pack(compressed(), path)
    narrow = nn.Sequential(*[*net()][:-1], nn.Linear(16, 5))
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    with pytest.raises(ModelError, match=r"7\.bias is F32 \[10\] in the file, F32 \[5\] in the model"):
        sc.load(path, narrow)
    assert all(torch.equal(before[name], tensor) for name, tensor in narrow.state_dict().items())
    with pytest.raises(ModelError, match=r"0\.bias, 0\.weight.* not in the model"):
        sc.load(path, nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"8\.bias, 8\.weight not in the file"):
        sc.load(path, nn.Sequential(*net(), nn.Linear(10, 2)))
    with pytest.raises(ModelError, match="F16"):
        sc.load(path, net().half())
    with pytest.raises(ModelError, match="before it was compressed"):
        sc.load(path, compressed())


def test_a_model_without_memory_or_with_what_is_no_tensor_is_not_loaded(tmp_path: Path) -> None:
    class Extra(nn.Sequential):
        extra: Any = ()

        def get_extra_state(self) -> Any:
            return self.extra and self.extra.clone()

        def set_extra_state(self, state: Any) -> None:
            pass

    path = tmp_path / "m.slope"
    sc.pack(compressed(), path)
    with pytest.raises(ModelError, match=r"'0\.weight' of the model's state dict is on the meta device"):
        sc.load(path, net().to("meta"))
    model = Extra(*net())
    with pytest.raises(ModelError, match="'_extra_state' of the model's state dict is tuple: no plain tensor"):
        sc.load(path, model)
    sc.compress(model, bits=4)
    with pytest.raises(ModelError, match="'_extra_state' of the model's state dict is tuple: no plain tensor"):
        sc.pack(model, path)
    model.extra = torch.ones(1)
    sc.pack(model, path)
    fold(model)
    with pytest.raises(ModelError, match="'_extra_state' of the model's state dict is neither a parameter nor a"):
        sc.load(path, model)


def test_one_tensor_is_not_given_two_values(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            if tied:
                self.b.weight = self.a.weight

    torch.manual_seed(0)
    model = Tied(tied=False)
    sc.compress(model)
    sc.pack(model, tmp_path / "m.slope")
    sc.load(tmp_path / "m.slope", Tied(tied=False))
    other = Tied(tied=True)
    before = other.a.weight.clone()
    with pytest.raises(ModelError, match=r"'a\.weight' and 'b\.weight' are one tensor in the model"):
        sc.load(tmp_path / "m.slope", other)
    assert torch.equal(other.a.weight, before)


def test_a_damaged_file_leaves_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.slope"
    sc.pack(compressed(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="sha256 differs"):
        sc.load(path, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_no_compressed_model_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.slope"
    with pytest.raises(ModelError, match="not compressed"):
        sc.pack(net(), out)
    model = compressed()
    model.register_buffer("meta", torch.zeros(2, device="meta"))
    with pytest.raises(ModelError, match="no plain tensor"):
        sc.pack(model, out)
    model = compressed()
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ModelError, match="complex128"):
        sc.pack(model, out)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_codes_is_refused(tmp_path: Path) -> None:
    train, out = save_train(compressed(), tmp_path / "train"), tmp_path / "m.slope"
    codes = dict(StoredCodes(train / "codes.safetensors"))
    fewer = {name: coded for name, coded in codes.items() if name != "3.weight"}
    save_codes(train / "codes.safetensors", fewer)
    with pytest.raises(ArtifactError, match=r"3\.parametrizations\.weight\.original.*no coded tensor"):
        pack_run(train, out)
    save_codes(train / "codes.safetensors", codes | {"x.weight": codes["3.weight"]})
    with pytest.raises(ArtifactError, match=r"x\.parametrizations\.weight\.0\.step"):
        pack_run(train, out)
    (train / "checkpoint.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ArtifactError, match="cannot be read"):
        pack_run(train, out)
    (train / "codes.safetensors").unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        pack_run(train, out)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_law_that_is_broken_in_memory_is_not_packed(tmp_path: Path) -> None:
    good = random_codes((8, 8), pattern=(2, 4))
    kept = write.KeptTensors({}, lambda name: np.zeros(0), [], "it")
    for name, bad in {
        "range": {"bits": 2}, "pattern": {"pattern": (1, 4)}, "axis": {"axis": 5}, "scale": {"scale": -good.scale},
    }.items():  # fmt: skip
        broken = type(good)(**(good.__dict__ | bad))
        with pytest.raises(ArtifactError):
            write._packed_model({name: broken}, kept, tmp_path / "m.slope")
    assert not list(tmp_path.iterdir())


def test_written_bytes_that_are_not_what_was_packed_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, out = save_train(compressed(), tmp_path / "train"), tmp_path / "m.slope"
    pack_run(train, out)
    before = out.read_bytes()

    class Wrong(Packed):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            if path != out:
                self.tensors._entries["0.bias"] = self.tensors._entries["1.bias"]  # of another tensor

    monkeypatch.setattr(write, "Packed", Wrong)
    with pytest.raises(CheckFailedError, match=r"0\.bias"):
        pack_run(train, out)
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["m.slope", "train"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_writing_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.slope"
    out.write_bytes(b"before")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(write, "write_container", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        pack_model(compressed(), out)
    assert out.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["m.slope"]


def test_what_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    def kept(name: str, array: Any) -> write.KeptTensors:
        return write.KeptTensors({name: "U8"}, lambda _: array, [], "it")

    with pytest.raises(ArtifactError, match="1000 characters"):
        write._packed_model({}, kept("x" * 1001, np.zeros(1, np.uint8)), tmp_path / "m.slope")
    zeros = np.broadcast_to(np.uint8(0), (1 << 20,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slope_compile.pack.audit.ALLOWANCE", 1 << 10)
        patch.setattr("slope_compile.pack.audit.INFLATION", 2)
        with pytest.raises(ArtifactError, match="would unpack to 1048576"):
            write._packed_model({}, kept("zeros", zeros), tmp_path / "m.slope")
    assert not list(tmp_path.iterdir())


def test_a_name_that_safetensors_keeps_for_itself(tmp_path: Path) -> None:
    kept = write.KeptTensors({"__metadata__": "U8"}, lambda _: np.zeros(3, np.uint8), [], "it")
    packed = write._packed_model({}, kept, tmp_path / "m.slope")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        packed.restore(tmp_path / "out")


def test_where_no_file_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no file"):
        pack_model(compressed(), tmp_path)
    with pytest.raises(StorageError, match="No such file"):
        pack_model(compressed(), tmp_path / "no" / "m.slope")


def test_metadata_of_codes_is_that_of_a_run(tmp_path: Path) -> None:
    sc.pack(compressed(), tmp_path / "m.slope").restore(tmp_path / "out")
    rows = json.loads(safe_open(tmp_path / "out/codes.safetensors", "np").metadata()["coded_tensors"])
    assert rows["3.weight"] == {"bits": 4, "axis": 0, "pattern": "2:4"}
    assert open_packed(tmp_path / "m.slope").codes.pattern("3.weight") == (2, 4)
