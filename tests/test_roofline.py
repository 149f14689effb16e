"""A device that is known by its data sheet: the formula by hand, and nobody takes its numbers unknowingly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.backends.null.staircase import NULL
from edgeprune.backends.null.staircase import time_us as null_us
from edgeprune.device import Device, load_device, load_devices
from edgeprune.errors import DeviceError, InputError
from edgeprune.fingerprint import fingerprint_of
from edgeprune.kernel import Kernel
from edgeprune.modelled import backend_of
from edgeprune.profiling import profile
from edgeprune.roofline import Roofline, memory_bytes, padded_macs, time_us

pytestmark = pytest.mark.unit

LINEAR = Kernel(operator="linear", c_in=100, c_out=50, spatial=(10,), precision="fp16")
CONV = Kernel(
    operator="conv", c_in=64, c_out=64, spatial=(8, 8), window=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
)
ELSEWHERE = {name: device for name, device in load_devices().items() if device.roofline is not None}
HELLO = {"version": "1", "modelled": True}


def roofline(**parameters: float) -> Roofline:
    """2 GFLOPS are 1000 multiply-accumulates in a microsecond, 1 GB/s 1000 bytes."""
    told = {"peak_gflops": 2.0, "bandwidth_gbs": 1.0, **parameters}
    return Roofline.model_validate({**told, "conditions": "1 GHz", "sources": ["none"]})


def test_the_slower_of_arithmetic_and_memory_counts() -> None:
    # 10 rows x 100 x 50 multiply-accumulates; 1000 + 500 activations and 5000 weights of 2 bytes
    assert padded_macs(LINEAR, roofline()) == 50_000
    assert memory_bytes(LINEAR, roofline()) == 13_000
    assert time_us(LINEAR, roofline()) == 50.0
    assert time_us(LINEAR, roofline(peak_gflops=20.0)) == 13.0
    assert time_us(LINEAR, roofline(overhead_us=5, efficiency=0.5)) == 105.0


def test_widths_are_worked_on_in_steps() -> None:
    # 100 > 104 and 50 > 56
    assert padded_macs(LINEAR, roofline(c_in_step=8, c_out_step=8)) == 10 * 104 * 56
    assert time_us(LINEAR, roofline(c_in_step=8, c_out_step=8)) == 58.24


def test_weights_come_from_memory_and_activations_as_far_as_the_cache_lacks_room() -> None:
    half = 1500 / 2**20  # MB: half of the 3000 bytes of activations
    assert memory_bytes(LINEAR, roofline(cache_mb=half)) == 10_000 + 1_500
    assert memory_bytes(LINEAR, roofline(cache_mb=1)) == 10_000


def test_groups_have_rates_of_their_own() -> None:
    depthwise = replace(CONV, groups=64)
    assert time_us(CONV, roofline(bandwidth_gbs=1e6)) == pytest.approx(64 * 64 * 9 * 64 / 1000)
    assert time_us(depthwise, roofline(bandwidth_gbs=1e6)) == pytest.approx(64 * 9 * 64 / 1000)
    assert time_us(depthwise, roofline(bandwidth_gbs=1e6, grouped_gflops=1)) == pytest.approx(64 * 9 * 64 / 500)
    attention = Kernel(operator="attention", c_in=64, c_out=64, spatial=(10, 10), groups=4)
    assert time_us(attention, roofline(bandwidth_gbs=1e6, grouped_gflops=1)) == pytest.approx(12.8)
    assert time_us(attention, roofline(bandwidth_gbs=1e6, attention_gflops=1)) == pytest.approx(25.6)


@given(st.sampled_from(sorted(ELSEWHERE)), st.integers(1, 512), st.integers(1, 512))
def test_flat_between_steps_where_arithmetic_counts_and_never_falling(name: str, c_in: int, c_out: int) -> None:
    device = ELSEWHERE[name]
    assert device.roofline is not None
    kernel = replace(CONV, c_in=c_in, c_out=c_out, spatial=(56, 56), precision=device.precisions[0])
    wider = replace(kernel, c_in=c_in + 1), replace(kernel, c_out=c_out + 1)
    assert all(time_us(kernel, device.roofline) <= time_us(other, device.roofline) for other in wider)
    next_step = -(-c_out // device.roofline.c_out_step) * device.roofline.c_out_step
    assert padded_macs(kernel, device.roofline) == padded_macs(replace(kernel, c_out=next_step), device.roofline)


def test_the_null_device_is_one_set_of_parameters() -> None:
    # 2 us + 64 positions x 9 x 64 x 64 multiply-accumulates at 50,000 a microsecond
    assert null_us(CONV) == time_us(CONV, NULL) == 2 + 64 * 9 * 64 * 64 / 50_000


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_data_sheet_is_taken_knowingly(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{name}': no host to reach it by .*data sheet .*: --allow-modelled"):
        load_device(name)
    device = load_device(name, allow_modelled=True)
    assert device.modelled and device.computes and device.roofline is not None
    assert device.transport == "local"  # the formula runs here
    assert all("https://" in source for source in device.roofline.sources)


def test_the_runtime_partitions_and_the_roofline_tells_times(tmp_path: Path) -> None:
    device = load_device("jetson-orin-nano", allow_modelled=True)
    backend = backend_of(device, only_to_time=True)
    assert (backend.name, backend.modelled, backend.available()) == ("tensorrt", True, None)
    kernel = replace(CONV, precision="fp16")
    table = profile([kernel], device, table_path=tmp_path / "table.jsonl")
    assert (table.origin, table.facts["backend"], table.facts["precision"]) == ("modelled", "tensorrt", "fp16")
    # 5 us + 73,728 bytes of weights at 68 GB/s: longer than 2.4 MMAC at half of 5.12 TMAC/s; activations are cached
    assert table.latency_us(kernel, node=True) == pytest.approx(5 + 73.728 / 68, rel=1e-3)


def test_other_parameters_are_another_fingerprint() -> None:
    device = load_device("jetson-orin-nano", allow_modelled=True)
    assert device.roofline is not None
    slower = device.model_copy(update={"roofline": device.roofline.model_copy(update={"efficiency": 0.4})})
    assert fingerprint_of(device, "fp16", HELLO) != fingerprint_of(slower, "fp16", HELLO)


def test_how_kernels_are_built_belongs_to_the_fingerprint() -> None:
    """OpenVINO's were built in another way before: such rows are of other work. LiteRT's never were."""
    hello = {**HELLO, "modelled": False, "cpu": {"name": "a CPU"}}
    built, first = (fingerprint_of(Device(name="d", backend=name), "fp32", hello) for name in ("openvino", "tflite"))
    assert built.facts["kernels"] == 2 and "kernels of form 2" in built.describe()
    assert "kernels" not in first.facts and "kernels of form" not in first.describe()


def test_faults_of_a_roofline_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(
        """\
schema: 1
devices:
  a:
    backend: tensorrt
    roofline: {peak_gflops: 0, bandwidth_gbs: 1, conditions: x, sources: [y]}
  b:
    backend: tensorrt
    roofline: {peak_gflops: 1, conditions: x, sources: [y]}
"""
    )
    with pytest.raises(InputError) as caught:
        load_devices(path)
    assert "5: roofline.peak_gflops: input should be greater than 0, found 0" in str(caught.value)
    assert "8: device 'b' lacks 'roofline.bandwidth_gbs'" in str(caught.value)
