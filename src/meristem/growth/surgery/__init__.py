"""Operators on models of ours: each a plan for ``growth.transaction``, and a change by which a log rebuilds shapes."""

from meristem.growth.surgery.blocks import plan_copy_blocks as plan_copy_blocks
from meristem.growth.surgery.blocks import plan_insert_block as plan_insert_block
from meristem.growth.surgery.blocks import plan_interleave as plan_interleave
from meristem.growth.surgery.blocks import plan_remove_block as plan_remove_block
from meristem.growth.surgery.blocks import plan_stack as plan_stack
from meristem.growth.surgery.fold import plan_fossilize as plan_fossilize
from meristem.growth.surgery.fold import plan_unsettle as plan_unsettle
from meristem.growth.surgery.heads import plan_add_heads as plan_add_heads
from meristem.growth.surgery.host import carry_state as carry_state
from meristem.growth.surgery.levels import plan_add_level as plan_add_level
from meristem.growth.surgery.rank import plan_raise_rank as plan_raise_rank
from meristem.growth.surgery.vocabulary import plan_activate_vocabulary as plan_activate_vocabulary
from meristem.growth.surgery.vocabulary import plan_extend_vocabulary as plan_extend_vocabulary
from meristem.growth.surgery.vocabulary import plan_shrink_vocabulary as plan_shrink_vocabulary
from meristem.growth.surgery.width import plan_widen_residual as plan_widen_residual
