"""Files that are none, cut off, changed, of others or made to harm get a code and a sentence from the edge's core."""

import ctypes
import json
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import edges
from edges import DAMAGED, NO_VECTORS, NOT_FINITE, OTHER_MODEL, OTHER_VERSION, Failed, Model
from meristem.native import build
from meristem.native.build import has_compiler
from meristem.native.library import supported
from meristem.serve.store import _DIGEST_FIELD, _NO_DIGEST, sha256

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # what is compiled first is kept
    pytest.mark.skipif(not (has_compiler() and supported()), reason="needs a C++ compiler: apt-get install g++"),
]
FUZZ = Path(__file__).parents[2] / "scripts" / "fuzz_edge.cpp"
SANITIZERS = ("-std=c++20", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi")
N_CHANGED = 4000


@pytest.fixture(scope="module")
def content() -> bytes:
    return edges.content_of(edges.made("mag-persistent"), edges.tokenizer())


@pytest.fixture(scope="module")
def session(core, content) -> bytes:
    handle = Model(core, content)
    handle.read([1, 2, 3, 4, 5, 6, 7, 8])
    return handle.save()


def parts(content: bytes) -> tuple[dict, bytes]:
    """Header and data of a file."""
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def sealed(header: dict, data: bytes) -> bytes:
    """A file with the right hash."""
    header["__metadata__"]["sha256"] = _NO_DIGEST.decode()
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    return whole.replace(_DIGEST_FIELD + _NO_DIGEST, _DIGEST_FIELD + sha256(whole).encode(), 1)


def refused(core, content: bytes, code: int, match: str) -> None:
    with pytest.raises(Failed, match=match) as failed:
        Model(core, content)
    assert failed.value.code == code


def session_refused(core, content: bytes, session: bytes, code: int, match: str) -> None:
    """And the session that was there goes on."""
    handle = Model(core, content)
    before = handle.read([3, 4])
    with pytest.raises(Failed, match=match) as failed:
        handle.load(session)
    assert failed.value.code == code and handle.n_tokens == 2 and torch.equal(handle.logits, before)


def test_a_file_that_is_cut_off_is_damaged(core, content, session):
    for n in [*range(0, 40), *range(40, len(content), 97)]:
        refused(core, content[:n], DAMAGED, "the model is damaged")
    handle = Model(core, content)
    for n in [*range(0, 40), *range(40, len(session), 23)]:
        with pytest.raises(Failed, match="the session is damaged"):
            handle.load(session[:n])


def test_a_bit_that_changed_is_seen(core, content, session):
    handle = Model(core, content)
    for at in range(0, len(session), 41):
        wrong = bytearray(session)
        wrong[at] ^= 4
        with pytest.raises(Failed, match="damaged"):
            handle.load(bytes(wrong))
    wrong = bytearray(content)
    wrong[-1] ^= 1
    refused(core, bytes(wrong), DAMAGED, "its bytes do not have the hash written in it")


def test_the_other_byte_order_is_named(core, content, session):
    def swapped(whole: bytes) -> bytes:
        return whole[:8][::-1] + whole[8:]

    refused(core, swapped(content), DAMAGED, "its bytes are in the other order, the greatest first")
    session_refused(core, content, swapped(session), DAMAGED, "its bytes are in the other order")


def test_another_version_is_named(core, content, session):
    header, data = parts(content)
    header["__metadata__"]["schema"] = "meristem.edge/2"
    refused(core, sealed(header, data), OTHER_VERSION, "of version 'meristem.edge/2', and this library opens")
    header, data = parts(session)
    for key, value in (("schema", "meristem.session/3"), ("schema", "meristem.session/1"), ("state", "3")):
        changed = {**header, "__metadata__": {**header["__metadata__"], key: value}}
        match = "the session is of version 'meristem.session/"
        session_refused(core, content, sealed(changed, data), OTHER_VERSION, match)


def test_a_session_of_another_model_is_refused(core, content, session):
    own = Model(core, edges.content_of(edges.made("mag-gated"), edges.tokenizer()))
    with pytest.raises(
        Failed, match="the session belongs to another model: it was made with SHA-256 [0-9a-f]{64}"
    ) as no:
        own.load(session)
    assert no.value.code == OTHER_MODEL


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(core, content, session, number):
    header, data = parts(content)
    for name in ("embedding", "layers.0.gates", "layers.1.down"):
        at = header[name]["data_offsets"][0] + 4
        wrong = data[:at] + struct.pack("<f", number) + data[at + 4 :]
        refused(core, sealed(header, wrong), NOT_FINITE, f"the tensor '{name}' of the model has NaN or infinity")
    header, data = parts(session)
    for name in ("logits_bo", "state.layer.1.recall.memory.matrix_bhkv", "state.layer.0.attention.keys_bshk"):
        at = header[name]["data_offsets"][1] - 4
        wrong = data[:at] + struct.pack("<f", number) + data[at + 4 :]
        session_refused(core, content, sealed(header, wrong), NOT_FINITE, "not finite|NaN or infinity")


def test_a_prediction_that_is_not_finite_ends_the_session(core):
    """Weights whose products overflow: it says so at each further call, and begins again."""
    model = edges.made("attention")
    with torch.no_grad():
        model.norm.gain_d.fill_(3e38)
    handle = Model(core, edges.content_of(model, edges.tokenizer()))
    with pytest.raises(Failed, match="is not finite, and the session cannot go on"):
        handle.read([3])
    for call in (handle.step, lambda: handle.read([1]), handle.save):
        with pytest.raises(Failed, match="not finite") as no:
            call()
        assert no.value.code == NOT_FINITE
    handle.forget()
    assert handle.n_tokens == 0


SIZES = (-1, 0, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 4, 10**40, "4", None, [], 0.5)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_lie_are_refused(core, content, session, size):
    """Wherever a size stands: in shapes and offsets, and in what the model says of itself."""
    for whole, refuse in ((content, refused), (session, None)):
        header, data = parts(whole)
        for name in [name for name in header if name != "__metadata__"][::3]:
            for key in ("shape", "data_offsets"):
                for at in range(len(header[name][key])):
                    changed = json.loads(json.dumps(header))
                    if changed[name][key][at] == size:
                        continue
                    changed[name][key][at] = size
                    if refuse:
                        refuse(core, sealed(changed, data), DAMAGED, "damaged")
                    else:
                        session_refused(core, content, sealed(changed, data), DAMAGED, "damaged")
    header, data = parts(content)
    said = json.loads(header["__metadata__"]["model"])
    for key in ("width", "vocabulary", "eps")[: 2 if size == 0.5 else 3]:
        wrong = {**header, "__metadata__": {**header["__metadata__"], "model": json.dumps({**said, key: size})}}
        with pytest.raises(Failed):
            Model(core, sealed(wrong, data))
    keys = ("hidden", "attention_heads", "span", "memory_heads", "taps", "n_pinned")
    for key in (
        keys if size != 0 else keys[:-1]
    ):  # without pinned tokens it is a model, of which some weights are not read
        layers = [{**said["layers"][0], key: size}, *said["layers"][1:]]
        wrong = {**header, "__metadata__": {**header["__metadata__"], "model": json.dumps({**said, "layers": layers})}}
        with pytest.raises(Failed):
            Model(core, sealed(wrong, data))


def test_a_header_that_is_nested_without_end_is_refused(core, content):
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b'{"__metadata__":{"sha256":"' + b"[" * 1000):
        refused(core, len(text).to_bytes(8, "little") + text, DAMAGED, "its header")


def test_a_tensor_too_many_or_too_few_is_refused(core, content, session):
    header, data = parts(session)
    more = {**header, "other": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    less = {name: each for name, each in header.items() if name != "state.layer.1.recall.conv.tail_bsd"}
    for changed in (more, less):
        session_refused(
            core, content, sealed(changed, data), DAMAGED, "does not hold what a reader of this model carries"
        )


def test_a_processor_without_the_vectors_is_told():
    """The library is compiled for instructions that this one lacks; it says so before it uses any."""
    if platform.machine() != "x86_64" or "avx512_fp16" in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs an x86-64 processor without AVX-512 FP16")
    core = edges.library(("-march=x86-64-v3", "-mavx512fp16", *build.SMALL))
    at = ctypes.c_void_p(7)
    assert core.meristem_open_bytes(b"x", ctypes.c_size_t(1), ctypes.byref(at)) == NO_VECTORS and not at
    assert re.match(b"this processor lacks AVX-512( FP16)?, for which this library was compiled", core.meristem_error())


@pytest.mark.parametrize("name, which", [("mag-persistent", 0), ("attention", 2), ("mag-additive", 1)])
def test_changed_files_find_nothing(core, name, which, tmp_path):
    """Thousands of files with changes that chance made, the same each time, under AddressSanitizer and UBSan."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ with its sanitizers: apt-get install g++")
    content = edges.content_of(edges.made(name), edges.tokenizer())
    handle = Model(core, content)
    handle.learn(which, 3)
    handle.read([1, 2, 3, 4, 5, 6, 7])
    handle.note("turns", b'[{"text":"a \\u2028","reply":""}]')
    (tmp_path / "model").write_bytes(content)
    (tmp_path / "session").write_bytes(handle.save())
    flags = (*SANITIZERS, f"-I{build.source_folder()}")
    program = build._place("fuzz", (*flags, FUZZ.read_text()), build.source_folder(), [shutil.which("g++")])
    if not program.is_file():
        build.compile_into(program, ["g++", *flags, str(FUZZ)])
    words = [str(program), str(tmp_path / "model"), str(tmp_path / "session"), str(N_CHANGED), "11"]
    environment = {"ASAN_OPTIONS": "allocator_may_return_null=1", "PATH": "/usr/bin"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert {("model", "0:"), ("model", "3:"), ("session", "0:"), ("session", "3:"), ("session", "5:")} <= codes
