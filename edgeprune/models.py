"""Models by name, their weights, and their example inputs.

A factory `pkg.mod:factory` is code that the user names and is run; files of weights are data and never run.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from edgeprune.errors import InputError, RuntimeMissing, WeightsError, did_you_mean, install_line
from edgeprune.weights import load_weights
from edgeprune.weights import weights_hash as weights_hash

DEFAULT = "DEFAULT"
MAX_ELEMENTS = 2**31  # of one input; more is a slip in --shape
ModelFunction = Callable[[torch.Tensor], object]  # a torch module or an engine: batch in, output or outputs out
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
}


def resolve(spec: str, *, weights: str | Path | None = None, seed: int = 0) -> torch.nn.Module:
    """The model that `spec` names, in evaluation mode.

    `spec` is `torchvision:NAME`, `timm:NAME` or `pkg.mod:factory` (called without arguments). Without `weights` it
    is initialised at random from `seed`, whatever the global generator's state, which stays as it is. `weights` is a
    file (.pth, .pt, .th, .safetensors) or `DEFAULT`, the download of torchvision or timm.
    """
    kind, separator, name = spec.partition(":")
    if not separator or not kind or not name:
        known = "torchvision:NAME, timm:NAME, hf:FOLDER or pkg.mod:factory"
        hint = " (a .pt2 file isn't accepted: torch reads pickles from it)" if spec.endswith(".pt2") else ""
        raise InputError(f"model '{spec}' is none of {known}{hint}")
    build = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}.get(kind)
    file = None if weights is None or str(weights) == DEFAULT else Path(weights)
    if file is not None and not file.is_file():
        raise WeightsError("no such file", file=file)
    with torch.random.fork_rng(devices=[]), redirect_stdout(sys.stderr):  # torch.hub and factories may print
        torch.manual_seed(seed)
        if build is not None:
            model = build(name, str(weights) == DEFAULT)
        elif str(weights) == DEFAULT:
            raise WeightsError(f"--weights DEFAULT is for torchvision: and timm: models; let {spec} load its own")
        else:
            model = call_factory(spec, "model")
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{spec} gives a {type(model).__name__}, expected a torch.nn.Module")
    if file is not None:
        load_weights(model, file)
    return model.eval()


def _torchvision(name: str, pretrained: bool) -> Any:
    models = import_or_explain("torchvision", "vision").models
    if name not in models.list_models():
        raise InputError(f"torchvision has no model '{name}'{did_you_mean(name, models.list_models())}")
    taken = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": DEFAULT if pretrained else None}
    if "weights_backbone" in taken:
        options["weights_backbone"] = None
    if not pretrained and name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # their default, but named: left out, it warns
    with _download_errors(f"torchvision:{name}"):
        return models.get_model(name, **options)


def _timm(name: str, pretrained: bool) -> Any:
    timm = import_or_explain("timm", "vision")
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise InputError(f"timm has no model '{name}'{did_you_mean(base, timm.list_models())}")
    with _download_errors(f"timm:{name}"):
        return timm.create_model(name, pretrained=pretrained)


def _hugging_face(name: str, pretrained: bool) -> Any:
    raise InputError(f"hf:{name}: Hugging Face folders can't be read yet; name a factory, pkg.mod:factory")


@contextmanager
def _download_errors(what: str) -> Iterator[None]:
    """Turns what a failed download raises, whichever client it came from, into one message."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "huggingface_hub" not in type(error).__module__:
            raise
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"cannot download the weights of {what}: {reason}; fetch the file and pass --weights FILE"
        ) from error


def import_or_explain(package: str, extra: str) -> Any:
    """The imported package; `RuntimeMissing` with the line that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise RuntimeMissing(f"{package} can't be imported: {error}; {install_line(extra)}") from error
        raise RuntimeMissing(f"{package} isn't installed: {install_line(extra)}") from None


def call_factory(spec: str, what: str) -> Any:
    """Import `pkg.mod:name` (the current folder is searched last) and call it without arguments."""
    module_name, _, attribute = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"{what} '{spec}': {module_name} can't be imported: {error}") from error
        known = ["torchvision", "timm", "hf"]
        raise InputError(f"{what} '{spec}': no module '{error.name}'{did_you_mean(module_name, known)}") from None
    except Exception as error:
        raise InputError(f"{what} '{spec}': importing {module_name} failed: {_told(error)}") from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise InputError(f"{what} '{spec}': no '{attribute}' in {module_name}{did_you_mean(attribute, dir(module))}")
    if not callable(factory):
        raise InputError(f"{what} '{spec}': '{attribute}' isn't callable but a {type(factory).__name__}")
    try:
        return factory()
    except Exception as error:
        raise InputError(f"{what} '{spec}' failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One example input: `[NAME=]DTYPE:SHAPE[:RANGE|FILE]`, RANGE being `LOW..HIGH`, both included."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str | None = None
    range: tuple[float, float] | None = None
    file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """`InputError` says which part isn't what it should be."""
        name, equals, rest = text.partition("=")
        if not equals:
            name, rest = "", text
        dtype, _, rest = rest.partition(":")
        shape, _, source = rest.partition(":")
        if dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise InputError(f"--input '{text}': no dtype '{dtype}'{did_you_mean(dtype, _DTYPES)} (known: {known})")
        sizes = parse_shape(shape, f"--input '{text}'")
        low, dots, high = source.partition("..")
        try:
            bounds = (float(low), float(high)) if dots else None
        except ValueError:
            bounds = None
        if bounds and not bounds[0] <= bounds[1]:
            raise InputError(f"--input '{text}': the range {source} is empty")
        file = Path(source) if source and bounds is None else None
        return cls(dtype=_DTYPES[dtype], shape=sizes, name=name or None, range=bounds, file=file)

    def tensor(self, generator: torch.Generator) -> torch.Tensor:
        """Its values: the file's, else random within the range; without one, normal (floats) or 0 and 1 (the rest)."""
        if self.file is not None:
            return self._read(self.file)
        if self.dtype.is_floating_point:
            if self.range is None:
                return torch.randn(self.shape, generator=generator).to(self.dtype)
            low, high = self.range
            return (low + (high - low) * torch.rand(self.shape, generator=generator)).to(self.dtype)
        low, high = self.range or (0, 1)
        return torch.randint(int(low), int(high) + 1, self.shape, generator=generator).to(self.dtype)

    def _read(self, file: Path) -> torch.Tensor:
        try:
            values = torch.from_numpy(np.load(file, allow_pickle=False))
        except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            raise InputError(f"not a .npy file of numbers: {error}", file=file) from None
        if tuple(values.shape) != self.shape:
            raise InputError(f"holds shape {_x(values.shape)}, expected {_x(self.shape)}", file=file)
        return values.to(self.dtype)


def parse_shape(text: str, what: str = "--shape") -> tuple[int, ...]:
    """`1x3x224x224` as four numbers."""
    sizes = text.split("x")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(f"{what}: expected sizes like 1x3x224x224, found '{text}'")
    shape = tuple(int(size) for size in sizes)
    if prod(shape) > MAX_ELEMENTS:
        raise InputError(f"{what}: {text} has {prod(shape)} elements, more than {MAX_ELEMENTS}")
    return shape


def example_inputs(
    shape: str | None = None, inputs: Sequence[str] = (), *, model: torch.nn.Module | None = None, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """The tensors a model is traced and timed with, from `--shape` (one float32 input) or `--input` (see `InputSpec`).

    Named inputs take their place from `model.forward`, whose first parameters they must be.
    """
    if (shape is None) == (not inputs):
        raise InputError("give either --shape, like 1x3x224x224, or --input, like float32:1x3x224x224")
    if shape is not None:
        specs = [InputSpec(dtype=torch.float32, shape=parse_shape(shape))]
    else:
        specs = _in_order([InputSpec.parse(text) for text in inputs], model)
    generator = torch.Generator().manual_seed(seed)
    return tuple(spec.tensor(generator) for spec in specs)


def _in_order(specs: list[InputSpec], model: torch.nn.Module | None) -> list[InputSpec]:
    names = [spec.name for spec in specs if spec.name is not None]
    if model is None or not names:
        return specs
    if len(names) != len(specs) or len(set(names)) != len(names):
        raise InputError("name every --input once, or none")
    order = list(inspect.signature(model.forward).parameters)
    for name in names:
        if name not in order:
            raise InputError(
                f"the model has no input '{name}'{did_you_mean(name, order)} (its inputs: {', '.join(order)})"
            )
    if set(names) != set(order[: len(names)]):
        raise InputError(f"--input must name the model's first inputs, in any order: {', '.join(order[: len(names)])}")
    return sorted(specs, key=lambda spec: order.index(spec.name or ""))


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """All of the model in evaluation mode, and back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def output_tensor(output: object) -> torch.Tensor:
    """The tensor that a model's output is judged by: itself, or the first of a tuple, a mapping or a dataclass."""
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "__array__"):
        return torch.as_tensor(output)
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, list | tuple) and values:
        return output_tensor(values[0])
    raise InputError(f"the model's output is a {type(output).__name__}, expected a tensor or a collection of tensors")
