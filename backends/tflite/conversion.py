"""From a torch module to a .tflite file, and from that to a quantised one, in the converter's own process."""

from __future__ import annotations

import atexit
import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import EdgepruneError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

Sample = Mapping[str, npt.NDArray[Any]]
"""Input name in the file's signature to its values."""

CONVERTER = Path(__file__).with_name("converter.py")
KEPT = 2
"""Files that are remembered: the same network in another precision need not be converted again."""


class _Converter:
    """The converter's process, started when first needed and kept: its imports take as long as a small conversion."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def ask(self, request: Mapping[str, Any]) -> str | None:
        """None, or what the converter says is wrong; a process that died is told by its last words."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(CONVERTER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
            )
            atexit.register(self.close)
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:
            self.close()  # interrupted: the next answer would belong to this question
            raise
        if answer:
            error: str | None = json.loads(answer)["error"]
            return error
        code = self.process.wait()
        self.close()
        self.said.seek(0)
        words = [line.strip() for line in self.said.read().splitlines() if line.strip()]
        return words[-1] if words else f"exit code {code}"

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_CONVERTER = _Converter()
_CONVERTED: OrderedDict[str, bytes] = OrderedDict()


def convert(
    module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...], *, channels_last: bool
) -> tuple[bytes, list[str]]:
    """The module in evaluation mode as a file in float, and the names of its inputs.

    With `channels_last` an input of four dimensions is [n, h, w, c].
    """
    import torch

    from edgeprune.onnx_export import evaluating, first_line, fold_batch_norms, quiet
    from edgeprune.unsupported import unsupported

    name = type(module).__name__
    with tempfile.TemporaryDirectory(prefix="edgeprune-tflite-") as folder:
        source, target = Path(folder, "program.pt2"), Path(folder, "model.tflite")
        with quiet(), evaluating(module), torch.no_grad():
            exported, inputs = _turned(module, example_inputs) if channels_last else (module, example_inputs)
            try:
                program = torch.export.export(exported, inputs)
            except Exception as error:
                raise EdgepruneError(f"torch.export cannot trace {name}: {first_line(error)}") from error
            fold_batch_norms(program)
            names = _names(module, program, len(inputs)) if channels_last else list(program.graph_signature.user_inputs)
            key = _digest(program)
            if key in _CONVERTED:
                _CONVERTED.move_to_end(key)
                return _CONVERTED[key], names
            torch.export.save(program, source)
        wide = any(tensor.dtype in (torch.int64, torch.float64) for tensor in example_inputs)
        asked = {"do": "convert", "source": str(source), "target": str(target), "wide": wide}
        try:
            content = _answer(asked, target, f"litert_torch cannot convert {name}")
        except EdgepruneError as error:
            raise unsupported(program, error, "LiteRT") or error from None
    _CONVERTED[key] = content
    while len(_CONVERTED) > KEPT:
        _CONVERTED.popitem(last=False)
    return content, names


def quantise(
    content: bytes,
    name: str,
    *,
    samples: Sequence[Sample] = (),
    signature: str = "",
    floats: Sequence[str] = (),
    contractions_alone: bool = False,
) -> bytes:
    """The file with weights in int8; with `samples` its activations too, by the ranges that these have.

    `floats` names outputs of operators that stay in float then, `contractions_alone` leaves all but convolutions and
    linears in float. `name` is that of the network, for messages.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-tflite-") as folder:
        source, target, arrays = (Path(folder, file) for file in ("float.tflite", "int8.tflite", "samples.npz"))
        source.write_bytes(content)
        asked: dict[str, Any] = {"do": "quantise", "source": str(source), "target": str(target), "kind": "dynamic"}
        if samples:
            named: dict[str, Any] = {f"{i}.{name}": a for i, sample in enumerate(samples) for name, a in sample.items()}
            np.savez(arrays, **named)
            asked |= {"kind": "static", "samples": str(arrays), "signature": signature, "float": list(floats)}
            asked["contractions_alone"] = contractions_alone
        return _answer(asked, target, f"ai_edge_quantizer cannot quantise {name}")


def _answer(asked: Mapping[str, Any], target: Path, failed: str) -> bytes:
    fault = _CONVERTER.ask(asked)
    if fault is not None or not target.is_file():
        raise EdgepruneError(f"{failed}: {fault or 'it wrote nothing'}")
    return target.read_bytes()


def _turned(
    module: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The module behind inputs with their channels last, and such inputs."""
    import torch

    class ChannelsLast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.inner(*(x.permute(0, 3, 1, 2) if x.dim() == 4 else x for x in inputs))

    turned = ChannelsLast()
    turned.training = False  # this one alone: the module's own parts are `evaluating`
    return turned, tuple(x.permute(0, 2, 3, 1).contiguous() if x.dim() == 4 else x for x in example_inputs)


def _names(module: torch.nn.Module, program: ExportedProgram, count: int) -> list[str]:
    """Those of the module's own parameters, which a wrapper hides."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [name for name, told in inspect.signature(module.forward).parameters.items() if told.kind in kinds]
    return own[:count] if len(own) >= count else list(program.graph_signature.user_inputs)


def _digest(program: ExportedProgram) -> str:
    """Of the graph and all that it reads."""
    import torch

    digest = hashlib.sha256(str(program.graph).encode())
    for name, value in [*program.state_dict.items(), *program.constants.items()]:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    for spec in (program.range_constraints, [(x.dtype, tuple(x.shape)) for x in program.example_inputs[0]]):
        digest.update(repr(spec).encode())
    return digest.hexdigest()
