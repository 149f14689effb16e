"""The quality gate: an engine that answers worse than was asked for is not handed over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeprune.benching import device_for
from edgeprune.bundle import read_bundle
from edgeprune.data import Data, load_data
from edgeprune.engine import Engine
from edgeprune.errors import InputError, QualityError, did_you_mean
from edgeprune.parity import Sample, fed, shape_in_torch
from edgeprune.preprocessing import Preprocessing
from edgeprune.quality import Outputs, Quality, compare, evaluate, outputs
from edgeprune.transport import Session, open_session

if TYPE_CHECKING:
    from edgeprune.device import Device

SHARES = ("top1", "agreement")
DISTANCES = ("kl", "relative_error")
_WANTED = re.compile(r"(?:(?P<metric>[a-z0-9_]+):)?(?P<value>[0-9]*\.?[0-9]+)(?P<percent>%?)")


@dataclass(frozen=True, kw_only=True)
class MinQuality:
    """The least share of `top1` or `agreement`, or the largest `kl` or `relative_error`, that is handed over.

    Without a `metric`: `top1` where the data has labels, else `agreement`.
    """

    metric: str | None
    value: float

    def named(self, data: Data | None) -> MinQuality:
        """With the metric that the data allows; `InputError` where it allows none."""
        if data is None:
            raise InputError("--min-quality needs data to judge by: give it with --data")
        metric = self.metric or ("top1" if data.labels is not None else "agreement")
        if metric == "top1" and data.labels is None:
            raise InputError("--min-quality top1 needs labels, the data has none; `agreement` needs none")
        return MinQuality(metric=metric, value=self.value)

    def check(self, quality: Quality) -> None:
        """`QualityError` where it is missed."""
        assert self.metric is not None
        found = getattr(quality, self.metric)
        if found is None:
            raise InputError(f"the model's output is no classification, so it has no {self.metric}; relative_error has")
        least = self.metric in SHARES
        if not (found >= self.value if least else found <= self.value):
            asked = "at least" if least else "at most"
            raise QualityError(
                f"{self.metric} is {found:.4g} on {quality.n} samples, {asked} {self.value:g} was asked for: no engine "
                "is handed over; a larger budget, more data for the repair or training the pruned network may help"
            )


def parse_min_quality(text: str) -> MinQuality:
    """`top1:0.9`, `agreement:95%`, `kl:0.1`, or a number alone."""
    match = _WANTED.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--min-quality {text!r} is not understood: expected METRIC:VALUE, such as top1:0.9 or 0.9")
    metric, value = match["metric"], float(match["value"]) / (100 if match["percent"] else 1)
    known = (*SHARES, *DISTANCES)
    if metric is not None and metric not in known:
        raise InputError(f"no metric '{metric}'{did_you_mean(metric, known)} (known: {', '.join(known)})")
    if metric not in DISTANCES and not 0 <= value <= 1:
        raise InputError(f"--min-quality {text}: a share lies between 0 and 1, or 0% and 100%")
    return MinQuality(metric=metric, value=value)


def engine_function(session: Session, key: str, engine: Engine) -> Callable[[torch.Tensor], torch.Tensor]:
    """A loaded engine as a function of its first input, on batches of any size up to its own.

    Other inputs are those of the example that it was exported with; a smaller batch is filled up.
    """
    size = engine.inputs[0].shape[0]
    others = [tensor.numpy() for tensor in engine.pruned.example_inputs[1:]] if engine.pruned else []
    if len(engine.inputs) > 1 + len(others):
        raise InputError(f"the engine takes {len(engine.inputs)} inputs, the data gives one")

    def answer(x: torch.Tensor) -> torch.Tensor:
        given = x.numpy().astype(engine.inputs[0].dtype)
        filled = np.concatenate([given, np.repeat(given[-1:], size - len(given), axis=0)])
        inputs = fed(engine, Sample(inputs=(filled, *others), outputs=()))
        return torch.from_numpy(session.run(key, inputs)[0][: len(given)])

    return answer


def engine_outputs(engine: Engine, device: Device, data: Data) -> Outputs:
    """What an engine answers to all the data, on its device."""
    with open_session(device, precision=engine.precision) as session:
        session.load("judged", engine.path)
        return outputs(engine_function(session, "judged", engine), data, batch_size=engine.inputs[0].shape[0])


def quality_of(engine: Engine, device: Device, data: Data, dense: torch.nn.Module) -> dict[str, Any]:
    """Of the dense module, of the pruned one, and of the engine where its arithmetic or weights are not fp32."""
    assert engine.pruned is not None
    reference = outputs(dense, data)
    found = {
        "dense": evaluate(dense, data, dense=reference),
        "pruned": evaluate(engine.pruned.module, data, dense=reference),
    }
    if not device.modelled and (engine.precision != "fp32" or engine.notes.get("weights", "fp32") != "fp32"):
        found["engine"] = compare(engine_outputs(engine, device, data), reference)
    return found


def judged(found: Mapping[str, Quality]) -> Quality:
    """What the gate looks at: the engine's own answers where they were asked for."""
    return found.get("engine", found["pruned"])


def quality_of_bundle(path: Path | str, data_spec: str, *, device: Device | None = None) -> tuple[Quality, Data]:
    """Of a bundle's engine, compared with the dense engine in it, and the data it was judged on."""
    bundle = read_bundle(path)
    device = device_for(bundle, device)
    if device.modelled:
        raise InputError(f"device '{device.name}' is modelled: its engine answers nothing that could be judged")
    file = bundle.folder / "preprocessing.json"
    preprocessing = Preprocessing.from_json(file) if file.is_file() else None
    dtype = getattr(torch, bundle.engine.inputs[0].dtype)
    data = load_data(data_spec, preprocessing, shape_in_torch(bundle.engine), dtype)
    dense = engine_outputs(bundle.dense, device, data) if bundle.dense is not None else None
    return compare(engine_outputs(bundle.engine, device, data), dense), data
