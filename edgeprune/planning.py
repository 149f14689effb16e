"""From a graph, a cost model and budgets to a plan: what `choosing` and `scheduling` do, by plain parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import torch

from edgeprune.budget import Budget, Wanted, check_wanted, parse_wanted
from edgeprune.budget_rows import BYTES, Row, latency_row, macs_row, params_row
from edgeprune.choice import Choice, plan_from
from edgeprune.choosing import Rules, choose
from edgeprune.constraints import NONE, Constraints
from edgeprune.cost import CostModel
from edgeprune.data import as_data
from edgeprune.errors import InputError, did_you_mean
from edgeprune.graph import ModelGraph
from edgeprune.plan_json import Plan
from edgeprune.saliency import Saliency, score
from edgeprune.saliency.registry import input_type
from edgeprune.scheduling import ONE_SHOT, Schedule, Stage, before_the_last
from edgeprune.scopes import SCOPES, Scope
from edgeprune.sparsity.channel_order import permuted


def plan(
    graph: ModelGraph,
    cost: CostModel,
    *,
    budget: str | Budget | Sequence[str],
    saliency: str | Saliency = "taylor_output",
    data: object = None,
    seed: int = 0,
    normalise: str | None = None,
    costs: Mapping[str, CostModel] | None = None,
    constraints: Constraints = NONE,
    scope: Scope = "global",
    schedule: Schedule = ONE_SHOT,
) -> Plan:
    """The plan of highest value whose predicted latency is inside the budget; a ratio is of the dense prediction.

    `saliency` is a criterion's name or its result, `data` what the criterion looks at (batches x or (x, y)),
    `normalise` how its values are made to compare across groups, the criterion's own way unless told. Several
    budgets: `["8ms", "5ms@nuc", "2MB@params"]`, with the other devices' cost models in `costs`. More steps than one
    need the criterion's name, to score again. Layers may be 2:4 where the cost model has such kernels; their inputs'
    channels are put in the order that keeps most. `BudgetError` where even the least network is predicted outside.
    Nothing is measured here.
    """
    if scope not in SCOPES:
        raise InputError(f"no scope '{scope}'{did_you_mean(scope, SCOPES)} (known: {', '.join(SCOPES)})")
    first, beside = _budgets(budget)
    cost, costs = with_common_options(cost, costs or {})
    if not isinstance(saliency, str) and normalise is not None:
        raise ValueError("normalise is for a criterion's name: these values are normalised already")
    criterion, how = (saliency, normalise) if isinstance(saliency, str) else (saliency.criterion, saliency.normalise)
    samples = None if data is None else as_data(data, dtype=input_type(graph))

    def scored(smaller: ModelGraph, module: torch.nn.Module) -> Saliency:
        return score(criterion, smaller, module, samples, seed=seed, normalise=how)

    batch = next(node.shape[0] for node in graph.nodes if node.operator == "placeholder")
    target_us = first.limit_ms(cost.predict({}).us / 1e3, batch=batch) * 1e3
    others = rows_of(beside, cost, costs, batch=batch, precision=cost.precision)
    rules = Rules(constraints=constraints, scope=scope)
    stage = Stage(saliency=scored(graph, graph.model) if isinstance(saliency, str) else saliency, rules=rules)
    stage = before_the_last(cost, stage, target_us, schedule, scored, others=others)
    choice = choose(cost, stage.saliency, target_us, others=others, rules=stage.rules)
    notes = {
        "budget": str(first),
        "saliency": criterion,
        "seed": seed,
        **describe_choice(cost, choice),
        **describe_rules(rules, schedule),
    }
    found = plan_from(choice, graph, stage.saliency, notes)
    return permuted(found, graph, seed=seed)[0] if found.formats else found


def _budgets(budget: str | Budget | Sequence[str]) -> tuple[Budget, list[Wanted]]:
    """That of the latency on the cost model's own device, and those beside it."""
    budgets = (budget,) if isinstance(budget, str | Budget) else tuple(budget)
    wanted = [Wanted(budget=b) if isinstance(b, Budget) else parse_wanted(b) for b in budgets]
    check_wanted(wanted)
    first = next((each.budget for each in wanted if not each.of), None)
    if first is None:
        raise InputError("no budget is of the latency on the cost model's own device; give one without @")
    return first, [each for each in wanted if each.of]


def rows_of(
    wanted: Iterable[Wanted], cost: CostModel, costs: Mapping[str, CostModel], *, batch: int, precision: str = "fp32"
) -> tuple[Row, ...]:
    """The rows of budgets beside the first latency; ratios are of what the dense model is predicted or counted at."""
    found = []
    for each in wanted:
        if each.of == "params":
            bytes_each = BYTES[precision] if each.budget.kind == "bytes" else None
            row = params_row(cost.graph, 1.0, bytes_each=bytes_each)
            limit = each.budget.limit_of(row.dense)
        elif each.of == "macs":
            row = macs_row(cost, 1.0)
            limit = each.budget.limit_of(row.dense)
        elif each.of in costs:
            row = latency_row(costs[each.of], 1.0, of=each.of, name=f"latency_us@{each.of}")
            limit = each.budget.limit_ms(row.dense / 1e3, batch=batch) * 1e3
        else:
            raise InputError(f"budget '{each}': no cost model of '{each.of}'{did_you_mean(each.of, costs)}")
        found.append(replace(row, limit=limit))
    return tuple(found)


def with_common_options(cost: CostModel, costs: Mapping[str, CostModel]) -> tuple[CostModel, dict[str, CostModel]]:
    """The cost models with the same widths on offer: of each group those of the device with the coarsest steps.

    A width that another device's surfaces don't cover is left out.
    """
    every = (cost, *costs.values())
    if len(every) == 1:
        return cost, {}
    options = {}
    for group in cost.options:
        offered = max((each.options[group] for each in every), key=step_of)
        least = max(each.options[group][0] for each in every)
        options[group] = tuple(width for width in offered if width >= least) or offered[-1:]
    found = [replace(each, options=options) for each in every]
    return found[0], dict(zip(costs, found[1:], strict=True))


def step_of(widths: Sequence[int]) -> int:
    """The step that all widths but the dense one lie on; 0 where there is no other."""
    return gcd(*widths[:-1])


def describe_choice(cost: CostModel, choice: Choice, device: str = "") -> dict[str, Any]:
    """What a plan says about the prediction it was chosen by; `device` is that of the cost model."""
    return {
        "origin": f"predicted from {cost.basis}",
        "predicted_ratio": round(choice.predicted_us / cost.predict({}).us, 4),
        "solver_gap": choice.gap,
        "exact_cost": choice.exact_cost,
        "budgets": [spent.to_json() | {"of": spent.row.of or device} for spent in choice.spent],
    }


def describe_rules(rules: Rules, schedule: Schedule) -> dict[str, Any]:
    """What a plan says about how it was chosen, where that isn't the default."""
    found: dict[str, Any] = {"scope": rules.scope}
    if rules.constraints != NONE:
        found["constraints"] = rules.constraints.describe()
    if schedule.steps > 1:
        found["schedule"] = {"steps": schedule.steps, "targets": schedule.targets}
    return found
