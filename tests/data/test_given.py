"""Tokenizers of others are read as they are: their ids, their special tokens, and what they lose (CX-1)."""

import sys
from pathlib import Path

import orjson
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.given import given, of_folder
from meristem.data.prepare import prepare
from meristem.data.tokenizer import library_file, tokenizer_from_bytes
from meristem.errors import DataError, MissingExtra, WrongValue

TEXTS = ["Ada lives in Oslo, and Eva plays the flute.\n" * 9, "12 people don't know 345.  Ein Baum wächst.\r\n" * 9]
HARD = " Ada's <|end|> 12345 \n\n\tß☃\0 don't\r\n  "


def llama_3() -> tokenizers.Tokenizer:
    """Bytes in words of a pattern of its own, special tokens, and one that begins every text."""
    made = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|begin|>", "<|end|>"])
    )
    begin = made.token_to_id("<|begin|>")
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return made


def llama_2() -> tokenizers.Tokenizer:
    """Characters with a space before every text, and bytes for what has no entry."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, limit_alphabet=30))
    described = orjson.loads(made.to_str())
    for token in described["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    described["added_tokens"] = [token for token in described["added_tokens"] if token["special"]]
    described["decoder"] = orjson.loads(DECODER_OF_LLAMA_2)
    return tokenizers.Tokenizer.from_str(orjson.dumps(described).decode())


DECODER_OF_LLAMA_2 = b"""{"type": "Sequence", "decoders": [
  {"type": "Replace", "pattern": {"String": "\xe2\x96\x81"}, "content": " "},
  {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"""


def bert() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def unigram() -> tokenizers.Tokenizer:
    """Pieces of characters, of which some are special tokens as well."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.mark.parametrize("made", [llama_3, llama_2, bert, unigram])
def test_a_file_has_the_ids_and_the_text_of_its_library(made, tmp_path):
    """CX-1.1, CX-1.2: whatever it does to a text, and the bytes of ids one by one are those that it decodes."""
    library, path = made(), tmp_path / "tokenizer.json"
    library.save(str(path))
    ours = given(TokenizerConfig(kind="file", path=str(path)))
    for text in (*TEXTS, "Ada plays", "lives in"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids and max(ids) < ours.vocab_size
        assert ours.decode(ids) == library.decode(ids)
    assert tokenizer_from_bytes(ours.to_bytes()).encode(HARD) == ours.encode(HARD)
    assert not set(ours.encode(HARD + "</s> <s> [CLS] <|begin|>")) & set(ours.special.values())


def test_a_file_that_keeps_every_byte_says_so(tmp_path):
    library = llama_3()
    library.save(str(tmp_path / "tokenizer.json"))
    ours = given(TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"), eos_token="<|end|>"))
    assert ours.loses is None and ours.decode(ours.encode(HARD)) == HARD
    assert ours.decode_bytes(ours.encode_bytes(b"a\xff\n")) == b"a\xff\n"
    framed = ours.encode_documents([b"Ada"])[0].tolist()
    assert framed == [*library.encode("Ada").ids, library.token_to_id("<|end|>")]
    assert given(TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"), bos_token="")).bos_id is None


@pytest.mark.parametrize(
    "made, reason", [(llama_2, "normalizer is Prepend"), (bert, "model.type is WordPiece"), (unigram, "made of bytes")]
)
def test_a_file_that_does_not_is_told_of_when_a_text_is_prepared(made, reason, tmp_path):
    """What is lost is never lost silently; a document that becomes nothing is one all the same."""
    (tmp_path / "text").mkdir()
    made().save(str(tmp_path / "tokenizer.json"))
    for number, text in enumerate((*TEXTS, "\t\n")):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    events = []
    data = DataConfig(source=str(tmp_path / "text"), root=tmp_path / "store", validation=0)
    corpus = prepare(data, TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")), events.append)
    told = [event.payload["reason"] for event in events if event.name == "tokenizer.loses"]
    assert len(told) == 1 and reason in told[0]
    assert corpus.tokenizer.vocab_size == made().get_vocab_size() and len(corpus.documents("train")) == 4


def test_a_folder_says_what_begins_and_ends_a_text(tmp_path):
    llama_2().save(str(tmp_path / "tokenizer.json"))
    plain = of_folder(tmp_path)
    assert (plain.bos_id, plain.eos_id, plain.chat_template) == (None, None, None)
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "{{ 1 }}"}
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(settings))
    found = of_folder(tmp_path)
    assert (found.bos_id, found.eos_id, found.chat_template) == (found.special["<s>"], found.special["</s>"], "{{ 1 }}")
    assert found.fingerprint != plain.fingerprint and orjson.loads(library_file(found)) == orjson.loads(plain.content)
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert of_folder(tmp_path).chat_template == "{{ 2 }}"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json is not JSON"):
        of_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer.json, so its ids mean nothing"):
        of_folder(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "gpt2@main", "a/b/c@" + "0" * 40])
def test_a_tokenizer_of_the_hub_is_pinned_to_a_commit(name):
    with pytest.raises(WrongValue, match="of kind=hf it is NAME@COMMIT, whose commit has 40 digits"):
        given(TokenizerConfig(kind="hf", path=name))


@pytest.mark.parametrize(
    "library, settings, install",
    [
        ("huggingface_hub", {"kind": "hf", "path": "a/b@" + "0" * 40}, r"meristem\[hf\]"),
        ("sentencepiece", {"kind": "sentencepiece", "path": "a.model"}, r"meristem\[tok\]"),
    ],
)
def test_cx_1_4_a_missing_library_is_named(library, settings, install, tmp_path, monkeypatch):
    """Never another vocabulary in its place."""
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.model").write_bytes(b"model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingExtra, match=f"{library}, which is not installed.*{install}"):
        given(TokenizerConfig(**settings))


@pytest.mark.extras
def test_a_tokenizer_of_the_hub_is_taken_from_its_cache_or_not_at_all(tmp_path, monkeypatch):
    """Without data.download nothing is asked of any server, and nothing is made."""
    from huggingface_hub import constants

    commit = "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    config = TokenizerConfig(kind="hf", path=f"org/small@{commit}")
    with pytest.raises(DataError, match="is not here and was not fetched: .*data.download=true"):
        given(config)
    place = tmp_path / "models--org--small" / "snapshots" / commit
    place.mkdir(parents=True)
    llama_3().save(str(place / "tokenizer.json"))
    assert given(config).encode(TEXTS[1]) == llama_3().encode(TEXTS[1], add_special_tokens=False).ids


@pytest.mark.extras
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_model_has_the_ids_of_its_library(kind, tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "small"), vocab_size=330, model_type=kind,
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path / "small.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = given(TokenizerConfig(kind="sentencepiece", path=str(path), bos_token="<s>", eos_token="</s>"))
    again = tokenizer_from_bytes(ours.to_bytes())
    assert again.fingerprint == ours.fingerprint and again.bos_id == theirs.bos_id() and "SentencePiece" in ours.loses
    for text in (*TEXTS, "Ada ☃", "</s>"):
        assert ours.encode(text) == again.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    with pytest.raises(DataError, match="is no file of the tokenizers library"):
        library_file(ours)
    Path(path).write_bytes(b"no model")
    with pytest.raises(DataError, match="small.model is no SentencePiece model"):
        given(TokenizerConfig(kind="sentencepiece", path=str(path)))
