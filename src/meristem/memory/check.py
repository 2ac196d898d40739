"""Which parts go together (memory.md 2.8)."""

from meristem.errors import ConflictingKeys
from meristem.memory.rule import Rule


def conflicts(rule: Rule) -> list[str]:
    """Why the parts of a rule do not go together, each with the nearest choice that does; empty when they do."""
    kind, bias, retention, update = rule.structure.kind, rule.bias.name, rule.retention.name, rule.update.name
    has_slots = kind in ("slots", "two_slots")
    is_matrix = kind in ("matrix", "vector")
    on_simplex = retention in ("simplex", "f_divergence", "entropy", "bounded")
    found = {
        f"the retention '{retention}' keeps weights positive, and slots point anywhere: take 'decay' or 'sphere'": (
            on_simplex and has_slots
        ),
        "the retention 'sphere' would fix the length of every row of an MLP: take 'decay', or the structure 'slots'": (
            retention == "sphere" and kind == "mlp"
        ),
        "the retention 'sphere' bounds what is recalled, and the bias 'kl' needs logits of any size: take 'squared'": (
            retention == "sphere" and bias == "kl"
        ),
        "the bias 'kl' is not meant for an MLP, whose residual output is no logit: take the structure 'matrix'": (
            bias == "kl" and kind == "mlp"
        ),
        "the bias 'dot' does not depend on the output of an MLP, which then grows without end: take 'squared'": (
            bias == "dot" and kind == "mlp"
        ),
        f"the update '{update}' solves one linear recall exactly: take the structure 'matrix', or the update 'plain'": (
            update in ("implicit", "delta_descent") and not is_matrix
        ),
        "the update 'implicit' is the exact step of the bias 'squared': take that bias, or the update 'plain'": (
            update == "implicit" and bias != "squared"
        ),
        f"the probe 'warm' measures at retained weights, and the retention '{retention}' stores something else: take "
        "the probe 'cold'": rule.probe == "warm" and retention not in ("decay", "local", "elastic"),
        f"the probe 'warm' has no meaning for the update '{update}': take 'cold'": (
            rule.probe == "warm" and update in ("delta_descent", "leader")
        ),
        f"the structure '{kind}' writes codes, which a span does not remember: take span 1": (
            rule.span > 1 and has_slots
        ),
        f"the bias '{bias}' has one threshold per token, a span several pairs: take 'huber_norm', or span 1": (
            rule.span > 1 and rule.bias.has_threshold
        ),
        f"the update '{update}' takes one pair at a time: take 'plain' or 'momentum', or span 1": (
            rule.span > 1 and update in ("implicit", "delta_descent", "delta_momentum")
        ),
        "the span is below 1: take 1": rule.span < 1,
    }
    return [reason for reason, is_met in found.items() if is_met]


def check(rule: Rule) -> Rule:
    """The rule itself. Raises ConflictingKeys that lists every reason why its parts do not go together."""
    reasons = conflicts(rule)
    if reasons:
        raise ConflictingKeys(f"these parts make no rule: {'; '.join(reasons)}.", reasons=reasons)
    return rule
