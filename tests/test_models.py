"""Models by name, weights as data, example inputs."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from edgeprune.errors import InputError, RuntimeMissing, WeightsError
from edgeprune.models import example_inputs, output_tensor, resolve, weights_hash
from edgeprune.weights import load_weights

pytestmark = pytest.mark.unit


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "def small(): return torch.nn.Linear(2, 3).train()\n"
        "def number(): return 3\n"
        "def broken(): raise KeyError('width')\n"
        "def chatty():\n    print('hello')\n    return torch.nn.Linear(2, 3)\n"
    )
    (tmp_path / "my_fault.py").write_text("import torch\nimport nowhere_to_be_found\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    monkeypatch.chdir(tmp_path)


def test_random_weights_come_from_the_seed_alone(factories: None) -> None:
    before = torch.get_rng_state()
    first, second, other = resolve("my_nets:small"), resolve("my_nets:small"), resolve("my_nets:small", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert not first.training
    assert weights_hash(first) == weights_hash(second) != weights_hash(other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "none of torchvision:NAME, timm:NAME"),
        ("model.pt2", "reads pickles"),
        ("hf:folder", "can't be read yet"),
        ("torchvison:resnet18", "no module 'torchvison'; did you mean 'torchvision'?"),
        ("my_nets:smal", "no 'smal' in my_nets; did you mean 'small'?"),
        ("my_nets:torch", "'torch' isn't callable but a module"),
        ("my_nets:number", "gives a int, expected a torch.nn.Module"),
        ("my_nets:broken", "failed: KeyError: 'width'"),
        ("my_fault:net", "nowhere_to_be_found"),
    ],
)
def test_what_is_no_model_is_told(factories: None, spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(spec)
    assert message in str(caught.value)


def test_a_factory_prints_beside_the_data(factories: None, capsys: pytest.CaptureFixture[str]) -> None:
    resolve("my_nets:chatty")
    assert capsys.readouterr() == ("", "hello\n")


def test_default_weights_of_a_factory_are_refused(factories: None) -> None:
    with pytest.raises(WeightsError, match="let my_nets:small load its own"):
        resolve("my_nets:small", weights="DEFAULT")


def test_torchvision_and_timm_names() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert weights_hash(resolve("torchvision:mobilenet_v2")) == weights_hash(resolve("torchvision:mobilenet_v2"))
    with pytest.raises(InputError, match="did you mean 'mobilenet_v2'"):
        resolve("torchvision:mobilenetv2")
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        resolve("timm:resnet_18")


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeMissing, match=r"pip install 'edgeprune\[vision\]'"):
        resolve("torchvision:resnet18")


def test_no_network_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")

    def no_network(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(WeightsError, match="cannot download.*pass --weights FILE"):
        resolve("torchvision:resnet18", weights="DEFAULT")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_lie_under_usual_keys_and_prefixes(tmp_path: Path, wrap: Callable[[Any], Any], prefix: str) -> None:
    source, target = net(), net()
    file = tmp_path / "weights.pth"
    torch.save(wrap({prefix + key: value for key, value in source.state_dict().items()}), file)
    load_weights(target, file)
    assert weights_hash(target) == weights_hash(source)


def test_safetensors_and_missing_counters(tmp_path: Path) -> None:
    source, target = net(), net()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({k: v for k, v in source.state_dict().items() if "num_batches" not in k}, file)
    load_weights(target, file)
    assert weights_hash(target) == weights_hash(source)


def test_old_densenet_keys_fit(tmp_path: Path) -> None:
    model = nn.Module()
    model.denselayer1 = nn.Module()
    model.denselayer1.norm1 = nn.BatchNorm2d(2)
    file = tmp_path / "densenet.pth"
    state = {k.replace("norm1", "norm.1"): v + 1 for k, v in model.state_dict().items()}
    torch.save(state, file)
    load_weights(model, file)
    assert model.state_dict()["denselayer1.norm1.weight"].tolist() == [2.0, 2.0]


def test_weights_that_do_not_fit_name_their_keys_and_change_nothing(tmp_path: Path) -> None:
    model = net()
    before = weights_hash(model)
    state = {
        "0.weight": torch.zeros(4, 3, 5, 5),
        "1.weight": torch.ones(4),
        **{f"x{i}": torch.ones(1) for i in range(6)},
    }
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "w.pt")
    message = str(caught.value)
    assert "3 missing: 1.bias, 1.running_mean, 1.running_var;" in message
    assert "6 unexpected: x0, x1, x2, x3, … (6 in all)" in message
    assert "1 of another shape: 0.weight (file 4x3x5x5, model 4x3x3x3)" in message
    assert weights_hash(model) == before


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, form: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "evil.pth"
    document = {"state_dict": {"0.weight": Malicious(marker)}}
    if form == "pickle":
        file.write_bytes(pickle.dumps(document, protocol=2))
    else:
        torch.save(document, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="refused|not a file of weights"):
        load_weights(net(), file)
    assert not marker.exists()


def test_other_classes_in_a_pickle_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"refused: it holds more than tensors \(argparse.Namespace\)"):
        load_weights(net(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"", "neither zip nor pickle"),
        ("w.pth", b"hello world", "neither zip nor pickle"),
        ("w.safetensors", b"hello world", "not a safetensors file"),
        ("w.pt2", b"PK", "pt2 files aren't accepted"),
        ("w.h5", b"x", "expected a .pth, .pt, .th or .safetensors"),
        ("missing.pth", None, "no such file"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(net(), tmp_path / name)
    assert name in str(caught.value)


def test_a_cut_off_file_and_a_bare_tensor(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(WeightsError, match="not a readable file"):
        load_weights(net(), file)
    torch.save(torch.ones(3), file)
    with pytest.raises(WeightsError, match="holds a Tensor, expected a state_dict"):
        load_weights(net(), file)


def test_the_hash_tells_bytes_shapes_dtypes_and_names_apart() -> None:
    def of(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_hash(module)

    ones = torch.ones(4)
    hashes = {of(a=ones), of(b=ones), of(a=ones * 2), of(a=ones.view(2, 2)), of(a=ones.half()), of(a=torch.tensor(1.0))}
    assert len(hashes) == 6
    assert of(a=ones, b=ones) == of(b=ones, a=ones)
    assert of(a=ones.bfloat16())


def test_shape_and_input_give_tensors(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    (image,) = example_inputs("2x3x4x4", seed=5)
    assert image.shape == (2, 3, 4, 4) and image.dtype == torch.float32
    assert torch.equal(image, example_inputs("2x3x4x4", seed=5)[0])
    ids, mask, x, plain = example_inputs(
        inputs=["int64:1x500:7..9", "bool:3", f"float32:2x3:{tmp_path / 'x.npy'}", "float16:500:-0.5..0.5"]
    )
    assert set(ids[0].tolist()) == {7, 8, 9} and mask.dtype == torch.bool
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and x.dtype == torch.float32
    assert plain.dtype == torch.float16 and -0.5 <= float(plain.min()) < -0.3 < 0.3 < float(plain.max()) <= 0.5


def test_named_inputs_take_the_places_of_the_parameters() -> None:
    class Two(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor, extra: None = None) -> torch.Tensor:
            return ids * mask

    first, second = example_inputs(inputs=["mask=bool:3", "ids=int64:4"], model=Two())
    assert (first.shape, second.shape) == ((4,), (3,))
    for inputs, message in [
        (["masc=bool:3"], "no input 'masc'; did you mean 'mask'"),
        (["mask=bool:3"], "first inputs, in any order: ids"),
        (["mask=bool:3", "int64:4"], "name every --input once, or none"),
    ]:
        with pytest.raises(InputError, match=message):
            example_inputs(inputs=inputs, model=Two())


@pytest.mark.parametrize("shape", ["", "1x3x", "1x-3", "axb", "1,3", "0x3", "99999x99999x3", "²x3"])
def test_faulty_shapes(shape: str) -> None:
    with pytest.raises(InputError, match="--shape"):
        example_inputs(shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("float31:1x3", "did you mean 'float32'"),
        ("1x3x4x4", "no dtype"),
        ("float32", "expected sizes"),
        ("int64:3:9..1", "empty"),
        ("float32:3:nowhere.npy", "nowhere.npy: not a .npy file"),
    ],
)
def test_faulty_inputs(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        example_inputs(inputs=[text])


def test_an_input_file_of_another_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match="holds shape 2x2, expected 3x2"):
        example_inputs(inputs=[f"float32:3x2:{tmp_path / 'x.npy'}"])
    with pytest.raises(InputError, match="either --shape"):
        example_inputs()


def test_the_output_that_counts() -> None:
    x = torch.ones(2)
    for output in (x, (x, 3), [x], {"out": x, "aux": x}, {"a": (x,)}, np.ones(2)):
        assert torch.equal(output_tensor(output).float(), x)
    with pytest.raises(InputError, match="a str"):
        output_tensor("x")
