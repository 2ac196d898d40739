"""``meristem bench trackers`` and ``meristem bench finetune`` give ratios of time of the processor."""

from itertools import count

import pytest

from meristem.bench import finetuning, trackers


def test_without_a_tracker_there_is_no_target(monkeypatch):
    """The cost of the files alone is measured, and what is not installed is named."""
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    monkeypatch.setattr(trackers, "PRESET", "charrnn")
    monkeypatch.setattr(trackers, "N_RECORDS", 10)
    clock = count(step=0.5)
    monkeypatch.setattr(trackers, "_cpu_s", lambda: next(clock))
    (row,) = trackers.trackers(1)
    # Half a second for ten steps, and half a second for ten records of which one comes in ten steps.
    assert row.measured == pytest.approx(10.0) and row.is_met is None
    assert row.note.startswith("50.00 ms a record of ") and "one in 10 steps of 50 ms; files" in row.note
    assert row.note.endswith("not installed: tensorboard, mlflow, wandb")


def test_without_transformers_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("meristem.extras.import_module", lambda name: (_ for _ in ()).throw(ImportError))
    (row,) = finetuning.finetuning(1)
    assert row.measured is None and "pip install 'meristem[hf]'" in row.note


@pytest.mark.extras
def test_both_steps_of_a_fine_tuning_are_the_same(monkeypatch):
    """The plain one is the same step: from equal weights both come to the same losses."""
    monkeypatch.setattr(finetuning, "HOST", finetuning.HOST | {"hidden_size": 16, "intermediate_size": 24})
    monkeypatch.setattr(finetuning, "SEQ_LEN", 16)
    found: list[float] = []
    real = finetuning._cpu

    def noted(step):
        def once():
            result = step()
            found.append(result if isinstance(result, float) else result.loss_nats)

        return real(once)

    monkeypatch.setattr(finetuning, "_cpu", noted)
    (row,) = finetuning.finetuning(1)
    assert row.measured > 0 and row.target == 1.05 and row.sense == "<="
    ours, plain = found[:5] + found[10:15], found[5:10] + found[15:]
    assert len(ours) == len(plain) == 10
    assert ours == pytest.approx(plain, rel=1e-3)
