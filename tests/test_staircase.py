"""Steps and ragged penalties are found from a few kernels, through noise, and none where there is none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.backends.null.staircase import time_us
from edgeprune.kernel import Kernel
from edgeprune.precision import check_computes
from edgeprune.staircase import (
    LEAST_STEP,
    NOT_NARROW,
    ONE_WIDTH,
    PROBED,
    PROBED_BETWEEN,
    PROBED_INSIDE,
    PROBED_NARROW,
    STEPS,
    Narrow,
    Staircase,
    Stairs,
    find_staircase,
    staircase_kernels,
)

pytestmark = pytest.mark.unit

KERNELS = staircase_kernels("fp32")
CONV = next(kernel for kernel in KERNELS if kernel.family == "conv")
DEPTHWISE = next(kernel for kernel in KERNELS if kernel.is_depthwise)


def padded(size: int, step: int) -> int:
    return ceil(size / step) * step


def latencies(step_in: int, step_out: int, penalty: float = 0.0, noise: float = 0.0) -> dict[Kernel, float]:
    """Both widths (c_in of one group) padded to a multiple of their step; `penalty` more where c_out is none."""
    rng = np.random.default_rng(0)
    return {
        k: 1e-3
        * padded(k.c_in // k.groups, step_in)
        * padded(k.c_out, step_out)
        * (1 + penalty * (k.c_out % step_out > 0))
        * (1 + noise * rng.standard_normal())
        for k in KERNELS
    }


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    ("step_in", "step_out"), [(1, 1), (8, 8), (16, 8), (8, 16), (1, 32), (32, 16)], ids=lambda step: str(step)
)
def test_the_step_of_a_synthetic_staircase_is_found(step_in: int, step_out: int, noise: float) -> None:
    found = find_staircase(latencies(step_in, step_out, noise=noise), "fp32")
    for family in ("conv", "pointwise", "linear"):
        stairs = found.of(family)
        assert (stairs.c_in, stairs.c_out) == (step_in, step_out)
        assert stairs.ragged_in == pytest.approx(0.0, abs=1e-9 + 2 * noise)
        assert stairs.ragged_out == pytest.approx(0.0, abs=1e-9 + 2 * noise)
        assert found.steps()[family] == max(LEAST_STEP, step_in, step_out)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-9), (0.01, 0.04)])
def test_a_ragged_width_that_takes_a_fifth_longer_is_told_from_the_step(noise: float, tolerance: float) -> None:
    found = find_staircase(latencies(1, 16, penalty=0.2, noise=noise), "fp32").of("conv")
    assert (found.c_in, found.c_out, found.ragged_in) == (1, 16, 0.0)
    assert found.ragged_out == pytest.approx(0.2, abs=tolerance)


def test_a_penalty_counts_at_most_double() -> None:
    assert find_staircase(latencies(1, 16, penalty=3.0), "fp32").of("conv").ragged_out == 1.0


def test_a_straight_line_with_noise_gives_a_step_in_less_than_one_of_a_hundred() -> None:
    """600 lines of 1 % noise: what looks like a step by chance is not taken for one."""
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(300):
        noisy = {k: us * (1 + 0.01 * rng.standard_normal()) for k, us in latencies(1, 1).items() if k.family == "conv"}
        stairs = find_staircase(noisy, "fp32").of("conv")
        false += (stairs.c_in > 1) + (stairs.c_out > 1)
    assert false < 6


@given(
    step=st.sampled_from((1, *STEPS)),
    constant=st.floats(0.0, 5.0),
    penalty=st.sampled_from((0.0, 0.1, 0.5)),
    unit=st.sampled_from((1e-3, 1.0, 1e3)),
)
def test_any_exact_staircase_is_found_in_any_unit(step: int, constant: float, penalty: float, unit: float) -> None:
    """What is fitted is a + b e(w) + c e(w) [w ragged], so such a staircase leaves nothing over."""

    def us(kernel: Kernel) -> float:
        worked = padded(kernel.c_out, step)
        return unit * (constant + 0.1 * worked * (1 + penalty * (kernel.c_out % step > 0)))

    stairs = find_staircase({k: us(k) for k in KERNELS if k.family == "linear"}, "fp32").of("linear")
    assert (stairs.c_in, stairs.c_out) == (1, step)
    if constant == 0.0 and step > 1:
        assert stairs.ragged_out == pytest.approx(penalty, abs=1e-9)
    assert 0.0 <= stairs.ragged_out <= penalty + 1e-9, "beside a constant the ragged part weighs less"


def test_the_null_device_shows_its_tiles_of_eight_and_sixteen() -> None:
    found = find_staircase({k: time_us(k) for k in KERNELS}, "fp32")
    for family in ("conv", "pointwise", "linear"):
        assert (found.of(family).c_in, found.of(family).c_out) == (8, 16)
    assert found.of("depthwise").c_out == 16
    assert found.of("conv").ragged_out == pytest.approx(0.0, abs=1e-9), "a tile that is not full costs a full one"
    steps = dict.fromkeys(("conv", "pointwise", "linear", "depthwise"), 16)
    assert found.steps() == steps | dict.fromkeys(("grouped", *ONE_WIDTH), 8)


def grouped_us(kernel: Kernel, step: int, grain: int, factor: float) -> float:
    inside = kernel.c_in // kernel.groups
    worked = padded(inside, step)
    return (3.0 + 0.5 * worked + 0.2 * worked**2) * (factor if inside % grain else 1.0)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    ("step", "grain", "factor"), [(1, 1, 1.0), (8, 1, 1.0), (1, 16, 3.0), (1, 8, 1.5), (1, 4, 2.0)]
)
def test_grouped_convolutions_have_stairs_of_their_own_inside_a_group(
    step: int, grain: int, factor: float, noise: float
) -> None:
    """(1, 16, 3) is what ONNX Runtime does: its blocked layout takes groups of whole blocks only."""
    rng = np.random.default_rng(0)
    line = [kernel for kernel in KERNELS if kernel.family == "grouped"]
    assert sorted(kernel.c_in // kernel.groups for kernel in line) == list(PROBED_INSIDE)
    us = {k: grouped_us(k, step, grain, factor) * (1 + noise * rng.standard_normal()) for k in line}
    found = find_staircase(us, "fp32")
    stairs = found.of("grouped")
    assert (stairs.c_in, stairs.c_out, stairs.grain_in, stairs.grain_out) == (step, step, grain, grain)
    assert stairs.rough_in == stairs.rough_out == pytest.approx(factor - 1, rel=0.1, abs=1e-9)
    assert found.steps() == {"grouped": max(LEAST_STEP, step, grain)}
    assert find_staircase(dict(list(us.items())[:10]), "fp32").of("grouped") == Stairs(), "too few of its widths"


def test_without_a_probe_of_their_own_grouped_convolutions_climb_no_stairs() -> None:
    found = find_staircase({k: us for k, us in latencies(8, 32).items() if k.family != "grouped"}, "fp32")
    assert found.of("grouped") == Stairs()
    assert "grouped" not in found.steps()


def test_a_kernel_that_is_rough_along_both_axes_falls_back_once() -> None:
    both = Stairs(grain_in=16, grain_out=16, rough_in=2.0, rough_out=2.0)
    grouped = next(kernel for kernel in KERNELS if kernel.family == "grouped")
    worked, factor = Staircase(families={"grouped": both}).worked_on(grouped, [(8, 16, 32), (8, 8, 32), (8, 8, 8)])
    assert worked.tolist() == [[8, 16, 32], [8, 8, 32], [8, 8, 8]]
    assert factor.tolist() == [1.0, 3.0, 3.0]


def test_what_is_narrower_than_the_step_and_not_padded_to_it_has_no_grain() -> None:
    """ONNX Runtime reads 13 channels as they are; 18 go another way than 20."""
    narrow = Staircase(families={"conv": Stairs(c_in=16, grain_in=4, rough_in=0.4, pads_in=False)})
    sizes = [(1, 13, 8), (1, 16, 8), (1, 18, 8), (1, 20, 8)]
    assert narrow.is_rough(CONV, sizes).tolist() == [False, False, True, False]
    assert narrow.worked_on(CONV, sizes)[1] == pytest.approx([1.0, 1.0, 1.4, 1.0])
    assert not narrow.has_rough_size(replace(CONV, c_in=13)) and narrow.has_rough_size(replace(CONV, c_in=18))


def test_nothing_measured_nothing_found() -> None:
    found = find_staircase({}, "fp32")
    assert found.steps() == {}
    assert found.of("conv") == Stairs()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: dict(list(lines.items())[:10]),  # too few of its widths
        lambda lines: dict.fromkeys(lines, 0.0),  # a runtime that runs no node
    ],
    ids=["too few", "zero"],
)
def test_a_line_that_tells_nothing_gives_no_step(
    spoil: Callable[[dict[Kernel, float]], dict[Kernel, float]],
) -> None:
    line = {kernel: us for kernel, us in latencies(1, 16).items() if kernel.is_depthwise}
    assert len(line) == len(PROBED) + len(PROBED_BETWEEN) + len(PROBED_NARROW)
    assert find_staircase(line, "fp32").of("depthwise").c_out == 16
    assert find_staircase(spoil(line), "fp32").of("depthwise") == Stairs()


def test_two_failed_kernels_of_a_line_do_not_hide_its_step() -> None:
    known = latencies(1, 16)
    for width in (68, 104):
        del known[replace(CONV, c_out=width, c_in=96)]
    assert find_staircase(known, "fp32").of("conv").c_out == 16


@pytest.mark.parametrize("grain", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_widths_that_fall_back_to_something_slow_are_told_by_their_grain(grain: int, noise: float) -> None:
    """Six times as long, unpadded, beside steps of 16: ONNX Runtime's depthwise convolutions off multiples of 4."""
    rng = np.random.default_rng(0)
    us = {
        k: (6.0 * k.c_out if k.c_out % grain else padded(k.c_out, 16)) * (1 + noise * rng.standard_normal())
        for k in KERNELS
        if k.is_depthwise
    }
    stairs = find_staircase(us, "fp32").of("depthwise")
    assert (stairs.c_out, stairs.grain_out, stairs.grain_in) == (16, grain, 1)
    assert stairs.rough_out == pytest.approx(5.0 if grain > 1 else 0.0, rel=0.05)


def test_the_grain_of_an_axis_is_its_own_and_needs_no_step() -> None:
    us = {k: k.c_in * k.c_out * (1 + 0.3 * (k.c_in % 4 > 0)) for k in KERNELS if k.family == "pointwise"}
    stairs = find_staircase(us, "fp32").of("pointwise")
    assert (stairs.grain_in, stairs.grain_out, stairs.step) == (4, 1, 1)
    assert stairs.rough_in == pytest.approx(0.3)
    found = Staircase(families={"pointwise": stairs})
    assert found.has_grain(["conv", "pointwise"]) and not found.has_grain(["conv"])


def test_widths_below_the_step_are_padded_to_it_or_not_as_measured() -> None:
    """ONNX Runtime reads fewer than 16 channels as they are, and pads 17 to 32."""
    us = {
        k: (k.c_in if k.c_in < 16 else padded(k.c_in, 16)) * padded(k.c_out, 16) for k in KERNELS if k.family == "conv"
    }
    found = find_staircase(us, "fp32")
    assert found.of("conv") == Stairs(c_in=16, c_out=16, pads_in=False)
    assert found.worked_on(CONV, [(1, 8, 8), (1, 24, 24)])[0].tolist() == [[1, 8, 16], [1, 32, 32]]


def test_a_rough_width_below_the_step_that_costs_no_more_tells_of_another_implementation() -> None:
    """Where half a step takes as long as a whole one: a pointwise convolution mostly writes its output."""

    def us(kernel: Kernel, narrow_is_rough: bool) -> float:
        rough = kernel.c_in % 4 and (kernel.c_in > 16 or narrow_is_rough)
        return (100.0 + (kernel.c_in if rough else padded(kernel.c_in, 16))) * (1.3 if rough else 1.0)

    for narrow_is_rough in (False, True):
        line = {k: us(k, narrow_is_rough) for k in KERNELS if k.family == "pointwise"}
        stairs = find_staircase(line, "fp32").of("pointwise")
        assert (stairs.c_in, stairs.grain_in, stairs.pads_in) == (16, 4, narrow_is_rough)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_last_step_that_is_at_most_half_full_may_make_all_of_it_run_in_halves(noise: float) -> None:
    """XNNPACK's pointwise convolutions with AVX-512: 80 channels run as five slow tiles of 16, 84 as three of 32."""
    rng = np.random.default_rng(0)

    def us(kernel: Kernel) -> float:
        is_half = 0 < kernel.c_out % 32 <= 16
        return kernel.c_in * (1.23 * padded(kernel.c_out, 16) if is_half else padded(kernel.c_out, 32))

    line = {k: us(k) * (1 + noise * rng.standard_normal()) for k in KERNELS if k.family == "pointwise"}
    found = find_staircase(line, "fp32")
    stairs = found.of("pointwise")
    assert (stairs.c_in, stairs.c_out, stairs.ragged_out, stairs.pads_out) == (1, 32, 0.0, True)
    assert stairs.half_out == pytest.approx(0.23, abs=1e-9 + noise)
    pointwise = next(iter(line))
    worked, factor = found.worked_on(pointwise, [(1, 9, out) for out in (8, 24, 64, 70, 80, 84)])
    assert worked[:, 2].tolist() == [16, 32, 64, 80, 80, 96]
    assert factor == pytest.approx([1.23, 1.0, 1.0, 1.23, 1.23, 1.0], abs=1e-9 + noise)


def test_halves_that_take_no_longer_are_a_step_of_half_the_width() -> None:
    """Steps of 16 with 1 % of noise, 100 times: an even one looks a little faster than an odd one now and then."""
    rng = np.random.default_rng(2)
    exact = {k: us for k, us in latencies(1, 16).items() if k.family == "pointwise"}
    for _ in range(100):
        found = find_staircase({k: us * (1 + 0.01 * rng.standard_normal()) for k, us in exact.items()}, "fp32")
        assert (found.of("pointwise").c_out, found.of("pointwise").half_out) == (16, 0.0)


def test_narrow_widths_are_padded_to_half_a_step_though_no_slower() -> None:
    us = {
        k: k.c_in * (padded(k.c_out, 16) if k.c_out < 32 else padded(k.c_out, 32))
        for k in KERNELS
        if k.family == "conv"
    }
    assert find_staircase(us, "fp32").of("conv").narrow_out == Narrow(16, 0.0)


def test_how_slow_narrow_widths_are_is_told_beside_half_a_whole_step_at_the_least() -> None:
    """From 64 channels on all take 1.45 times as long: the line through 32 and 64 meets 0 near 16."""
    us = {
        k: k.c_in * (k.c_out if k.c_out < 32 else padded(k.c_out, 32)) * (1.45 if k.c_out > 32 else 1.0)
        for k in KERNELS
        if k.family == "conv"
    }
    assert find_staircase(us, "fp32").of("conv").narrow_out.slower == 0.0


def test_a_probe_below_the_step_that_no_node_ran_for_says_nothing() -> None:
    us = {k: 0.0 if k.c_out == 16 else us for k, us in latencies(1, 16).items() if k.family == "conv"}
    stairs = find_staircase(us, "fp32").of("conv")
    assert (stairs.c_out, stairs.pads_out, stairs.narrow_out) == (16, True, NOT_NARROW)


def test_narrow_widths_may_be_padded_to_half_a_step_and_slower() -> None:
    """XNNPACK's 3x3 convolutions: 24 channels run as two tiles of 16, longer than 32 as one; 40 as two of 32."""
    us = {
        k: k.c_in * (1.3 * padded(k.c_out, 16) if k.c_out < 32 else padded(k.c_out, 32))
        for k in KERNELS
        if k.family == "conv"
    }
    found = find_staircase(us, "fp32")
    assert found.of("conv").pads_out is False
    assert found.of("conv").narrow_out.tile == 16 and found.of("conv").narrow_out.slower == pytest.approx(0.3)
    worked, factor = found.worked_on(CONV, [(1, 9, out) for out in (8, 24, 32, 40)])
    assert worked[:, 2].tolist() == [16, 32, 32, 64]
    assert factor == pytest.approx([1.3, 1.3, 1.0, 1.0])


def test_narrow_widths_may_take_longer_than_a_whole_step_and_be_padded_to_nothing() -> None:
    """ONNX Runtime's pointwise convolutions of fewer than 16 input channels: 8 take 1.7 times as long as 16."""
    us = {
        k: (3.2 * k.c_in if k.c_in < 16 else padded(k.c_in, 16)) * padded(k.c_out, 16)
        for k in KERNELS
        if k.family == "pointwise"
    }
    found = find_staircase(us, "fp32")
    stairs = found.of("pointwise")
    assert (stairs.c_in, stairs.pads_in, stairs.narrow_in.tile) == (16, False, 1)
    assert stairs.narrow_in.slower == pytest.approx(2.2)
    worked, factor = found.worked_on(next(iter(us)), [(1, 8, 16), (1, 13, 16), (1, 16, 16)])
    assert worked[:, 1].tolist() == [8, 13, 16] and factor == pytest.approx([3.2, 3.2, 1.0])


def test_stairs_in_words() -> None:
    stairs = Stairs(c_in=16, grain_in=4, rough_in=0.3, pads_in=False, narrow_in=Narrow(1, 2.2), c_out=32, half_out=0.23)
    (_, along_in), (_, along_out) = stairs.axes("conv")
    assert along_in.describe() == "steps of 16, off multiples of 4: 30% slower, narrower ones as they are, 220% slower"
    assert along_out.describe() == "steps of 32, in tiles of 16, 23% slower, where the last is at most half full"
    (_, plain), _ = Stairs(c_in=16, pads_in=False).axes("conv")
    assert plain.describe() == "steps of 16, narrower ones as they are"
    assert Stairs().axes("depthwise")[0][1].describe() == "no steps"


def test_rough_widths_are_slower_still_and_known_as_such() -> None:
    stairs = Staircase(families={"conv": Stairs(c_in=16, ragged_in=0.1, grain_in=4, rough_in=0.4, grain_out=2)})
    sizes = [(1, 16, 8), (1, 20, 8), (1, 18, 8), (1, 16, 7), (1, 18, 7)]
    worked, factor = stairs.worked_on(CONV, sizes)
    assert worked[:, 1].tolist() == [16, 32, 18, 16, 18], "what they fall back to pads nothing"
    assert factor == pytest.approx([1.0, 1.1, 1.4, 1.0, 1.4])
    assert stairs.is_rough(CONV, sizes).tolist() == [False, False, True, True, True]
    assert not stairs.is_rough(DEPTHWISE, [(33, 1, 1)]).any(), "a family without a grain is never rough"


STAIRS = Staircase(
    families={
        "conv": Stairs(c_in=8, c_out=16, ragged_in=0.1, ragged_out=0.5),
        "depthwise": Stairs(c_out=16, ragged_out=0.25),
    }
)


def test_the_width_that_is_worked_on_is_the_next_multiple_and_ragged_ones_cost_more() -> None:
    worked, factor = STAIRS.worked_on(CONV, [(1, 8, 16), (1, 9, 16), (1, 8, 17), (1, 9, 17), (1, 7, 1)])
    assert worked.tolist() == [[1, 8, 16], [1, 16, 16], [1, 8, 32], [1, 16, 32], [1, 8, 1]]
    assert factor == pytest.approx([1.0, 1.1, 1.5, 1.1 * 1.5, 1.1]), "a size of 1 follows from others, no step of it"


def test_channels_of_a_depthwise_convolution_are_its_groups() -> None:
    worked, factor = STAIRS.worked_on(DEPTHWISE, [(32, 1, 1), (33, 1, 1)])
    assert worked.tolist() == [[32, 1, 1], [48, 1, 1]]
    assert factor.tolist() == [1.0, 1.25]


@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5))
def test_what_is_worked_on_is_never_less_and_a_family_without_stairs_is_left_alone(
    sizes: list[tuple[int, int, int]],
) -> None:
    worked, factor = STAIRS.worked_on(CONV, sizes)
    assert (worked >= sizes).all() and (worked < np.add(sizes, 16)).all()
    assert (factor >= 1).all()
    again, aligned = STAIRS.worked_on(CONV, worked)
    assert again.tolist() == worked.tolist(), "aligned widths are worked on as they are"
    assert (aligned == 1).all()
    plain, none = STAIRS.worked_on(replace(CONV, operator="max_pool"), sizes)
    assert plain.tolist() == [list(map(float, size)) for size in sizes] and (none == 1).all()


def test_a_pool_whose_channels_are_no_whole_blocks_is_rough() -> None:
    """As ONNX Runtime's: in blocks of 16 a max pool takes a quarter of the time; widths stay on offer."""
    blocked = {k: (2 + 0.2 * k.c_in) * (4.0 if k.c_in % 16 else 1.0) for k in KERNELS if k.family == "max_pool"}
    found = find_staircase(blocked, "fp32")
    stairs = found.of("max_pool")
    assert (stairs.grain_out, stairs.step) == (16, 1)
    assert stairs.rough_out == pytest.approx(3.0, rel=0.05)
    pool = next(iter(blocked))
    worked, slower = found.worked_on(pool, [(1, 96, 1), (1, 100, 1)])
    assert worked[:, 1].tolist() == [96, 100] and slower.tolist() == [1.0, 1 + stairs.rough_out]
    assert found.steps() == {"max_pool": 8}


def test_a_mean_without_grain_climbs_no_stairs() -> None:
    assert find_staircase({k: 2 + 0.1 * k.c_in for k in KERNELS if k.family == "mean"}, "fp32").of("mean") == Stairs()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("openvino", precision) for precision in ("fp32", "bf16", "int8")),
        *(("onnxruntime", precision) for precision in ("fp32", "int8")),
        *(("tflite", precision) for precision in ("fp32", "int8")),
        *(("tensorrt", precision) for precision in ("fp32", "fp16", "int8")),
    ],
)
def test_every_kernel_that_shows_stairs_is_one_that_the_runtime_computes(name: str, precision: str) -> None:
    computes = importlib.import_module(f"edgeprune.backends.{name}").COMPUTES
    for kernel in staircase_kernels(precision):
        check_computes(kernel, computes, name)
