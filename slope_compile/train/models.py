"""Models by name: `torchvision/NAME`, `timm/NAME`, or a function of the user's own, `file.py:function`.

The function is called with the number of classes and returns an nn.Module. Naming a file in a recipe runs its code,
with the rights of whoever runs the recipe: read it first if it is not yours.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slope_compile.errors import ModelError, SlopeCompileError, nearest
from slope_compile.recipe import ModelSection
from slope_compile.train.detection.models import (
    build_detector,
    detector_names,
    detector_weights,
    fit_detector,
    is_detector,
    prove_detector,
)
from slope_compile.train.sources import USER_MODEL, is_local
from slope_compile.train.weights import copy_matching, load_local

LIBRARIES = ("torchvision", "timm")
PATCH = 8  # stride of a first convolution from which on it makes tokens, not feature maps
MANY = 40  # more known names than this are not listed in an error
OFFLINE = "Download them elsewhere and name the file in model.weights, or start from none: --set model.weights=null."


def build_model(
    section: ModelSection,
    classes: int,
    size: int = 224,
    load_weights: bool = True,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Build a classification model, or a detector, with a head of `classes` for 3 x size x size images.

    Args:
        section: The recipe's model section.
        classes: Size of the head; a detector has one more, the background.
        size: Side of the images in pixels; one image is run through the model to prove that it fits.
        load_weights: False leaves the model untrained (a checkpoint follows).
        note: Told where the head of a local weights file does not fit and is drawn anew.

    Raises:
        ModelError: If there is no such model, its weights do not fit, or such an image does not give `classes` logits.
        RecipeError: If another key does not fit a detector.
    """
    library, slash, name = section.name.partition("/")
    weights = section.weights if load_weights else None
    if user := USER_MODEL.fullmatch(section.name):
        model = _user_model(Path(user["file"]), user["function"], section, classes)
    elif library == "torchvision" and slash:
        model = _torchvision(name, section, classes, size, weights)
    elif library == "timm" and slash:
        model = _timm(name, section, classes, size, weights)
    else:
        raise ModelError(f"model.name '{section.name}' is of no form known.", _form_hint(library, section.name))
    if is_detector(model):
        fit_detector(model, section, size)
    elif section.stem == "small":
        _small_stem(model, section.name)
    if weights is not None and is_local(weights):
        drawn = load_local(model, Path(weights), classes + is_detector(model))
        if drawn and note:
            note(f"{weights} was made for other classes: {', '.join(drawn)} start untrained")
    _prove(model, section, classes, size)
    return model


def _form_hint(library: str, name: str) -> str:
    if "/" in name and not name.endswith(".py"):
        return nearest(library, LIBRARIES)
    return "Write torchvision/NAME, timm/NAME or file.py:function."


def _torchvision(name: str, section: ModelSection, classes: int, size: int, weights: str | None) -> nn.Module:
    from torchvision import models

    detectors = detector_names()
    _require(name, [*models.list_models(module=models), *detectors], "torchvision", "model", "model.name")
    enum = models.get_model_weights(name)
    from_library = section.weights is not None and not is_local(section.weights)
    if from_library:
        known = detector_weights(name) if name in detectors else list(enum.__members__)
        _require(str(section.weights), known, f"torchvision/{name}", "weights", "model.weights")
    if name in detectors:
        remedy = OFFLINE if from_library and weights is not None else ""
        detector: nn.Module = _guarded(section, lambda: build_detector(name, section, classes, weights), remedy)
        return detector
    settings = _torchvision_settings(models.get_model_builder(name), size, from_library)
    model: nn.Module = _guarded(section, lambda: models.get_model(name, weights=None, num_classes=classes, **settings))
    if from_library and weights is not None:
        settings.pop("init_weights", None)
        source = _guarded(section, lambda: models.get_model(name, weights=weights, progress=False, **settings), OFFLINE)
        copy_matching(source, model, len(enum[weights].meta["categories"]), f"{section.name} {weights}")
    return model


def _torchvision_settings(builder: Callable[..., nn.Module], size: int, from_library: bool) -> dict[str, Any]:
    """Return the arguments that some model classes take: a fixed image size, no auxiliary heads."""
    returned = inspect.signature(builder, eval_str=True).return_annotation
    taken = inspect.signature(returned).parameters
    offered = {
        "image_size": size,
        "input_size": (size, size),
        "aux_logits": False,
        "init_weights": True,
        # Inception's and GoogLeNet's own weights expect inputs that the model rescales itself.
        "transform_input": from_library,
    }
    return {key: value for key, value in offered.items() if key in taken}


def _timm(name: str, section: ModelSection, classes: int, size: int, weights: str | None) -> nn.Module:
    import timm

    base = name.partition(".")[0]
    _require(base, timm.list_models(), "timm", "model", "model.name")
    full, pretrained = name, False
    if section.weights is not None and not is_local(section.weights):
        tags = [
            known.partition(".")[2] for known in timm.list_pretrained(f"{base}*") if known.partition(".")[0] == base
        ]
        if section.weights.lower() != "default":
            _require(section.weights, [*tags, "default"], f"timm/{base}", "weights", "model.weights")
            full = f"{base}.{section.weights}"
        elif not tags:
            raise ModelError(
                f"timm has no weights for '{base}'.", "Set model.weights: null, or name a .safetensors file."
            )
        pretrained = weights is not None
    settings: dict[str, Any] = {"num_classes": classes}
    config = timm.models.get_pretrained_cfg(full, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        settings["img_size"] = size
    remedy = OFFLINE if pretrained else ""
    model: nn.Module = _guarded(section, lambda: timm.create_model(full, pretrained=pretrained, **settings), remedy)
    return model


def _user_model(path: Path, function: str, section: ModelSection, classes: int) -> nn.Module:
    if section.weights is not None and not is_local(section.weights):
        raise ModelError(
            f"model.weights '{section.weights}': a model of your own has no library weights.",
            "Name a local .safetensors file, or load them in your function.",
        )
    if not path.is_file():
        raise ModelError(f"model.name: there is no file {path}.", "Check the path.")
    specification = importlib.util.spec_from_file_location(f"slope_compile_model_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise ModelError(f"{path} cannot be imported.", "Is it a Python file?")
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does, so that it finds its neighbours
    try:
        _guarded(section, lambda: specification.loader.exec_module(module))  # type: ignore[union-attr]
        make = getattr(module, function, None)
        if not callable(make):
            known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
            raise ModelError(f"{path} has no function '{function}'.", nearest(function, known))
        model = _guarded(section, lambda: make(classes))
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not isinstance(model, nn.Module):
        raise ModelError(f"{section.name} returned {type(model).__name__}, not an nn.Module.", "Return the model.")
    return model


def _require(name: str, known: Collection[str], where: str, what: str, key: str) -> None:
    if name not in known:
        hint = nearest(name, known)
        if hint.startswith("Known") and len(known) > MANY:
            hint = f"{where} lists its {len(known)} names in `{where}.list_models()`."
        raise ModelError(f"{key} '{name}': {where} has no {what} of that name.", hint)


def _guarded(section: ModelSection, build: Callable[[], Any], remedy: str = "") -> Any:
    """Run someone else's constructor: whatever it raises becomes one paragraph that names the line."""
    try:
        return build()
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"{section.name} could not be built: {_first_line(error)} ({frame.filename}:{frame.lineno}).",
            remedy or "Check model.name, model.classes and data.size.",
        ) from error


def _small_stem(model: nn.Module, name: str) -> None:
    """Make the first convolution 3x3 with stride 1, and the max-pool right after it the identity, in place."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    path, conv = layers[0] if layers else ("", None)
    if not isinstance(conv, nn.Conv2d):
        raise ModelError(f"{name} cannot have stem: small: it begins with no convolution.", "Set stem: default.")
    if max(conv.stride) >= PATCH:
        what = f"its first convolution cuts the image into {conv.stride[0]} x {conv.stride[1]} patches"
        raise ModelError(f"{name} cannot have stem: small: {what}.", "Set stem: default.")
    bias = conv.bias is not None
    _replace(model, path, nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=bias))
    if len(layers) > 1 and isinstance(layers[1][1], nn.MaxPool2d):
        _replace(model, layers[1][0], nn.Identity())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _prove(model: nn.Module, section: ModelSection, classes: int, size: int) -> None:
    """Run one black image: a model that does not fit the images fails here, not in the middle of training."""
    training = model.training
    model.eval()
    try:
        if is_detector(model):
            prove_detector(model, section, classes, size)
            model.train(training)
            return
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, size, size))
    except SlopeCompileError:
        raise
    except Exception as error:
        because = "stem: small changes the shapes inside it" if section.stem == "small" else "it may need larger images"
        raise ModelError(
            f"{section.name} does not take 3 x {size} x {size} images: {_first_line(error)}.",
            f"Change data.size ({because}), or choose another model.",
        ) from error
    model.train(training)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{section.name} answers one image with {shape}, not with (1, {classes}) logits.",
            "Give it a head of that size.",
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
