"""Growth: new parts for any model, which change nothing when they come (docs/growth.md)."""

from meristem.growth import surgery as surgery
from meristem.growth.attach import attach as attach
from meristem.growth.attach import slots_in as slots_in
from meristem.growth.attach import strip as strip
from meristem.growth.blend import blends as blends
from meristem.growth.blueprint import Blueprint as Blueprint
from meristem.growth.blueprint import blueprints as blueprints
from meristem.growth.certify import certify as certify
from meristem.growth.contribution import ablate as ablate
from meristem.growth.contribution import contributions as contributions
from meristem.growth.fuse import fuse as fuse
from meristem.growth.fuse import unfuse as unfuse
from meristem.growth.graft import advance as advance
from meristem.growth.graft import cost as cost
from meristem.growth.graft import graft as graft
from meristem.growth.graft import remove as remove
from meristem.growth.graft import seeds_in as seeds_in
from meristem.growth.graft import set_blend as set_blend
from meristem.growth.library import Library as Library
from meristem.growth.library import graft_from as graft_from
from meristem.growth.library import seed_for as seed_for
from meristem.growth.loader import Loader as Loader
from meristem.growth.optimizer import carry_on as carry_on
from meristem.growth.optimizer import forget as forget
from meristem.growth.plan import plan_graft as plan_graft
from meristem.growth.plan import plan_remove as plan_remove
from meristem.growth.score import slot_scores as slot_scores
from meristem.growth.seed import Seed as Seed
from meristem.growth.together import together as together
from meristem.growth.topology import replay as replay
from meristem.growth.topology import to_json as to_json
from meristem.growth.topology import topology as topology
from meristem.growth.transaction import Limits as Limits
from meristem.growth.transaction import transaction as transaction
from meristem.optim.origins import SeedSettings as SeedSettings

__all__ = [
    "Blueprint",
    "Library",
    "Loader",
    "Limits",
    "Seed",
    "SeedSettings",
    "ablate",
    "advance",
    "attach",
    "blends",
    "blueprints",
    "carry_on",
    "certify",
    "contributions",
    "cost",
    "forget",
    "fuse",
    "graft",
    "graft_from",
    "plan_graft",
    "plan_remove",
    "remove",
    "replay",
    "seed_for",
    "seeds_in",
    "set_blend",
    "slot_scores",
    "slots_in",
    "strip",
    "surgery",
    "to_json",
    "together",
    "topology",
    "transaction",
    "unfuse",
]
