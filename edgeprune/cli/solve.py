from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich_click

from edgeprune.cli.output import json_option, print_json
from edgeprune.errors import BudgetError

if TYPE_CHECKING:
    from edgeprune.solve import Solution


@click.command("solve", cls=rich_click.RichCommand, epilog="Example: edgeprune solve problem.json --json")
@click.argument("problem", type=click.Path(path_type=Path))
@click.option("--time-limit", "time_limit_s", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Seconds.")
@click.option("--gap", type=click.FloatRange(0, 1), default=1e-4, show_default=True, help="Stop at this proven gap.")
@json_option
@click.pass_context
def command(context: click.Context, problem: Path, time_limit_s: float | None, gap: float, as_json: bool) -> None:
    """Solve a problem.json: one option per variable, the largest value inside the budgets, with a proven bound.

    Without --time-limit the answer is always the same. Exit code 3 where no choice is inside the budgets: what is
    printed is then the least-cost choice.
    """
    from edgeprune.solve import Problem, solve

    solution = solve(Problem.from_json(problem), time_limit_s=time_limit_s, gap=gap)
    if as_json:
        print_json(solution.to_document())
    else:
        _print(solution)
    context.exit(0 if solution.feasible else BudgetError.exit_code)


def _print(solution: Solution) -> None:
    click.echo(f"{solution.status} in {solution.seconds:.2f} s")
    if solution.feasible:
        click.echo(f"value  {solution.value:g}, none above {solution.upper_bound:g} (gap {solution.gap:.2%})")
    elif solution.choice:
        click.echo(f"least reachable cost: {solution.least_ratio:.4g} of the budget")
    for budget, cost in solution.cost.items():
        click.echo(f"cost   {budget} {cost:g}")
    for variable, option in solution.choice.items():
        click.echo(f"choice {variable} {option}")
