"""The memory that a layer reads and writes, as its settings compose it, and how a reader of it begins."""

from jaxtyping import Float
from torch import Tensor, nn

from meristem.memory.state import State
from meristem.nn.cms_memory import CMSMemory
from meristem.nn.config import MemoryConfig
from meristem.nn.memory import NeuralMemory
from meristem.nn.memory_cache import MemoryCache, with_cache
from meristem.shapes import Hidden


def build_memory(width: int, config: MemoryConfig, *, is_asked: bool = False) -> NeuralMemory | MemoryCache | CMSMemory:
    """A module ``(hidden_btd, state) -> (recalled_btd, state)``: one memory, kept ones beside it, or several levels.

    is_asked: the layer also looks at the memory without writing; where answers of levels are mixed by learned shares,
    these have shares of their own.
    """
    if config.levels.count > 1 or config.levels.reset_after is not None:
        return CMSMemory(width, config, is_asked=is_asked)
    return with_cache(width, config)


def initial_state(recall: nn.Module, persistent_gd: Float[Tensor, "g d"] | None, hidden_btd: Hidden) -> State | None:
    """The state of a reader that has met the persistent vectors only; None, a fresh one, where there are none.

    Memory reads and writes them in front of the text (Titans 2501.00663, eq. 19).
    """
    if persistent_gd is None:
        return None
    _, state = recall(persistent_gd.to(hidden_btd.dtype).expand(hidden_btd.shape[0], -1, -1), None)
    met: State = state
    return met
