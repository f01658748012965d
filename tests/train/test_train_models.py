from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slope_compile.errors import ModelError
from slope_compile.recipe import ModelSection
from slope_compile.train.models import build_model
from slope_compile.train.weights import copy_matching


def build(name: str, classes: int = 10, size: int = 16, **keys: object) -> nn.Module:
    return build_model(ModelSection(name=name, **keys), classes, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/squeezenet1_1", 32),
        ("torchvision/googlenet", 32),  # has auxiliary heads, which must be off
        ("timm/test_resnet", 16),
        ("timm/test_vit", 32),  # was made for 160 px
        ("timm/test_mambaout", 32),
    ],
)
def test_library_models_get_the_head_and_take_the_size(name: str, size: int) -> None:
    model = build(name, classes=7, size=size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert model.training


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision/resnet81", "Did you mean 'resnet18'"),
        ("torchvision/deeplabv3_resnet50", "torchvision has no"),
        ("timm/rsnet18", "Did you mean 'resnet18'"),
        ("timm/qqqq", "timm.list_models()"),
        ("timm/hf-hub:someone/model", "timm has no model"),
        ("tim/resnet18", "Did you mean 'timm'"),
        ("resnet18", "torchvision/NAME"),
        ("nowhere.py:net", "no file nowhere.py"),
    ],
)
def test_an_unknown_model_gets_the_nearest_name(name: str, said: str) -> None:
    with pytest.raises(ModelError) as error:
        build(name)
    assert name.rpartition("/")[2].partition(":")[0] in str(error.value)
    assert said in str(error.value)


def test_a_model_that_does_not_take_the_size_says_so() -> None:
    with pytest.raises(ModelError, match=r"alexnet does not take 3 x 16 x 16 images"):
        build("torchvision/alexnet")


def test_small_stem_is_the_library_model_but_for_its_stem() -> None:
    plain, small = build("torchvision/resnet18", size=32), build("torchvision/resnet18", size=12, stem="small")
    conv = small.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.out_channels) == ((3, 3), (1, 1), (1, 1), 64)
    assert conv.bias is None
    assert isinstance(small.get_submodule("maxpool"), nn.Identity)
    differing = [k for k, t in small.state_dict().items() if t.shape != plain.state_dict()[k].shape]
    assert differing == ["conv1.weight"]


@pytest.mark.parametrize(("name", "said"), [("timm/test_vit", "patches"), ("timm/mixer_s32_224", "patches")])
def test_small_stem_is_refused_where_there_is_none(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=f"cannot have stem: small.*{said}"):
        build(name, size=32, stem="small")


def test_a_function_of_the_users_own_is_called_with_the_classes(net_file: Path) -> None:
    (net_file.parent / "neighbour.py").write_text("SIZE = 3")
    net_file.write_text("import neighbour\n" + net_file.read_text())
    assert build(f"{net_file}:net", classes=5, size=8)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def nett(classes): ...", "no function 'net'.*Did you mean 'nett'"),
        ("def net(classes): return 3", "returned int, not an nn.Module"),
        ("def net(classes):\n    raise ValueError('no luck')", r"ValueError: no luck .*mine\.py:2"),
        ("import sys; sys.exit(1)", r"could not be built: SystemExit"),
        ("def net(:", "SyntaxError"),
        ("from torch import nn\ndef net(classes): return nn.Flatten()", r"\(1, 192\), not with \(1, 10\) logits"),
        ("from torch import nn\ndef net(classes): return nn.Linear(7, 7)", "does not take 3 x 8 x 8 images"),
    ],
)
def test_what_goes_wrong_in_the_users_code_is_one_paragraph(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ModelError, match=said) as error:
        build(f"{tmp_path / 'mine.py'}:net", size=8)
    assert "\n" not in str(error.value)


def test_local_weights_are_loaded_strictly(net_file: Path, tmp_path: Path) -> None:
    name, path = f"{net_file}:net", tmp_path / "w.safetensors"
    source = build(name, size=8)
    state = source.state_dict()
    save_file(state, path)
    loaded = build(name, size=8, weights=str(path)).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)

    save_file({**{k: v for k, v in state.items() if k != "0.weight"}, "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"missing 0\.weight; unexpected extra"):
        build(name, size=8, weights=str(path))
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not a safetensors file"):
        build(name, size=8, weights=str(path))


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("torchvision/resnet18", "IMAGENET1K_V3", "Did you mean 'IMAGENET1K_V1'"),
        ("timm/resnet18", "a1_in2k", "Did you mean 'a1_in1k'"),
        ("timm/test_resnet", "nowhere.safetensors", "no file nowhere.safetensors"),
    ],
)
def test_unknown_weights_get_the_nearest_name(name: str, weights: str, said: str) -> None:
    with pytest.raises(ModelError) as error:
        build(name, size=32, weights=weights)
    assert said in str(error.value)


def test_library_weights_of_ones_own_model_are_refused(net_file: Path) -> None:
    with pytest.raises(ModelError, match=r"'DEFAULT'.*no library weights"):
        build(f"{net_file}:net", size=8, weights="DEFAULT")


def test_pretrained_weights_keep_everything_but_the_head() -> None:
    source, target = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 100)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)),
    )
    head = target[1].weight.clone()
    copy_matching(source, target, 100, "x")
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[1].weight, head)
    other = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Linear(8, 4))
    with pytest.raises(ModelError, match=r"0\.bias, 0\.weight"):
        copy_matching(source, other, 100, "x")
