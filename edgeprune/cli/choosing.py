"""Options that say what for and how to choose: budgets, constraints, scope and schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeprune.cli.task import make_task

if TYPE_CHECKING:
    from edgeprune.budget import Budget
    from edgeprune.device import Device
    from edgeprune.preparing import Task
    from edgeprune.scheduling import Schedule

Command = TypeVar("Command", bound=Callable[..., Any])
STEPS = 5
"""Steps of `--schedule iterative` unless told."""


def budget_option(*, required: bool) -> Callable[[Command], Command]:
    """--budget, repeatable."""
    return click.option(
        "--budget",
        "budgets",
        multiple=True,
        required=required,
        metavar="8ms|120fps|0.6x[@DEVICE]|2MB@params",
        help="What the latency on --device or another may be, the parameters or the multiply-adds (@macs). Repeatable.",
    )


def rule_options(function: Command) -> Command:
    """--keep, --least-width, --most-cut, --only, --scope, --schedule, --steps, --targets and --formats."""
    for option in reversed(
        (
            click.option(
                "--keep", multiple=True, metavar="PATTERN", help="Layers to leave whole, by name. Repeatable."
            ),
            click.option("--least-width", metavar="N|SHARE", help="What every group of channels keeps at least."),
            click.option(
                "--most-cut", type=click.FloatRange(0, 1), metavar="SHARE", help="What any layer may lose at most."
            ),
            click.option("--only", type=click.Choice(["channels", "blocks", "heads"]), help="Prune nothing else."),
            click.option(
                "--scope",
                type=click.Choice(["global", "local", "uniform", "isomorphic"]),
                default="global",
                show_default=True,
                help="Over what channels compete.",
            ),
            click.option(
                "--schedule",
                type=click.Choice(["oneshot", "iterative"]),
                default="oneshot",
                show_default=True,
                help="At once, or in steps that score again.",
            ),
            click.option("--steps", type=click.IntRange(2), help=f"Of an iterative schedule.  [default: {STEPS}]"),
            click.option(
                "--targets",
                type=click.Choice(["exponential", "linear"]),
                help="Budgets of the steps.  [default: exponential]",
            ),
            click.option(
                "--formats",
                default="dense",
                show_default=True,
                metavar="dense,2:4",
                help="Of layers; 2:4 where the table says that it pays, on devices with sparse tensor cores.",
            ),
        )
    ):
        function = option(function)
    return function


def choosing_task(
    budgets: tuple[str, ...],
    *,
    keep: tuple[str, ...],
    least_width: str | None,
    most_cut: float | None,
    only: Any,
    scope: Any,
    schedule: str,
    steps: int | None,
    targets: Any,
    formats: str,
    **options: Any,
) -> tuple[Task, Budget | None]:
    """The task with its rules and the budgets beside the latency on --device, and that latency's, if one is given."""
    from edgeprune.budget import QUANTITIES, check_wanted, parse_wanted
    from edgeprune.choosing import check_scope
    from edgeprune.constraints import Constraints, parse_least_width
    from edgeprune.device import load_device
    from edgeprune.modelled import installed

    constraints = Constraints(
        keep=keep,
        least_width=0.0 if least_width is None else parse_least_width(least_width),
        most_cut=1.0 if most_cut is None else most_cut,
        only=only,
    )
    check_scope(scope, constraints)
    plan_in_steps = _schedule(schedule, steps, targets)
    wanted = [parse_wanted(budget) for budget in budgets]
    own = load_device(options["device_name"], allow_modelled=options["allow_modelled"])
    named = [
        each if each.of in ("", *QUANTITIES) else replace(each, of=load_device(each.of, allow_modelled=True).name)
        for each in wanted
    ]  # an alias stands for its device; whether a modelled one is allowed is asked below
    named = [replace(each, of="") if each.of == own.name else each for each in named]
    check_wanted(named, own.name)
    devices = tuple(
        load_device(each.of, allow_modelled=options["allow_modelled"])
        for each in named
        if each.of not in ("", *QUANTITIES)
    )
    for device in devices:
        installed(device, only_to_time=True, engines_in=device.precisions[:1])
    task = replace(
        make_task(**options),
        others=tuple(each for each in named if each.of),
        devices=devices,
        constraints=constraints,
        scope=scope,
        schedule=plan_in_steps,
        formats=_formats(formats, own, scope, plan_in_steps),
    )
    return task, next((each.budget for each in named if not each.of), None)


def _formats(text: str, device: Device, scope: Any, schedule: Schedule) -> tuple[str, ...]:
    from edgeprune.errors import InputError
    from edgeprune.formats import check_device, parse_formats
    from edgeprune.scopes import BISECTED

    formats = parse_formats(text)
    if len(set(formats)) > 1:
        check_device(device, formats)
        if scope in BISECTED:
            raise InputError(f"--formats {text} are chosen by the solver, and --scope {scope} has none")
        if schedule.steps > 1:
            raise InputError(f"--formats {text} are chosen in one step: leave out --schedule iterative")
    return formats


def _schedule(schedule: str, steps: int | None, targets: Any) -> Schedule:
    from edgeprune.errors import InputError
    from edgeprune.scheduling import Schedule

    if schedule == "iterative":
        return Schedule(steps=steps or STEPS, targets=targets or "exponential")
    if steps is not None:
        raise InputError(f"--steps {steps} is for --schedule iterative; oneshot takes one")
    if targets is not None:
        raise InputError(f"--targets {targets} is for --schedule iterative; oneshot has one budget")
    return Schedule()
