"""The library: what is stored comes back to the bit, or not at all; several processes write; nothing is executed."""

import datetime
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, SEEDS, bits, grown, host, logits
from meristem.checkpoint import catalog
from meristem.errors import (
    CertificateRefused,
    CheckpointCorrupt,
    CheckpointTooNew,
    DiskFull,
    MeristemError,
    ReportInvalid,
    RunError,
    RunInUse,
    ShapeError,
    WrongValue,
)
from meristem.growth.certify import Certificate
from meristem.growth.library import TRUST, Library
from meristem.growth.report import GrowthReport, append
from meristem.growth.settle import settle
from meristem.growth.weights import packed

certifying = import_module("meristem.growth.certify")
PLACE = PLACES["foreign"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of the same probes, with fewer steps on noise."""
    monkeypatch.setattr(certifying, "N_STEPS", 2)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library(tmp_path / "library", clock=lambda: 1e9) as library:
        yield library


@pytest.mark.parametrize("seed", SEEDS)
def test_a_trained_seed_is_transplanted(seed: str, library: Library) -> None:
    """Into another model, at another place: the host is untouched until the seed is blended in, and then the seed adds
    there what it added before."""
    model, made = grown("foreign", seed, blend="channel")
    before = bits(model)
    card = library.put_seed("found", model, PLACE)
    assert bits(model) == before and card.fitting.n_parameters == sum(x.numel() for x in made.parameters())
    other = grow.attach(host("preset-default", torch.float64), "blocks.*")
    plain, tokens_bt = logits(other, zoo.ids(2)), zoo.ids(2)
    taken = grow.graft_from(other, "blocks.0", library.load("found"))
    assert torch.equal(logits(other, tokens_bt), plain) and taken.origin == made.origin
    assert packed(taken) == packed(made)
    grow.set_blend(other, "blocks.0", 1.0)
    hidden_btd = torch.randn(2, 7, 12, dtype=torch.float64)
    assert torch.equal(taken(hidden_btd, hidden_btd, None, None)[0], made(hidden_btd, hidden_btd, None, None)[0])
    assert not torch.allclose(logits(other, tokens_bt), plain, atol=1e-4)


def test_a_stored_blueprint_is_grafted_as_a_new_seed(library: Library) -> None:
    card = library.put_blueprint("small", "bottleneck", hidden=5, blend="gated")
    assert (card.version, card.trust, card.created, card.sha256) == (1, "safe", 1e9, None)
    assert library.put_blueprint("small", "bottleneck", hidden=5, blend="gated") == card
    assert library.put_blueprint("small", "bottleneck", hidden=6).version == 2
    model = grow.attach(host("foreign"), PLACE)
    made = grow.graft_from(model, PLACE, library.load("small", 1))
    assert made.origin == card.origin and float(made.blend_weight) == 1.0
    assert torch.equal(logits(model, zoo.ids(2)), logits(host("foreign"), zoo.ids(2)))


def test_what_is_listed_can_be_narrowed(library: Library) -> None:
    model, _ = grown("foreign", "low_rank")
    library.put_seed("b", model, PLACE)
    library.put_blueprint("a", "norm")
    library.put_blueprint("c", "low_rank", trust="high_risk")
    assert [card.name for card in library.search()] == ["a", "b", "c"]
    assert [card.name for card in library.search(blueprint="low_rank")] == ["b", "c"]
    assert [card.name for card in library.search(width=13)] == ["a", "c"]
    assert [[card.name for card in library.search(allow=trust)] for trust in TRUST] == [
        ["a"],
        ["a", "b"],
        ["a", "b", "c"],
    ]
    library.retire("b")
    assert [card.name for card in library.search()] == ["a", "c"]
    with pytest.raises(WrongValue, match="holds no 'b'"):
        library.load("b")
    assert library.put_seed("b", model, PLACE).version == 2, "what was retired is stored anew"


class Plain(nn.Sequential):
    """What it gives are logits."""

    def readout(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        return hidden_btd


NAMES = st.from_regex(catalog.NAME, fullmatch=True).filter(lambda name: len(name) < 20)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=NAMES,
    rank=st.integers(1, 5),
    blend=st.sampled_from(grow.blends.names()),
    trust=st.sampled_from(TRUST),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    random_seed=st.integers(0, 2**40),
)
def test_what_is_stored_comes_back(
    library: Library, name: str, rank: int, blend: str, trust: str, dtype: torch.dtype, random_seed: int
) -> None:
    """Card and tensors, after the library was opened again too."""
    model = grow.attach(Plain(nn.Linear(7, 12)), "0", reads="input").to(dtype)
    made = grow.graft(model, "0", "low_rank", rank=rank, blend=blend, random_seed=random_seed)
    nn.init.normal_(made.layer.out.weight)
    card = library.put_seed(name, model, "0", trust=trust)
    with Library(library.place) as again:
        found = again.load(name)
    assert found.card == card == library.card(name) and card.origin == made.origin
    assert {key: x.dtype for key, x in found.tensors.items()} == {
        key: x.dtype for key, x in made.state_dict().items() if key in found.tensors
    }
    other = grow.attach(Plain(nn.Linear(7, 12)), "0", reads="input").to(dtype)
    assert packed(grow.seed_for(other, "0", found)) == packed(made)


def test_ta4_changes_are_numbered_and_seen_by_others(library: Library) -> None:
    """The feed gives what was put in, certified or retired after a number, to every process that has the file open."""
    with Library(library.place) as other:
        assert other.changes() == (0, [])
        library.put_blueprint("a", "norm")
        at, changes = other.changes()
        assert (at, changes) == (1, [{"seq": 1, "kind": "blueprint", "name": "a", "version": 1}])
        library.put_blueprint("a", "norm")
        assert other.changes(at) == (1, []), "the same again is no change"
        library.put_blueprint("a", "low_rank")
        other.retire("a")
        assert [(each["kind"], each["version"]) for each in library.changes(at)[1]] == [
            ("blueprint", 2),
            ("retired", 2),
        ]


def certified(library: Library, name: str, **settings: int) -> Certificate:
    """The certificate of what a library holds, of probes that were run."""
    return library.certify(name, grow.attach(host("foreign"), PLACE), PLACE, **settings)


def test_certificates_are_a_chain(library: Library) -> None:
    """Altering, removing or inserting one is noticed, and so is a certificate of another seed."""
    library.put_blueprint("a", "norm")
    library.put_blueprint("b", "low_rank")
    made = [certified(library, name) for name in "abab"]
    assert library.certificates() == made and library.certificates("a") == made[::2]
    speed = library.benchmarks("a")
    assert len(speed) == 2 and speed[0]["shape"] == [3, 24, 12] and speed[0]["p95_ms"] >= speed[0]["p50_ms"] > 0
    assert library.card("a").handling == "standard" and library.certificates("a")[0].band == "low"


def test_a_certificate_is_of_the_weights_that_are_stored(library: Library) -> None:
    """In the dtype of its host: the same file, where that is the one of the model that it was trained in."""
    stored(library)
    found = certified(library, "s")
    assert (found.weights_sha256, found.origin) == (library.card("s").sha256, library.card("s").origin)
    other = library.certify("s", grow.attach(host("foreign", torch.float32), PLACE), PLACE)
    assert other.weights_sha256 != found.weights_sha256 and other.benchmark.dtype == "float32"
    with pytest.raises(WrongValue, match="holds no 't'"):
        certified(library, "t")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE certificates SET score = 0.5 WHERE number = 3",
        "UPDATE certificates SET issued = issued + 1 WHERE number = 1",
        "UPDATE certificates SET evidence = replace(evidence, 'passed', 'failed') WHERE number = 3",
        "DELETE FROM certificates WHERE number = 2",
        "UPDATE certificates SET name = 'b' WHERE number = 1",
    ],
)
def test_a_certificate_that_was_altered_or_removed_is_noticed(change: str, library: Library) -> None:
    for name in ("a", "b"):
        library.put_blueprint(name, "norm")
    for _ in range(3):
        certified(library, "a")
    raw = sqlite3.connect(library.place / catalog.FILE)
    raw.execute(change)
    raw.commit()
    raw.close()
    with pytest.raises(CheckpointCorrupt, match=r"certificate \d, of '[ab]' .* does not fit into the chain"):
        library.certificates()


def test_trust_is_that_of_the_certificate_too(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    model = grow.attach(host("foreign"), PLACE)
    library.put_blueprint("risky", "norm", trust="high_risk")
    before = bits(model)
    with pytest.raises(
        CertificateRefused, match="'risky', version 1, has the trust 'high_risk'; expected 'experimental'"
    ):
        grow.graft_from(model, PLACE, library.load("risky"))
    assert bits(model) == before and grow.seeds_in(model) == {}
    grow.graft_from(model, PLACE, library.load("risky"), allow="high_risk")
    library.put_blueprint("heavy", "norm")
    assert library.load("heavy").card.risk == "safe"
    grow.remove(model, PLACE)
    assert certified(library, "heavy", watermark_bytes=0).band == "low", "one small complaint is not enough"
    monkeypatch.setitem(certifying.WEIGHTS, "watermark", 0.7)
    assert certified(library, "heavy", watermark_bytes=0).handling == "quarantine"
    with pytest.raises(CertificateRefused, match="certificate says 'quarantine'"):
        grow.graft_from(model, PLACE, library.load("heavy"))


def stored(library: Library) -> Path:
    """The file of a seed that was stored as ``s``."""
    library.put_seed("s", grown("foreign", "low_rank")[0], PLACE)
    return next((library.place / catalog.FOLDER).glob("*.safetensors"))


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "altered or cut"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"), "altered or cut"),
        (lambda file: file.write_bytes(b"\x80\x04cos\nsystem\n."), "altered or cut"),
        (lambda file: file.unlink(), "cannot be read"),
    ],
)
def test_a_file_that_is_not_the_stored_one_is_refused(
    harm: Callable[[Path], object], message: str, library: Library
) -> None:
    """At every read; storing the seed again mends it."""
    file = stored(library)
    assert library.load("s")
    harm(file)
    with pytest.raises(CheckpointCorrupt, match=f"weights of 's'.*{message}.*Store the seed again"):
        library.load("s")
    assert stored(library) == file and library.load("s").card.version == 1


@pytest.mark.parametrize(
    "content, error, message",
    [
        (b"SQLite format 3\x00 and then nothing that fits", CheckpointCorrupt, "is broken: "),
        (b"no database" * 100, CheckpointCorrupt, "is broken: file is not a database"),
    ],
)
def test_a_broken_library_is_one_sentence(
    tmp_path: Path, content: bytes, error: type[MeristemError], message: str
) -> None:
    (tmp_path / catalog.FILE).write_bytes(content)
    with pytest.raises(error, match=message):
        Library(tmp_path)
    assert (tmp_path / catalog.FILE).read_bytes() == content


def test_a_library_with_a_hole_in_it_is_refused(library: Library) -> None:
    for number in range(40):
        library.put_blueprint(f"n{number}", "norm")
    library.close()
    file = library.place / catalog.FILE
    content = bytearray(file.read_bytes())
    content[4096 : len(content) - 4096] = bytes(len(content) - 8192)
    file.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match="is broken: .*Take it from a copy"):
        Library(library.place)


def test_files_of_others_and_of_later_versions_are_refused(library: Library, tmp_path: Path) -> None:
    library.close()
    raw = sqlite3.connect(library.place / catalog.FILE)
    raw.execute(f"PRAGMA user_version = {len(catalog.MIGRATIONS) + 1}")
    raw.close()
    with pytest.raises(CheckpointTooNew, match="is of version 2; this meristem reads up to 1"):
        Library(library.place)
    (tmp_path / "other").mkdir()
    raw = sqlite3.connect(tmp_path / "other" / catalog.FILE)
    raw.execute("CREATE TABLE songs (title TEXT)")
    raw.commit()
    raw.close()
    with pytest.raises(CheckpointCorrupt, match="a file of another program"):
        Library(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot hold a library"):
        Library(tmp_path / "file")


def test_an_older_library_is_brought_to_today(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a migration that fails leaves it as it was."""
    library.put_blueprint("a", "norm")
    library.close()
    monkeypatch.setattr(
        catalog, "MIGRATIONS", (*catalog.MIGRATIONS, "CREATE TABLE t (x); INSERT INTO nowhere VALUES (1);")
    )
    with pytest.raises(CheckpointCorrupt, match="no such table: nowhere"):
        Library(library.place)
    monkeypatch.setattr(catalog, "MIGRATIONS", (catalog.MIGRATIONS[0], "CREATE TABLE t (x);"))
    with Library(library.place) as again:
        assert again.card("a").origin.blueprint == "norm"
    monkeypatch.undo()
    with pytest.raises(CheckpointTooNew):
        Library(library.place)


WRITER = """
import sys
from meristem.checkpoint.catalog import Catalog
with Catalog(sys.argv[1]) as catalog:
    for number in range(15):
        catalog.put(f"own-{sys.argv[2]}-{number}", origin={"number": number}, trust="safe")
        catalog.put("shared", origin={"writer": sys.argv[2], "number": number}, trust="safe")
"""


def test_several_processes_write(tmp_path: Path) -> None:
    """Into one library that none of them has made before: no write is lost, versions are not given twice."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with catalog.Catalog(tmp_path) as found:
        assert len(found.cards()) == 3 * 15 + 1 and found.card("shared")["version"] == 45
        at, changes = found.changes()
        assert at == len(changes) == 90
        assert sorted(each["version"] for each in changes if each["name"] == "shared") == [*range(1, 46)]


@pytest.mark.fault
def test_a_killed_writer_leaves_a_whole_library(tmp_path: Path) -> None:
    for n in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)])
        try:
            writer.wait(0.3 + 0.1 * n)
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.wait()
        with catalog.Catalog(tmp_path) as found:
            assert found.changes()[0] == sum(1 for _ in found.changes()[1])


def test_ta5_what_fails_in_the_middle_leaves_what_was(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a crash before the rename, and a writer that does not let go: nothing is half-written."""
    file = stored(library)
    before = file.read_bytes()
    model, made = grown("foreign", "low_rank")
    with torch.no_grad():
        made.layer.out.weight.add_(1.0)

    def refused(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refused)
        with pytest.raises(DiskFull, match="untouched"):
            library.put_seed("s", model, PLACE)
    assert [*(library.place / catalog.FOLDER).iterdir()] == [file] and file.read_bytes() == before
    assert library.card("s").version == 1 and library.changes()[0] == 1
    impatient = catalog.Catalog(library.place, busy_s=0.05)
    raw = sqlite3.connect(library.place / catalog.FILE, isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunInUse, match="another process has been writing"):
        impatient.put("t", origin={}, trust="safe")
    raw.execute("ROLLBACK")
    raw.close()
    assert impatient.put("t", origin={}, trust="safe") == 1
    impatient.close()


REFUSED = [
    (
        lambda: grow.attach(nn.Sequential(nn.Linear(12, 13)), "0"),
        "0",
        ShapeError,
        "of the width 12 and adds to 12; .*13",
    ),
    (lambda: grow.attach(nn.Sequential(nn.Linear(12, 12)), "0", reads="input"), "0", WrongValue, "reads the output"),
    (lambda: grown("foreign", "norm")[0], PLACE, WrongValue, "holds a seed already"),
    (lambda: host("foreign"), PLACE, WrongValue, "no slot is called"),
]


@pytest.mark.parametrize("make, slot, error, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_a_slot_that_does_not_fit_is_refused_with_the_model_untouched(
    make: Callable[[], nn.Module], slot: str, error: type[MeristemError], message: str, library: Library
) -> None:
    stored(library)
    model = make()
    before = bits(model)
    with pytest.raises(error, match=message):
        grow.graft_from(model, slot, library.load("s"))
    assert bits(model) == before


def test_what_cannot_be_stored_or_found_is_named(library: Library) -> None:
    with pytest.raises(WrongValue, match="holds no 'a'. It is empty"):
        library.card("a")
    library.put_blueprint("adapter", "norm")
    with pytest.raises(WrongValue, match="holds no 'adaptor'. Nearest: adapter"):
        library.load("adaptor")
    with pytest.raises(WrongValue, match="holds no 'adapter, version 3'"):
        library.card("adapter", 3)
    with pytest.raises(WrongValue, match="'../a' cannot be the name"):
        library.put_blueprint("../a", "norm")
    with pytest.raises(WrongValue, match="the trust 'total'.*expected one of safe"):
        library.put_blueprint("a", "norm", trust="total")
    with pytest.raises(MeristemError, match="no blueprint is called 'nrm'"):
        library.put_blueprint("a", "nrm")
    with pytest.raises(WrongValue, match="is empty"):
        library.put_seed("a", grow.attach(host("foreign"), PLACE), PLACE)
    assert library.changes()[0] == 1
    library.close()
    with pytest.raises(RunError, match="is closed"):
        library.card("adapter")


def test_no_code_is_stored(library: Library) -> None:
    """Every column is a number or a text, every text is plain JSON or a word, and files are safetensors."""
    file = stored(library)
    certified(library, "s")
    raw = sqlite3.connect(library.place / catalog.FILE)
    tables = [name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert {"blueprints", "weights", "certificates", "benchmarks", "reports", "changes"} <= set(tables)
    for table in tables:
        for row in raw.execute(f"SELECT * FROM {table}"):
            assert all(isinstance(value, int | float | str | None) for value in row)
    raw.close()
    length = int.from_bytes(file.read_bytes()[:8], "little")
    assert "layer.out.weight" in json.loads(file.read_bytes()[8 : 8 + length])


def test_t12_reports_are_gathered_by_their_time_alone(library: Library, tmp_path: Path) -> None:
    """Each once, in the order in which they were issued; one that was written again takes the place of the first."""
    log, noon = tmp_path / "growth.log", datetime.datetime(2026, 11, 28, 12, tzinfo=datetime.UTC)
    made = [
        GrowthReport(f"s#{n}", "blocks.1", "norm", "run", "success", 1, 9, 0.0, {"gain": None}).issued(
            noon + datetime.timedelta(hours=n)
        )
        for n in range(4)
    ]
    for each in (made[2], made[0], made[3], made[1]):
        append(log, each)
    assert library.gather_reports(log, since=made[2].issued_at) == 2 and library.reports() == made[2:]
    assert library.gather_reports(log) == 2 and library.gather_reports(log) == 0
    assert library.reports("norm") == made and library.reports("conv") == []
    again = replace(made[1], outcome="regression").issued(noon + datetime.timedelta(hours=9))
    append(log, again)
    assert library.gather_reports(log) == 1 and library.reports() == [made[0], *made[2:], again]
    with pytest.raises(ReportInvalid, match="has no issued_at"):
        append(log, replace(made[1], issued_at=""))


def test_a_seed_that_was_kept_is_stored_and_others_may_stand_on_it(library: Library) -> None:
    """The open seed of a slot comes first; where there is none, the one that settled last."""
    model, made = grown("foreign", "low_rank")
    settle(model, PLACE)
    assert library.put_seed("kept", model, PLACE).origin == made.origin
    assert packed(grow.seed_for(model, PLACE, library.load("kept"))) == packed(made)
    before = bits(model)
    assert library.certify("kept", model, PLACE).band == "low" and bits(model) == before
    grow.graft_from(model, PLACE, library.load("kept"))
    assert library.put_seed("again", model, PLACE).fitting.blend_weight == 0.0
