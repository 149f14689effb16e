"""Surfaces: exact where their mean is, near elsewhere, and they know how near."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil, cos, log2, sin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from edgeprune.errors import TableError
from edgeprune.kernel import Kernel
from edgeprune.staircase import FloatArray, Staircase, Stairs
from edgeprune.surface import CANDIDATES, LEAST_US, Points, Roughness, Surface, covariance, likeliest, surfaces_of

pytestmark = pytest.mark.unit

LINEAR = Kernel(operator="linear", c_in=8, c_out=8, spatial=(49,))
ATTENTION = Kernel(operator="attention", c_in=8, c_out=8, spatial=(49, 49))
Sizes = tuple[int, int, int]


def bilinear(c_in: float, c_out: float) -> float:
    return 3.0 + 0.5 * c_in + 0.25 * c_out + 0.01 * c_in * c_out


def wavy(c_in: float, c_out: float) -> float:
    """Some percent off the bilinear one, and smooth in the logarithm of its widths."""
    return bilinear(c_in, c_out) * (1 + 0.06 * sin(2 * log2(c_in)) * cos(1.5 * log2(c_out)))


def surface_of(us: Mapping[Sizes, float], stairs: Staircase | None = None, kernel: Kernel = LINEAR) -> Surface:
    """The surface of one kernel over the box of the sizes that are given."""
    groups, ins, outs = zip(*us, strict=True)
    low, high = (min(groups), min(ins), min(outs)), (max(groups), max(ins), max(outs))
    (surface,) = surfaces_of(
        {kernel: {kernel.resized(size): value for size, value in us.items()}},
        {kernel: (low, high)},
        stairs or Staircase(),
    ).values()
    return surface


def on_grid(function: Callable[[float, float], float], ins: Sequence[int], outs: Sequence[int]) -> dict[Sizes, float]:
    return {(1, i, o): function(i, o) for i, o in product(ins, outs)}


POINTS = [(1, 8, 4), (1, 13, 7), (1, 40, 32), (1, 39, 5)]


def test_a_surface_is_exact_on_bilinear_functions() -> None:
    surface = surface_of(on_grid(bilinear, (8, 16, 40), (4, 32)))
    assert surface.at(POINTS) == pytest.approx([bilinear(i, o) for _, i, o in POINTS], rel=1e-6)


@given(coefficients=st.tuples(*[st.floats(0.0, 10.0)] * 3, st.floats(0.01, 10.0)))
def test_whatever_the_bilinear_function(coefficients: tuple[float, float, float, float]) -> None:
    """As long as nothing gets faster with width: no coefficient of the mean is negative."""
    one, a, b, ab = coefficients

    def us(c_in: float, c_out: float) -> float:
        return one + a * c_in + b * c_out + ab * c_in * c_out

    surface = surface_of(on_grid(us, (8, 24, 64), (16, 64)))
    points = [(1, 8, 16), (1, 11, 40), (1, 64, 63)]
    assert surface.at(points) == pytest.approx([us(i, o) for _, i, o in points], rel=1e-6)


def test_a_surface_over_heads_and_both_of_their_widths_is_exact_on_trilinear_functions() -> None:
    """Time in proportion to the heads: g a, g b and g a b of widths (g, a, b), as the mean has them."""
    us = {(h, i, o): h * (0.5 * i + 0.25 * o + 0.01 * i * o) for h, i, o in product((1, 3, 12), (8, 64), (16, 64))}
    points = [(1, 8, 16), (2, 20, 30), (7, 64, 33), (12, 64, 64)]
    expected = [h * (0.5 * i + 0.25 * o + 0.01 * i * o) for h, i, o in points]
    assert surface_of(us, kernel=ATTENTION).at(points) == pytest.approx(expected, rel=1e-6)


def test_a_line_and_a_point() -> None:
    line = surface_of({(1, 8, 1): 1.0, (1, 16, 1): 2.0}, kernel=Kernel(operator="add", c_in=8, c_out=8))
    assert line.at([(1, 8, 1), (1, 12, 1), (1, 16, 1)]) == pytest.approx([1.0, 1.5, 2.0], rel=1e-6)
    point = surface_of({(1, 8, 8): 5.0})
    assert point.at([(1, 8, 8), (1, 8, 8)]) == pytest.approx([5.0, 5.0], rel=1e-6)


def test_a_staircase_with_a_ragged_penalty_is_exact_once_its_steps_are_known() -> None:
    stairs = Staircase(families={"linear": Stairs(c_in=1, c_out=16, ragged_out=0.3)})

    def us(c_in: float, c_out: float) -> float:
        return bilinear(c_in, 16 * ceil(c_out / 16)) * (1.3 if c_out % 16 else 1.0)

    surface = surface_of(on_grid(us, (8, 64), (4, 32, 64)), stairs)
    points = [(1, 8, 4), (1, 30, 16), (1, 30, 17), (1, 64, 47), (1, 64, 48)]
    assert surface.at(points) == pytest.approx([us(i, o) for _, i, o in points], rel=1e-6)


def test_rough_widths_say_little_of_the_others_and_learn_their_own_factor() -> None:
    """Rough ones take 1.5 times what the family's penalty says, on this surface: two points tell, smooth ones stay."""
    stairs = Staircase(families={"linear": Stairs(grain_in=4, rough_in=1.0)})

    def us(c_in: float, c_out: float) -> float:
        return bilinear(c_in, c_out) * (2.0 * 1.5 if c_in % 4 else 1.0)

    smooth = on_grid(us, (8, 16, 32, 64), (16, 64))
    surface = surface_of(smooth | on_grid(us, (9, 33), (16, 64)), stairs)
    before = surface_of(smooth, stairs)
    rough, aligned = [(1, 30, 32), (1, 50, 40)], [(1, 12, 32), (1, 48, 40)]
    truth = {point: us(point[1], point[2]) for point in (*rough, *aligned)}
    assert before.at(rough) == pytest.approx([truth[p] / 1.5 for p in rough], rel=0.01), "the penalty alone"
    off = np.abs(surface.at(rough) / [truth[p] for p in rough] - 1)
    assert off.max() < 0.05, "without them it was a third"
    assert surface.at(aligned) == pytest.approx([truth[p] for p in aligned], rel=0.02)


def test_rough_widths_are_in_doubt_by_the_penalty_of_the_family_until_one_was_measured() -> None:
    stairs = Staircase(families={"linear": Stairs(grain_in=4, rough_in=3.0)})
    surface = surface_of(on_grid(bilinear, (8, 16, 32, 64), (16, 64)), stairs)
    doubted, smooth = [(1, 33, 64)], [(1, 32, 64)]
    doubt = 0.3 * np.log(4.0)
    assert doubt < surface.error_at(doubted)[0] < doubt + 0.1 and surface.error_at(smooth)[0] < 0.05
    more = surface.with_points([(1, 35, 48)])
    assert more.error_at(doubted)[0] < 0.1 and more.at(doubted) == pytest.approx(surface.at(doubted), rel=1e-9)


def test_one_rough_width_tells_of_all_others_on_its_surface() -> None:
    """They take 9 times as long as smooth ones here, 4 times in the family: one was measured, on the left."""
    stairs = Staircase(families={"linear": Stairs(grain_in=4, rough_in=3.0)})
    smooth = on_grid(bilinear, (8, 16, 32, 64), (16, 64))
    surface = surface_of(smooth | on_grid(lambda i, o: 9 * bilinear(i, o), (15,), (64,)), stairs)
    assert surface.at([(1, 61, 64)])[0] == pytest.approx(9 * bilinear(61, 64), rel=0.15)
    assert surface.at([(1, 60, 64)])[0] == pytest.approx(bilinear(60, 64), rel=0.03)


@pytest.mark.parametrize("point", [(7, 8), (17, 8), (8, 3), (8, 9)])
def test_outside_the_measured_range_raises(point: tuple[int, int]) -> None:
    surface = surface_of(on_grid(bilinear, (8, 16), (4, 8)))
    assert surface.covers([(1, 8, 4), (1, 16, 8)])
    assert not surface.covers([(1, 8, 4), (1, *point)])
    for ask in (surface.at, surface.error_at):
        with pytest.raises(TableError, match=r"width [\d.]+ to [\d.]+ is outside the measured"):
            ask([(1, *point)])


def test_it_goes_near_what_was_measured_and_smooths_noise() -> None:
    """A surface is no interpolation: 2 % of noise on 36 points leaves it nearer to the truth than to them."""
    rng = np.random.default_rng(0)
    widths = (8, 16, 32, 64, 128, 256)
    truth = on_grid(bilinear, widths, widths)
    noisy = {size: us * (1 + 0.02 * rng.standard_normal()) for size, us in truth.items()}
    off = surface_of(noisy).at(list(truth)) / np.array(list(truth.values())) - 1
    assert np.sqrt(np.mean(off**2)) < 0.8 * np.sqrt(np.mean([(noisy[s] / truth[s] - 1) ** 2 for s in truth]))


def test_what_the_mean_does_not_hold_is_taken_from_the_points() -> None:
    widths = (8, 12, 16, 24, 32, 48, 64, 96, 128)
    surface = surface_of(on_grid(wavy, widths, widths))
    points = [(1, 10, 20), (1, 40, 40), (1, 100, 70), (1, 28, 110)]
    assert surface.at(points) == pytest.approx([wavy(i, o) for _, i, o in points], rel=0.01)
    mean = [bilinear(i, o) for _, i, o in points]
    assert max(abs(wavy(i, o) / us - 1) for (_, i, o), us in zip(points, mean, strict=True)) > 0.02


def test_the_error_is_that_of_one_measurement_where_was_measured_and_grows_in_between() -> None:
    surface = surface_of(on_grid(wavy, (8, 16, 128), (8, 32, 128)))
    at = surface.error_at([(1, width, 8) for width in (16, 20, 28, 45, 128)])
    assert at[0] < 2 * surface.roughness.noise and at[-1] < 2 * surface.roughness.noise
    assert at[0] < at[1] < at[2] < at[3] and at[3] > at[-1]
    assert at[3] < surface.roughness.size, "never more than what is known before anything is measured"


def test_measuring_at_a_point_would_lower_the_error_there_and_changes_no_prediction() -> None:
    surface = surface_of(on_grid(wavy, (8, 128), (8, 32, 128)))
    there, everywhere = [(1, 32, 64)], [(1, i, o) for i, o in product((8, 20, 32, 60, 128), (8, 20, 64, 128))]
    more = surface.with_points(there)
    assert more.at(everywhere) == pytest.approx(surface.at(everywhere), rel=1e-9)
    assert more.error_at(there)[0] < 0.5 * surface.error_at(there)[0]
    assert (more.error_at(everywhere) <= surface.error_at(everywhere) + 1e-9).all()


def covariance_by_hand(a: Sizes, b: Sizes, roughness: Roughness) -> float:
    """Matern 3/2, in octaves."""
    away = np.sqrt(3 * sum((np.log2(x / y) / roughness.octaves) ** 2 for x, y in zip(a, b, strict=True)))
    return float(roughness.size**2 * (1 + away) * np.exp(-away))


def joint(sizes: Sequence[Sizes], roughness: Roughness) -> FloatArray:
    matrix = np.array([[covariance_by_hand(a, b, roughness) for b in sizes] for a in sizes])
    return np.asarray(matrix + (roughness.noise**2 + 1e-10) * np.eye(len(sizes)))


def test_covariance_of_one_octave() -> None:
    found = covariance(np.array([[1.0, 8, 8]]), np.array([[1.0, 8, 8], [1, 16, 8]]), Roughness(size=0.1, octaves=1.0))
    assert found == pytest.approx(np.array([[0.01, 0.01 * (1 + 3**0.5) * np.exp(-(3**0.5))]]), rel=1e-12)


def test_the_mean_and_error_are_those_of_the_conditional_normal_distribution() -> None:
    """Oracle: the textbook's conditional of a joint normal, by the inverse of the joint covariance."""
    grid = on_grid(wavy, (8, 24, 96), (8, 40))
    surface = surface_of(grid)
    known, point = sorted(grid), (1, 50, 20)
    precision = np.linalg.inv(joint([*known, point], surface.roughness))
    variance = 1 / precision[-1, -1]  # of log us at the point given the rest, with the noise of one measurement
    columns = np.array([[1, i, o, i * o] for _, i, o in [*known, point]], dtype=np.float64)
    mean = columns @ surface.mean
    residual = np.log([grid[size] for size in known] / mean[:-1])
    expected = mean[-1] * np.exp(-precision[-1, :-1] @ residual * variance)
    assert surface.at([point])[0] == pytest.approx(expected, rel=1e-9)
    noise = surface.roughness.noise**2 + 1e-10
    assert surface.error_at([point])[0] == pytest.approx(np.sqrt(variance - noise), rel=1e-6)


def test_the_likeliest_roughness_is_the_one_under_which_each_point_follows_best_from_the_others() -> None:
    """Oracle: p(r_i | rest) = p(all) / p(rest), with scipy's normal distribution."""
    rng = np.random.default_rng(3)
    sizes = [(1, i, o) for i, o in product((8, 20, 48, 128), (8, 32, 128))]
    truth = Roughness(size=0.12, octaves=1.5, noise=0.01)
    residual = rng.multivariate_normal(np.zeros(len(sizes)), joint(sizes, truth))

    def left_out(roughness: Roughness) -> float:
        full, total = joint(sizes, roughness), 0.0
        for i in range(len(sizes)):
            rest = [j for j in range(len(sizes)) if j != i]
            total += float(multivariate_normal(cov=full).logpdf(residual))
            total -= float(multivariate_normal(cov=full[np.ix_(rest, rest)]).logpdf(residual[rest]))
        return total

    found = likeliest([(np.array(sizes, dtype=np.float64), residual, np.zeros(len(sizes)))])
    assert found == max(CANDIDATES, key=left_out)


def test_a_doubtful_point_gives_way_to_its_neighbours() -> None:
    """Twice the time it should take: believed where its rounds agreed, hardly where they were 40 % apart."""
    us = on_grid(bilinear, (8, 16, 32, 64, 128), (8, 32, 128))
    us[1, 32, 32] *= 2
    truth = bilinear(32, 32)
    kernels = {LINEAR.resized(size): value for size, value in us.items()}
    box = {LINEAR: ((1, 8, 8), (1, 128, 128))}
    off = {}
    for doubt in (0.0, 0.4):
        (surface,) = surfaces_of({LINEAR: kernels}, box, Staircase(), {LINEAR.resized((1, 32, 32)): doubt}).values()
        off[doubt] = surface.at([(1, 32, 32)])[0] / truth - 1
    assert off[0.0] > 0.5
    assert abs(off[0.4]) < 0.05


def test_few_points_say_nothing_about_roughness() -> None:
    three = np.array([[1.0, 8, 8], [1, 16, 8], [1, 32, 8]])
    assert likeliest([(three, np.array([0.0, 0.5, 0.0]), np.zeros(3))]) == Roughness()
    assert likeliest([]) == Roughness()


def test_shapes_of_one_family_share_its_roughness() -> None:
    """A shape with two points is as uncertain as the many points of its family say."""
    one, other = LINEAR, Kernel(operator="linear", c_in=8, c_out=8, spatial=(7,))
    many = {one.resized(size): us for size, us in on_grid(wavy, (8, 16, 32, 64, 128), (8, 32, 128)).items()}
    few = {other.resized((1, 8, 8)): 1.0, other.resized((1, 128, 8)): 4.0}
    boxes = {one: ((1, 8, 8), (1, 128, 128)), other: ((1, 8, 8), (1, 128, 8))}
    found = surfaces_of({one: many, other: few}, boxes, Staircase())
    assert found[one].roughness == found[other].roughness != Roughness()


def test_a_kernel_that_takes_no_time_counts_as_next_to_nothing() -> None:
    points = Points.of({LINEAR.resized((1, 16, 8)): 0.0, LINEAR.resized((1, 8, 8)): 3.0}, {})
    assert points.sizes.tolist() == [[1, 8, 8], [1, 16, 8]]
    assert points.us.tolist() == [3.0, LEAST_US]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_same_measurements_in_any_order_give_the_same_surface(seed: int) -> None:
    grid = list(on_grid(wavy, (8, 16, 64), (8, 32)).items())
    shuffled = [grid[i] for i in np.random.default_rng(seed).permutation(len(grid))]
    point = [(1, 13, 17)]
    assert surface_of(dict(shuffled)).at(point).tolist() == surface_of(dict(grid)).at(point).tolist()
