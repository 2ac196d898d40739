"""What is exported for the edge reads on as the model does, and a session goes from one to the other and back."""

import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import zoo
from edges import (
    BAD_TOKEN,
    MISUSED,
    MODELS,
    NO_FILE,
    OK,
    Failed,
    Model,
    Sampling,
    content_of,
    made,
    save_checkpoint,
    tokenizer,
)
from meristem.checkpoint import migrate
from meristem.cli import run
from meristem.errors import RunError, WrongValue
from meristem.events import silent
from meristem.export import edge
from meristem.models.generate import Sampling as Drawing
from meristem.native.build import has_compiler
from meristem.native.library import supported
from meristem.serve.session import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # what is compiled first is kept
    pytest.mark.skipif(not (has_compiler() and supported()), reason="needs a C++ compiler: apt-get install g++"),
]
TEXT = "My sister Lydia likes soup.\nThe operation on the following line"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("edge") / "model"
    assert run(["export", "edge", "--to", str(to)]) == 0
    return to


def session(shipped, text: str = TEXT) -> Session:
    begun = Session(shipped.model, shipped.tokenizer, sampling=Drawing(temperature=0))
    begun.feed(text)
    return begun


def written(shipped, begun: Session, n: int) -> list[int]:
    """The next ids that a session writes."""
    logits_bo, found = begun._now.logits_bo, []
    for _ in range(n):
        found.append(int(logits_bo.argmax()))
        logits_bo = begun._read_on(found[-1])
    begun._end_turn()
    return found


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("name", MODELS)
def test_it_reads_as_the_model_does(core, name):
    """All predictions of a text, from its first token on, beside float64; rings and convolutions wrap several times."""
    model = made(name)
    tokens_bt = zoo.ids(1, 41)
    with torch.no_grad():
        true_to = model.double()(tokens_bt)[0][0]
    handle = Model(core, content_of(model.float(), tokenizer()))
    found_to = torch.stack([handle.read([token_id]) for token_id in tokens_bt[0].tolist()])
    assert relative(found_to.double(), true_to) < 3e-6


def test_a_session_goes_on_there_and_comes_back(core, shipped, content, tmp_path):
    """The same 200 greedy tokens, and each prediction within 3e-6 of its length."""
    begun = session(shipped)
    begun.save(tmp_path / "begun")
    handle = Model(core, content)
    handle.load((tmp_path / "begun").read_bytes())
    assert torch.equal(handle.logits, begun._now.logits_bo[0]) and handle.n_tokens == begun.n_tokens
    true = written(shipped, begun, 100)
    assert [handle.step() for _ in range(100)] == true
    assert relative(handle.logits, begun._now.logits_bo[0]) < 3e-6
    (tmp_path / "back").write_bytes(handle.save())
    back = Session.load(tmp_path / "back", shipped.model, shipped.tokenizer)
    assert (back.n_tokens, back.id, back.turn) == (begun.n_tokens, begun.id, begun.turn)
    assert written(shipped, back, 100) == written(shipped, begun, 100)


def test_a_session_that_begins_there_is_one(core, shipped, content, tmp_path):
    handle = Model(core, content)
    ids = shipped.tokenizer.encode(TEXT)
    handle.read(ids)
    (tmp_path / "own").write_bytes(handle.save())
    opened = Session.load(tmp_path / "own", shipped.model, shipped.tokenizer, learn="memory")
    begun = session(shipped)
    assert opened.n_tokens == begun.n_tokens and opened.turn == 1
    assert written(shipped, opened, 60) == written(shipped, begun, 60)


def test_saved_and_loaded_is_the_same_to_the_bit(core, shipped, content):
    """At each of some lengths, on both sides of a full ring; and a session that has read nothing."""
    handle, other = Model(core, content), Model(core, content)
    other.load(handle.save())
    assert other.n_tokens == 0
    ids = shipped.tokenizer.encode(TEXT * 9)
    for first, end in ((0, 1), (1, 4), (4, 63), (63, 64), (64, 65), (65, 97)):
        handle.read(ids[first:end])
        other.load(handle.save())
        assert other.n_tokens == end and torch.equal(other.logits, handle.logits)
        assert torch.equal(
            other.read(ids[end : end + 9]), Model.read(copied(core, content, handle), ids[end : end + 9])
        )


def copied(core, content, handle) -> Model:
    again = Model(core, content)
    again.load(handle.save())
    return again


def test_what_the_loaded_header_said_stays(core, shipped, content, tmp_path):
    begun = session(shipped)
    begun.name, begun.random_seed = 'of "Ada" \\ \n\u00e9\U0001f600', 77
    begun.save(tmp_path / "begun")
    handle = Model(core, content)
    handle.load((tmp_path / "begun").read_bytes())
    handle.step()
    (tmp_path / "back").write_bytes(handle.save())
    back = Session.load(tmp_path / "back", shipped.model, shipped.tokenizer)
    assert (back.name, back.random_seed, back.sampling) == (begun.name, 77, begun.sampling)


def test_what_is_noted_is_in_the_file(core, shipped, content, tmp_path):
    handle = Model(core, content)
    turns = json.dumps([{"turn": 1, "text": 'a "b" \u2028', "reply": "c\nd", "seed": None}]).encode()
    handle.note("turns", b"[]")
    handle.note("turns", turns)
    other = Model(core, content)
    other.load(handle.save())
    assert other.noted("turns") == turns and other.noted("others") is None
    (tmp_path / "own").write_bytes(other.save())
    assert Session.load(tmp_path / "own", shipped.model, shipped.tokenizer).name == "edge"
    for name, wrong in (("turns", b"[1,"), ("turns", b"1 2"), ("model", b"1"), ("A", b"1"), ("", b"1"), ("a", b"")):
        with pytest.raises(Failed, match="needs a name of small letters .* and a value that is JSON"):
            handle.note(name, wrong)
    assert handle.noted("turns") == turns
    handle.forget()
    assert handle.noted("turns") is None


def test_forgotten_is_as_opened(core, shipped, content):
    handle, ids = Model(core, content), shipped.tokenizer.encode(TEXT)
    first = handle.read(ids)
    handle.forget()
    assert handle.n_tokens == 0 and not core.meristem_logits(handle.at)
    assert torch.equal(handle.read(ids), first)


def test_a_draw_depends_on_seed_and_place_alone(core, shipped, content):
    """Draws follow the shares of a temperature, and top_k and top_p bound them."""
    handle = Model(core, content)
    handle.read(shipped.tokenizer.encode("The"))
    begun, share_o = handle.save(), handle.logits.div(0.7).softmax(0)
    likely = set(share_o.topk(3).indices.tolist())
    drawn = []
    for seed in range(300):
        handle.load(begun)
        drawn.append(handle.step(Sampling(0.7, 1.0, 0, seed)))
        if seed >= 20:
            continue
        handle.load(begun)
        assert handle.step(Sampling(0.7, 1.0, 3, seed)) in likely
        handle.load(begun)
        assert handle.step(Sampling(0.7, 1e-6, 0, seed)) == int(share_o.argmax())
    handle.load(begun)
    assert handle.step(Sampling(0.7, 1.0, 0, 0)) == drawn[0]
    for token_id in likely:
        share = float(share_o[token_id])
        assert abs(drawn.count(token_id) / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


def test_tokens_have_their_bytes(core, shipped, content):
    handle = Model(core, content)
    assert [handle.piece(each) for each in range(handle.n_ids)] == list(shipped.tokenizer.tokens)
    assert handle.piece(-1) is None and handle.piece(handle.n_ids) is None


def test_a_token_out_of_range_is_refused_and_nothing_is_read(core, content):
    handle = Model(core, content)
    before = handle.read([5])
    for wrong in (-1, 3584, 2**31 - 1, -(2**31)):
        with pytest.raises(Failed, match=f"token {wrong} was given, and the vocabulary ends at 3583") as refused:
            handle.read([3, wrong])
        assert refused.value.code == BAD_TOKEN and handle.n_tokens == 1 and torch.equal(handle.logits, before)


def test_misuse_has_a_code_and_a_sentence(core, content):
    handle = Model(core, content)
    with pytest.raises(Failed, match="nothing was read, so there is no prediction"):
        handle.step()
    handle.read([5])
    for how in (Sampling(-1, 1, 0, 0), Sampling(float("nan"), 1, 0, 0), Sampling(1, 0, 0, 0), Sampling(1, 1, -1, 0)):
        with pytest.raises(Failed, match="temperature must be 0 or more and finite") as refused:
            handle.step(how)
        assert refused.value.code == MISUSED
    assert core.meristem_read(None, None, 0) == core.meristem_open(None, None) == MISUSED
    assert core.meristem_save(None, b"x") == core.meristem_load(handle.at, None) == MISUSED
    assert core.meristem_read(handle.at, None, 0) == OK
    assert core.meristem_load(handle.at, b"/nowhere/session") == NO_FILE
    assert core.meristem_error() == b"/nowhere/session cannot be read. Give a file that is there."
    assert core.meristem_load(handle.at, b"/tmp") == core.meristem_save(handle.at, b"/nowhere/x") == NO_FILE


def test_the_versions_of_session_files_are_those_of_this_meristem():
    source = (edge.build.source_folder() / "edge.cpp").read_text()
    assert f"SESSION = {migrate.version('session')}, STATE = {migrate.version('memory.safetensors')};" in source


def test_the_example_compiles_and_goes_on_with_a_session(folder, shipped, tmp_path):
    """With cc and the one header; its text is that of the session, and what it saves opens."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler: apt-get install gcc")
    assert len((folder / "example.c").read_text().splitlines()) <= 60
    words = [
        "cc",
        "-Wall",
        "-Wextra",
        "-Werror",
        "example.c",
        "-o",
        "example",
        "-L.",
        "-lmeristem",
        "-Wl,-rpath,$ORIGIN",
    ]
    subprocess.run(words, cwd=folder, check=True)
    begun, ids = session(shipped), shipped.tokenizer.encode(" and")
    begun.save(tmp_path / "begun")
    words = ["./example", "model.safetensors", "30", str(tmp_path / "begun"), str(tmp_path / "new"), *map(str, ids)]
    said = subprocess.run(words, cwd=folder, check=True, capture_output=True).stdout
    begun._feed(ids)
    true = shipped.tokenizer.decode_bytes(written(shipped, begun, 60))
    n_tokens = begun.n_tokens
    assert said == true + f"\n{n_tokens} tokens were read; {tmp_path / 'new'} has the session.\n".encode()
    assert Session.load(tmp_path / "new", shipped.model, shipped.tokenizer).n_tokens == n_tokens - 30
    words[2:4] = ["1", "/nowhere"]
    refused = subprocess.run(words, cwd=folder, check=False, capture_output=True)
    assert refused.returncode == NO_FILE and b"/nowhere cannot be read." in refused.stderr


def test_the_folder_says_what_it_is(folder, shipped):
    """Names, hashes and shapes; the library is small, and its sources compile by the command that is named."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there - {"manifest.json", "example"} == manifest["files"].keys()
    for name, said in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert said == {"size_bytes": len(content), "sha256": edge.sha256(content)}
    assert manifest["model"]["tokenizer"] == shipped.tokenizer.fingerprint
    assert manifest["library"]["compiled_for"] == supported()[-1]
    assert (folder / "libmeristem.so").stat().st_size < 200_000


@pytest.fixture(scope="module")
def runtime(folder):
    """The NumPy runtime of the folder, as a module."""
    spec = spec_from_file_location("edge_runtime", folder / "runtime.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_numpy_reads_as_the_model_does(runtime, name, tmp_path):
    """All predictions of a text, beside float64; saved and loaded in between."""
    model = made(name)
    (tmp_path / "model").write_bytes(content_of(model, tokenizer()))
    tokens_bt = zoo.ids(1, 41)
    with torch.no_grad():
        true_to = model.double()(tokens_bt)[0][0]
    plain = runtime.Model(tmp_path / "model")
    found = [torch.tensor(plain.read([token_id])) for token_id in tokens_bt[0, :20].tolist()]
    plain.save(tmp_path / "session")
    again = runtime.Model(tmp_path / "model")
    again.load(tmp_path / "session")
    found += [torch.tensor(again.read([token_id])) for token_id in tokens_bt[0, 20:].tolist()]
    assert relative(torch.stack(found), true_to) < 1e-5


def test_a_session_goes_on_in_numpy_and_comes_back(runtime, core, folder, content, shipped, tmp_path):
    """From torch to NumPy, to C, and back to torch: one greedy text."""
    begun = session(shipped)
    begun.save(tmp_path / "begun")
    plain, handle = runtime.Model(folder / "model.safetensors"), Model(core, content)
    plain.load(tmp_path / "begun")
    assert [plain.step() for _ in range(70)] == written(shipped, begun, 70)
    plain.save(tmp_path / "numpy")
    handle.load((tmp_path / "numpy").read_bytes())
    assert [handle.step() for _ in range(70)] == written(shipped, begun, 70)
    (tmp_path / "c").write_bytes(handle.save())
    back = Session.load(tmp_path / "c", shipped.model, shipped.tokenizer)
    assert written(shipped, back, 60) == written(shipped, begun, 60)


def test_numpy_makes_the_ids_of_a_text(runtime, folder, shipped):
    own = runtime.Tokenizer(folder / "tokenizer.json")
    odd = "It's  Ada's\tcode:\n\n  'l 'll \u00e9\u4e2d\u00b2x9 \u2028 \U0001f600 end \x85 we've 12,5 \xa0\xa0z  "
    for text in (TEXT, odd, "", " ", "\n", "''s", "a'", " 's"):
        assert own.encode(text) == shipped.tokenizer.encode(text), repr(text)


def test_numpy_is_all_that_it_imports(folder):
    """A process without the packages of this one but NumPy goes on with a text."""
    code = (
        "import sys, runpy\n"
        "class No:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'meristem', 'safetensors', 'tokenizers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "sys.argv = ['runtime.py', '--tokens', '12', 'My sister Lydia']\n"
        "runpy.run_path('runtime.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    assert len(done.stdout) > 12


def test_a_model_that_the_core_does_not_compute_is_refused(tmp_path):
    save_checkpoint(tmp_path, "lm-mac-4-each")
    with pytest.raises(WrongValue, match="cannot be exported for the edge: .* Use it with meristem"):
        edge.export(tmp_path, tmp_path / "to", web=False, emit=silent)
    assert not (tmp_path / "to").exists()


def test_a_folder_that_is_there_stays(tmp_path):
    with pytest.raises(RunError, match="exists already"):
        edge.export(tmp_path, tmp_path, web=False, emit=silent)
