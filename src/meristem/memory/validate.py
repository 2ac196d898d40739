"""What inputs and a memory must be before a rule runs on them: checked once, where a caller hands them in."""

import torch
from torch import Tensor

from meristem.errors import ShapeError, WrongValue
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory
from meristem.shapes import Keys, Queries, Values


def require_window(
    rule: Rule, memory: Memory, keys_bthk: Keys, values_bthv: Values, queries_bthk: Queries, gates: Gates
) -> None:
    """Raises ShapeError for a memory or gates that are not those of the rule at these widths, listing every difference;
    and, on the CPU, WrongValue for what no rule can use: values that are not finite, gates out of their range."""
    misfits = _misfits(rule, memory, keys_bthk, values_bthv) + _missing(rule, gates)
    if misfits:
        raise ShapeError(
            f"these inputs do not fit the rule: {'; '.join(misfits)}. Make the memory with rule.init at these widths, "
            f"and give the gates that the rule needs.",
            misfits=misfits,
        )
    if keys_bthk.device.type == "cpu":
        wrong = _wrong_values({"keys": keys_bthk, "values": values_bthv, "queries": queries_bthk}, gates)
        if wrong:
            raise WrongValue(f"a memory cannot be written with these: {'; '.join(wrong)}.", value=wrong)


def _misfits(rule: Rule, memory: Memory, keys_bthk: Keys, values_bthv: Values) -> list[str]:
    batch, _, heads, width = keys_bthk.shape
    with torch.device("meta"):
        fresh = rule.init(1, heads, width, values_bthv.shape[-1], like=keys_bthk.new_empty(0, device="meta"))
    misfits = [f"the memory has no '{name}'" for name in fresh if name not in memory]
    for name, expected in fresh.items():
        found, wanted = memory.get(name, expected).shape[1:], expected.shape[1:]
        if found != wanted:
            misfits.append(f"'{name}' is {tuple(found)} for each row of the batch, expected {tuple(wanted)}")
        rows = memory[name].shape[0] if name in memory else batch
        if rows != batch:
            misfits.append(f"'{name}' holds {rows} rows, the inputs have {batch}")
    strange = [name for name in memory if name not in fresh and name != "unfinished" and "_reset_" not in name]
    return misfits + [f"the memory holds '{name}', which this rule does not know" for name in strange]


def _missing(rule: Rule, gates: Gates) -> list[str]:
    n_codes = rule.structure.n_codes
    needed = {
        "momentum_bth": rule.update.has_momentum,
        "threshold_bth": rule.bias.has_threshold,
        "weight_bth": rule.span > 1,
        "code_bthg": n_codes > 0,
    }
    absent = [name for name, is_needed in needed.items() if is_needed and getattr(gates, name) is None]
    missing = [f"the rule needs the gates {name}" for name in absent]
    if gates.code_bthg is not None and n_codes and gates.code_bthg.shape[-1] != n_codes:
        missing.append(f"code_bthg addresses {gates.code_bthg.shape[-1]} slots, the rule has {n_codes}")
    return missing


def _wrong_values(vectors: dict[str, Tensor], gates: Gates) -> list[str]:
    wrong = [f"{name} are not all finite" for name, x in vectors.items() if not bool(x.isfinite().all())]
    ranges = {
        "retain_bth": (0.0, 1.0),
        "write_bth": (0.0, torch.inf),
        "momentum_bth": (0.0, 1.0),
        "threshold_bth": (0.0, torch.inf),
        "weight_bth": (0.0, torch.inf),
    }
    for name, (least, most) in ranges.items():
        gate = getattr(gates, name)
        if gate is not None and not bool(((gate >= least) & (gate <= most)).all()):
            wrong.append(f"{name} spans {gate.min():.3g} to {gate.max():.3g}, expected {least:g} to {most:g}")
    return wrong
