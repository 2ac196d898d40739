"""What is really written is what the published schemas say."""

import json
import math
from pathlib import Path

import jsonschema
import pytest

from meristem.checkpoint.run import RunManifest, read
from meristem.checkpoint.store import open_checkpoint
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.device.describe import describe
from meristem.events import Event, silent
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import Records, schema
from meristem.sinks.system import SystemSampler

NAMES = ["metrics", "event", "sample", "system", "run", "checkpoint", "dataset"]


def validator(name):
    return jsonschema.Draft202012Validator(schema(name), format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_one(name):
    """Each is valid JSON Schema under its public name, and admits no unknown field."""
    jsonschema.Draft202012Validator.check_schema(schema(name))
    assert schema(name)["$id"] == f"meristem.{name}/{2 if name == 'checkpoint' else 1}"
    assert schema(name)["additionalProperties"] is False


@pytest.mark.parametrize("rank", [None, 3])
def test_records_follow_their_schema(tmp_path, rank):
    """Every record written, odd values and a rank included, is valid."""
    records = Records(tmp_path, "r1", rank=rank)
    records.metrics(0, 0, 0.0, "train", {"loss": math.nan, "rate": 1})
    records.metrics(7, 49, 0.25, "val", {"loss": 2.5, "none": None}, task="copy", tags={"level": math.inf})
    records.event(Event("checkpoint.saved", {"many": list(range(2000)), "nan": math.nan}, "warning"), step=7)
    records.sample(7, "a", "b", {"top_k": 3})
    with SystemSampler(records, 0.01, emit=lambda event: records.event(event, 7)):
        pass
    records.close()
    for stream, name in {"metrics": "metrics", "events": "event", "samples": "sample", "system": "system"}.items():
        found = list(read_records(tmp_path / f"{stream}.ndjson"))
        assert found
        for record in found:
            validator(name).validate(record)


def test_run_follows_its_schema(tmp_path):
    """CX-13.1, CX-13.3: a run as created, as described, and as ended is valid."""
    manifest = RunManifest.create(tmp_path, name="n", command="meristem train", random_seed=3)
    validator("run").validate(read(tmp_path))
    manifest.update(**describe(), best={"metric": "val/bits_per_byte", "value": 2.5, "step": 7})
    manifest.end("interrupted", 130)
    validator("run").validate(read(tmp_path))


def test_checkpoint_follows_its_schema():
    """The stored fixture, once written by the store, is valid."""
    fixture = Path(__file__).parents[1] / "checkpoint" / "fixtures" / "step-00000007"
    validator("checkpoint").validate(dict(open_checkpoint(fixture).manifest))


def test_corpus_follows_its_schema(tmp_path):
    """The manifest of a corpus prepared from files is valid."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(11):
        (texts / f"{number}.txt").write_text(f"text {number}\n" * 97)
    corpus = prepare(DataConfig(source=str(texts), root=tmp_path / "corpora"), TokenizerConfig(), silent)
    validator("dataset").validate(corpus.manifest)


def test_schema_refuses_what_is_not_a_record(tmp_path):
    """The schemas can say no: a missing field, an unknown one, a wrong split."""
    records = Records(tmp_path, "r1")
    records.metrics(1, 1, 0.0, "val", {"loss": 1.0})
    records.close()
    (good,) = read_records(tmp_path / "metrics.ndjson")
    for bad in (good | {"split": "dev"}, good | {"extra": 1}, {k: v for k, v in good.items() if k != "tokens"}):
        assert not validator("metrics").is_valid(json.loads(json.dumps(bad)))
