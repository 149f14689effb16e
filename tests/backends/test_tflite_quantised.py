"""LiteRT engines in half and in int8: parity with torch, what the runtime lists, what is refused, and the layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.backends import find_backend, tflite
from edgeprune.device import Device
from edgeprune.engine import Engine
from edgeprune.errors import InputError, MeasurementError
from edgeprune.exporting import as_pruned, export
from edgeprune.graph import trace
from edgeprune.measurement import Loaded
from edgeprune.parity import check_parity, samples
from edgeprune.transport import open_session
from tests.small_models import Net, redrawn

pytestmark = pytest.mark.contract

FORMS = {"fp32": ("fp32", "fp32"), "fp16": ("fp32", "fp16"), "dynamic": ("fp32", "int8"), "int8": ("int8", "fp32")}
"""Precision and weights."""
LIMITS = {"fp32": (0.0, 1e-5), "fp16": (1e-5, 2e-3), "dynamic": (2e-3, 3e-2), "int8": (2e-3, 3e-2)}
"""Least and largest max|a - b| / max|b|: below the least the arithmetic would not be what it is called."""
SHAPE = (1, 3, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def runtime(require: Callable[[str], None]) -> None:
    require("tflite")


def drawn(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, *shape[1:]), generator=torch.Generator().manual_seed(seed))


NET = redrawn(Net(16))
CALIBRATION = [(drawn(16),)]


def written(folder: Path, form: str, module: nn.Module = NET, shape: tuple[int, ...] = SHAPE, **more: Any) -> Engine:
    precision, weights = FORMS[form]
    given = as_pruned(module, (drawn(1, shape, seed=1),))
    if precision == "int8":
        more = {"calibration": CALIBRATION} | more
    folder.mkdir(exist_ok=True)
    return tflite.export(given, folder, precision, weights=weights, **more)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Engine]:
    return {form: written(tmp_path_factory.mktemp(form), form) for form in FORMS}


def answers(engine: Engine, batch: torch.Tensor) -> tuple[Loaded, np.ndarray[Any, Any]]:
    """What was said when it was loaded, and the output for each picture."""
    with open_session(
        Device(name="d", backend="tflite", precisions=("fp32", "int8")), precision=engine.precision
    ) as session:
        loaded = session.load("engine", engine.path)
        found = [session.run("engine", [picture[None].numpy()])[0] for picture in batch]
    return loaded, np.concatenate(found)


def error(found: np.ndarray[Any, Any], batch: torch.Tensor, module: nn.Module = NET) -> float:
    with torch.no_grad():
        wanted = module(batch).numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("form", FORMS)
def test_each_form_computes_what_torch_computes_to_its_own_limit(form: str, engines: Mapping[str, Engine]) -> None:
    batch = drawn(8, seed=2)
    loaded, found = answers(engines[form], batch)
    least, most = LIMITS[form]
    assert least <= error(found, batch) <= most
    assert (loaded.inputs, loaded.outputs) == (engines["fp32"].inputs, engines["fp32"].outputs)  # floats, in all


@pytest.mark.parametrize(
    ("form", "listed"),
    [
        ("fp32", {"fp32": 6}),
        ("fp16", {"fp32": 6}),
        ("dynamic", {"int8 weights": 4, "fp32": 2}),  # the depthwise ones stay
        ("int8", {"int8": 6}),
    ],
)
def test_the_runtime_lists_what_computes_in_which(
    form: str, listed: dict[str, int], engines: Mapping[str, Engine]
) -> None:
    loaded, _ = answers(engines[form], drawn(1))
    assert loaded.notes["contractions"] == listed
    assert loaded.notes["ran_in"].get("int8", 0.0) >= 0.9 if form == "int8" else loaded.notes["ran_in"] == {"fp32": 1.0}


def test_xnnpacks_own_profile_says_so_too(engines: Mapping[str, Engine]) -> None:
    """QD8, or QDU8 where the CPU multiplies unsigned: quantised as they come; QC8: weights with a scale a channel."""
    runner: Any = importlib.import_module("edgeprune.backends.tflite.runner")
    if not runner.version().startswith(runner.PROFILED_VERSIONS):
        pytest.skip(f"the C interface of {runner.version()} is not known")

    def contractions(form: str) -> list[str]:
        tags = [tag for tag, _ in runner._profile(str(engines[form].path), 1)[0]]
        return [tag for tag in tags if tag.startswith(runner.WEIGHTED_TAGS)]

    assert len(contractions("int8")) == 6 and all("QC8" in tag for tag in contractions("int8"))
    dynamic = [tag for tag in contractions("dynamic") if "QD8" in tag or "QDU8" in tag]
    assert len(dynamic) == 4 and all("QC8W" in tag for tag in dynamic)
    assert not any("Q" in tag for form in ("fp32", "fp16") for tag in contractions(form))


def test_notes_say_how_it_is_stored_and_scaled_and_what_it_takes(engines: Mapping[str, Engine]) -> None:
    assert {form: engine.notes["weights"] for form, engine in engines.items()} == {
        "fp32": "fp32",
        "fp16": "fp16",
        "dynamic": "int8",
        "int8": "int8",
    }
    values = CALIBRATION[0][0]
    step = (float(values.max()) - float(values.min())) / 255
    name, scale, *_ = engines["int8"].notes["scales"].split()
    assert name == "x" and float(scale) == pytest.approx(step, rel=1e-5)
    assert engines["dynamic"].notes["least runtime"] == "TensorFlow Lite 2.17 (FULLY_CONNECTED version 12)"
    assert engines["int8"].notes["least runtime"] == "TensorFlow Lite 2.0 (FULLY_CONNECTED version 5)"


def test_a_calibration_counts_by_its_values_alone(tmp_path: Path) -> None:
    """Neither how it is cut into batches nor the order of these: ranges are the least and largest values."""
    singles = [(picture[None],) for picture in CALIBRATION[0][0]]
    whole = written(tmp_path / "whole", "int8").path.read_bytes()
    assert written(tmp_path / "singles", "int8", calibration=singles).path.read_bytes() == whole
    assert written(tmp_path / "reversed", "int8", calibration=singles[::-1]).path.read_bytes() == whole
    assert written(tmp_path / "fewer", "int8", calibration=singles[:1]).path.read_bytes() != whole


@pytest.mark.parametrize(
    ("precision", "more", "said"),
    [
        ("int8", {}, "int8 takes calibration data"),
        ("int8", {"calibration": [(drawn(2, (1, 3, 8, 8)),)]}, r"calibration batch 0 has \(2, 3, 8, 8\), the network"),
        ("int8", {"calibration": [()]}, r"calibration batch 0 has no tensors, the network takes \(1, 3, 16, 16\)"),
        ("int8", {"calibration": CALIBRATION, "weights": "fp16"}, "can't store weights as 'fp16' at int8"),
        ("fp32", {"weights": "int4"}, "can't store weights as 'int4' at fp32; known: fp32, fp16, int8"),
        ("bf16", {}, "no arithmetic in bf16"),
        ("fp32", {"layout": "channels_fist"}, "no layout 'channels_fist'; did you mean 'channels_first'"),
    ],
)
def test_what_is_refused_says_why(precision: str, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        tflite.export(as_pruned(NET, (drawn(1),)), tmp_path, precision, **more)
    assert list(tmp_path.iterdir()) == []


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.norm(x))
        return y


def results(engine: Engine) -> dict[str, str]:
    """Operator to the dtype of its output."""
    flatbuffer: Any = importlib.import_module("edgeprune.backends.tflite.flatbuffer")
    model = flatbuffer.parsed(engine.path.read_bytes())
    tensors = model.subgraphs[0].tensors
    return {
        flatbuffer.kind(model, operator): flatbuffer.dtype(tensors[operator.outputs[0]])
        for operator in model.subgraphs[0].operators
    }


def test_a_norm_over_a_width_stays_in_floats_and_the_mean_of_a_picture_does_not(
    engines: Mapping[str, Engine], tmp_path: Path
) -> None:
    shape = (1, 9, 24)
    module, batch = redrawn(Normed()), drawn(16, shape)
    engine = written(tmp_path, "int8", module, shape, calibration=[(batch,)])
    made = results(engine)
    assert {made[name] for name in ("MEAN", "SQUARED_DIFFERENCE", "RSQRT")} == {"float32"}
    assert made["FULLY_CONNECTED"] == results(engines["int8"])["MEAN"] == "int8"
    assert error(answers(engine, batch)[1], batch, module) <= 2e-2


class Streamed(nn.Module):
    """A residual branch behind a layer norm, as in a transformer, with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


def test_beside_layer_norms_linears_alone_are_integers_in_the_file_and_in_the_plan(tmp_path: Path) -> None:
    shape = (1, 9, 24)
    module = redrawn(Streamed())
    made = results(written(tmp_path, "int8", module, shape, calibration=[(drawn(16, shape),)]))
    assert (made["FULLY_CONNECTED"], made["ADD"], made["GELU"]) == ("int8", "float32", "float32")
    units = find_backend("tflite").partition(trace(module, (torch.randn(shape),)), "int8")
    precisions = {unit.name: unit.dense.precision for unit in units}
    assert {name for name, precision in precisions.items() if precision == "int8"} == {"up", "down"}
    assert len(precisions) > 2


def test_what_makes_up_a_norm_is_found_with_a_scale_and_reshapes_on_the_way() -> None:
    from edgeprune.backends.tflite.exporting import floats
    from edgeprune.tflite_file import TfliteFile

    file = TfliteFile()
    x = file.input("x", (1, 9, 24))
    axis, narrow, wide = file.integers([2]), (1, 9), (1, 9, 1)
    mean = file.operator("MEAN", [x, axis], narrow)
    flat = file.operator("RESHAPE", [mean, file.integers(wide)], wide)
    squares = file.operator("SQUARED_DIFFERENCE", [x, flat], (1, 9, 24))
    variance = file.operator("ADD", [file.operator("MEAN", [squares, axis], wide), eps(file)], wide)
    scale = file.operator("MUL", [file.operator("RSQRT", [variance], wide), eps(file, 24)], (1, 9, 24))
    normed = file.operator("MUL", [file.operator("SUB", [x, flat], (1, 9, 24)), scale], (1, 9, 24))
    after = file.operator("ADD", [normed, eps(file, 24)], (1, 9, 24))
    y = file.operator("MEAN", [file.operator("ADD", [after, x], (1, 9, 24)), axis], narrow)  # no norm's
    found = floats(file.to_bytes({"y": y}))
    assert set(found) >= {file.tensors[index].name for index in (mean, flat, squares, variance, scale, normed)}
    assert not set(found) & {file.tensors[index].name for index in (after, after + 1, y)}
    assert len(found) == 9  # and the mean of squares, the root and the difference


def eps(file: Any, width: int = 1) -> int:
    return int(file.constant(np.full((width,), 1e-5, np.float32)))


def test_images_with_their_channels_last_are_not_turned(tmp_path: Path) -> None:
    """By the option of a device; what torch gives is compared with what the engine gives for the turned image."""
    device = Device(name="last", backend="tflite", precisions=("fp32", "int8"), options={"layout": "channels_last"})
    engine = export(as_pruned(NET, (drawn(1, seed=1),)), device, tmp_path / "engine", weights="fp16")
    first = written(tmp_path / "first", "fp16")
    assert [(spec.name, spec.shape) for spec in engine.inputs] == [("x", (1, 16, 16, 3))]
    assert int(engine.notes["layout changes"]) == int(first.notes["layout changes"]) - 1
    assert (engine.notes["layout"], first.notes["layout"]) == ("channels last", "channels first")
    assert engine.pruned is not None
    with open_session(device) as session:
        session.load("engine", engine.path)
        assert check_parity(session, "engine", engine, samples(engine.pruned)).error <= 2e-3
        with pytest.raises(MeasurementError, match="expected"):
            session.run("engine", [drawn(1).numpy()])
    quantised = written(tmp_path / "int8", "int8", layout="channels_last")
    assert quantised.notes["scales"] == written(tmp_path / "int8 first", "int8").notes["scales"]


def test_a_runtime_with_one_layout_says_so(require: Callable[[str], None], tmp_path: Path) -> None:
    require("onnxruntime")
    device = Device(name="d", backend="onnxruntime", options={"layout": "channels_last"})
    with pytest.raises(InputError, match="device 'd' has an option 'layout', but onnxruntime writes only one"):
        export(as_pruned(NET, (drawn(1),)), device, tmp_path / "engine")


def test_a_network_is_converted_once_and_another_weight_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion: Any = importlib.import_module("edgeprune.backends.tflite.conversion")
    asked: list[str] = []

    def answer(request: dict[str, Any], target: Path, failed: str) -> bytes:
        asked.append(request["do"])
        return b"%d" % len(asked)

    monkeypatch.setattr(conversion, "_answer", answer)
    monkeypatch.setattr(conversion, "_CONVERTED", type(conversion._CONVERTED)())
    module = redrawn(Net(4))

    def made() -> bytes:
        content, names = conversion.convert(module, (drawn(1),), channels_last=False)
        assert names == ["x"]
        return bytes(content)

    assert [made(), made()] == [b"1", b"1"]
    with torch.no_grad():
        module.state_dict()["head.bias"][0] += 1e-3
    assert [made(), made()] == [b"2", b"2"]
    module.train()  # the same in evaluation, which is what is exported
    assert made() == b"2" and asked == ["convert", "convert"]
