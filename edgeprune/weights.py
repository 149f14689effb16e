"""Files of weights: read as data, never run, and copied into a model only when every key fits."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from edgeprune.errors import WeightsError

NESTED_KEYS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
PICKLED = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
LISTED_KEYS = 4  # how many keys an error lists
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")  # in torchvision's own files


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Copy a file's tensors into the model, in place; `WeightsError` lists the keys that don't fit.

    The state_dict may lie under `state_dict`, `model` or `model_state_dict`, and its keys may all start with `module.`
    (DataParallel) or `_orig_mod.` (torch.compile). Counters of batches may be missing: evaluation reads none.
    """
    found = _state_dict(read_weights(path), path)
    expected = model.state_dict()
    if not any(_OLD_DENSENET.match(key) for key in expected):
        found = {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in found.items()}
    missing = [k for k in expected if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in found if k not in expected]
    shapes = [
        f"{k} (file {_shape(found[k])}, model {_shape(expected[k])})"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [_listed(name, keys) for name, keys in lists.items() if keys]
    if faults:
        raise WeightsError("the weights don't fit the model: " + "; ".join(faults), file=path)
    model.load_state_dict({**expected, **found})


def _listed(name: str, keys: list[str]) -> str:
    more = f", … ({len(keys)} in all)" if len(keys) > LISTED_KEYS else ""
    return f"{len(keys)} {name}: {', '.join(keys[:LISTED_KEYS])}{more}"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _state_dict(document: object, path: Path) -> dict[str, torch.Tensor]:
    for key in NESTED_KEYS:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
    if not isinstance(document, Mapping) or not document:
        raise WeightsError(f"holds a {type(document).__name__}, expected a state_dict of tensors", file=path)
    other = [str(key) for key, value in document.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise WeightsError(f"not a state_dict: no tensor under {_listed('keys', other)}", file=path)
    for prefix in PREFIXES:
        if all(str(key).startswith(prefix) for key in document):
            document = {key[len(prefix) :]: value for key, value in document.items()}
    return dict(document)


def read_weights(path: Path) -> object:
    """What a file of weights holds, on the CPU, without running anything in it."""
    if not path.is_file():
        raise WeightsError("no such file", file=path)
    if path.suffix == ".pt2":
        raise WeightsError(".pt2 files aren't accepted: torch reads pickles, which can run code, from them", file=path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(f"not a safetensors file: {error}", file=path) from None
    if path.suffix not in PICKLED:
        raise WeightsError("expected a .pth, .pt, .th or .safetensors file", file=path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"refused: it holds more than tensors{f' ({named[1]})' if named else ''}, and unpickling that could run "
            "code; save the state_dict alone, best as .safetensors",
            file=path,
        ) from None
    except (LookupError, ValueError, TypeError, AttributeError, EOFError):
        raise WeightsError("not a file of weights: neither zip nor pickle", file=path) from None
    except (RuntimeError, OSError) as error:
        reason = "TorchScript, which holds code" if "TorchScript" in str(error) else str(error).partition("\n")[0]
        raise WeightsError(f"not a readable file of weights: {reason}", file=path) from None


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256, in hex, over the sorted names, dtypes, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
