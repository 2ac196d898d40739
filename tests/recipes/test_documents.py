"""A run that reads whole documents: what a checkpoint holds of rows that stand at different places in theirs."""

import pytest
import torch

from meristem.checkpoint.store import find
from meristem.errors import CapabilityError
from meristem.events import silent
from meristem.memory.state import from_tensors, is_mixed
from meristem.models.load import load
from meristem.models.validate import require_resets
from meristem.recipes.pretrain import pretrain
from meristem.sinks.records import history
from recipes.small import config, write_documents, write_text

SETTINGS = (
    *("data.order=documents", "model.n_heads=2", "model.sliding_window=5", "memory.head_dim=4", "train.steps=8"),
    *("model.n_layers=1", "model.mlp=levels", "model.levels={count: 2, periods: [1, 3], tokens: pooled}"),
    *("optim.lr=0.01", "optim.grad_clip=1", "eval.every=null", "eval.n_samples=0", "checkpoint.last=20"),
)


RISING = ("data.difficulty.score=length", "data.difficulty.start=0.3", "data.difficulty.epochs=0.05")


@pytest.mark.parametrize(
    "is_mixed_text, rising",
    [(False, ()), pytest.param(False, RISING, marks=pytest.mark.slow), pytest.param(True, (), marks=pytest.mark.slow)],
    ids=["one-text", "easiest-first", "mixture"],
)
def test_a_resumed_run_takes_the_same_path(tmp_path, is_mixed_text, rising):
    """From a checkpoint within documents, bitwise: memories, keys and counts of every row, and the cursor.

    CX-8: also where the easiest are read first.
    DD-1: also of a mixture, whose report says what was read of each source.
    """
    documents, text = write_documents(tmp_path), write_text(tmp_path)
    mixture = (f"data.source={documents}+{text}", "data.weights=[3,1]") if is_mixed_text else ()
    settings = config(documents, *SETTINGS, *mixture, *rising, preset="titans-mag")
    whole = pretrain(settings, run_dir=tmp_path / "whole")
    middle = next(path for path in (whole.run_dir / "checkpoints").iterdir() if path.name.endswith("04"))
    assert is_mixed(from_tensors(find(middle, silent).tree("memory")))
    again = pretrain(settings, run_dir=tmp_path / "again", resume=str(middle))
    weights, restored = (load(run.checkpoint).model.state_dict() for run in (whole, again))
    assert all(torch.equal(tensor, restored[name]) for name, tensor in weights.items())
    losses, after = (
        [each["metrics"]["nats"] for each in history(run.run_dir) if each["split"] == "train"] for run in (whole, again)
    )
    assert len(losses) == 8 and after[-4:] == losses[-4:]
    read = [run.report.read_text().partition("| read of `texts` | ")[2].partition(" |")[0] for run in (whole, again)]
    assert read[0] == read[1] and read[0].endswith("times through") == is_mixed_text


def test_a_model_that_cannot_reset_is_refused():
    class Deaf(torch.nn.Module):
        def forward(self, tokens_bt, state=None):
            return tokens_bt, state

    with pytest.raises(CapabilityError, match=r"Deaf reads \(tokens_bt, state\) and takes no reset_mask_bt.*shuffled"):
        require_resets(Deaf())
