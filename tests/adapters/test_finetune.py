"""Training from weights: what is trained, what stays, and whose base it is (A1, CX-2.4, CX-2.5)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from meristem.adapters import remote
from meristem.adapters.lora import matched, merged
from meristem.checkpoint import store
from meristem.cli import run
from meristem.config import dump_yaml
from meristem.data.tokenizer import byte_tokenizer, library_file
from meristem.errors import CheckpointMismatch, ConflictingKeys, MissingExtra, NoCheckpoint, WrongValue
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.online import frozen
from meristem.nn.config import MemoryConfig
from meristem.recipes.finetune import finetune, settled
from meristem.runs.config import Config
from meristem.runs.open import load

SMALL = ModelConfig(mixer="attention", dim=16, n_layers=2, n_heads=2, mlp_dim=24, sliding_window=5)
TEXT = "".join(f"{number} times {number} is {number * number}, they say.\n" for number in range(300))


def base_of_ours(place: Path, model: ModelConfig = SMALL, seed: int = 3) -> Path:
    """A checkpoint of a transformer with first weights."""
    settings = {"model": model.model_dump(mode="json"), "memory": MemoryConfig().model_dump(mode="json")}
    files = {"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": byte_tokenizer().to_bytes()}
    weights = build(model, MemoryConfig(), 256, random_seed=seed).state_dict()
    return store.save(place, step=7, trees={"model": weights}, values={}, files=files, header={})


def base_of_theirs(place: Path, kind: str = "llama", seed: int = 3) -> Path:
    """A folder of transformers with first weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        "gpt2": {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    }[kind]
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=256, **sizes)).save_pretrained(place)
    (place / "tokenizer.json").write_bytes(library_file(byte_tokenizer()))
    return place


def tuned(place: Path, base: Path, how: str, *more: str, resume: str = "auto", steps: int = 6) -> Path:
    """The run of a short fine-tuning."""
    text = place / "text.txt"
    text.write_text(TEXT)
    overrides = [
        f"data.root={place}",
        *"data.seq_len=17 data.batch_size=3 device.device=cpu device.dtype=fp32 device.threads=1".split(),
        *f"train.steps={steps} train.max_time=null train.log_every=1 eval.every=null eval.every_s=null".split(),
        *"eval.n_windows=3 eval.n_windows_end=3 eval.n_samples=1 eval.sample_tokens=3".split(),
        *"checkpoint.every=2 checkpoint.every_s=null optim.lr=0.01".split(),
        *more,
    ]
    config = settled(str(base), [str(text)], how, overrides, {})
    return finetune(config, run_dir=place / "run", resume=resume).run_dir


def ids(n_time: int = 13) -> torch.Tensor:
    return torch.randint(256, (2, n_time), generator=torch.Generator().manual_seed(0))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return store.find(run_dir, lambda event: None).tree("model")


@pytest.mark.parametrize("how", ["full", "levels"])
def test_a_model_of_ours_trains_on(tmp_path, how):
    """No extra is needed; levels begin as the very function of the base."""
    model = SMALL.model_copy(update={"mlp": "gelu"})
    base = base_of_ours(tmp_path / "base", model)
    first = load(base).model(ids())[0]
    still = load(tuned(tmp_path, base, how, "optim.lr=1e-30")).model
    torch.testing.assert_close(still(ids())[0], first, rtol=0, atol=1e-6)
    shutil.rmtree(tmp_path / "run")
    moved = load(tuned(tmp_path, base, how)).model
    assert not torch.allclose(moved(ids())[0], first, atol=1e-3)
    assert any(".level.1." in name for name in moved.state_dict()) == (how == "levels")


def test_levels_of_another_layer_are_refused(tmp_path):
    with pytest.raises(WrongValue, match="its feed-forward layers are swiglu, and levels are made of gelu layers"):
        tuned(tmp_path, base_of_ours(tmp_path / "base"), "levels")


@pytest.mark.parametrize("name", ["", "nowhere", "gpt2", "org/name@main", "org/name@" + "a" * 39])
def test_a_base_is_here_or_pinned_to_a_commit(name):
    if name:
        with pytest.raises(
            WrongValue, match="no checkpoint, run or folder here, and no model of the hub as name@commit"
        ):
            remote.located(name)


def test_cx_2_5_code_is_not_allowed_but_for_a_name_at_a_commit():
    """Off by default; on only for a name at a commit."""
    config = {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    pinned = "org/name@" + "a" * 40
    assert not remote.runs_code("org/name", {"model_type": "llama"}, {})
    with pytest.raises(WrongValue, match="brings code of its own, which is not run"):
        remote.runs_code(pinned, config, {})
    with pytest.raises(WrongValue, match="code may run of org/name, which is no name@commit"):
        remote.runs_code(pinned, config, {remote.ALLOWED: "org/name"})
    assert remote.runs_code(pinned, config, {remote.ALLOWED: f"a/b@{'0' * 40},{pinned}"})
    with remote.permitting([pinned]):
        assert remote.runs_code(pinned, config, {})
    with pytest.raises(WrongValue, match="which is not run"):
        remote.runs_code(pinned, config, {})


@pytest.mark.extras
def test_cx_2_5_a_folder_with_code_is_refused_and_its_code_not_run(tmp_path):
    config = {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "tokenizer.json").write_bytes(library_file(byte_tokenizer()))
    with pytest.raises(WrongValue, match="which is not run"):
        tuned(tmp_path, folder, "full")
    assert not (tmp_path / "ran").exists()


def test_a_missing_extra_is_named_before_anything_is_made(tmp_path, monkeypatch):
    base = base_of_ours(tmp_path / "base")
    for missing in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(MissingExtra, match=r"which is not installed.*pip install 'meristem\[hf\]'"):
            tuned(tmp_path, base, "lora")
    assert not (tmp_path / "run").exists()


def test_keys_that_nothing_reads_are_refused(tmp_path):
    base = base_of_ours(tmp_path / "base")
    for more, message in (
        (["finetune.rank=4"], "finetune.rank is 4, but finetune.how is 'full'"),
        (["finetune.how=memory"], "finetune.how is 'memory', which is for a model of transformers"),
    ):
        with pytest.raises(Exception, match=message):
            settled(str(base), [], "full", more, {})
    with pytest.raises(ConflictingKeys, match="model.name is 'hf', which is the base of a fine-tuning"):
        Config.model_validate({"model": {"name": "hf"}})


@pytest.mark.extras
class TestLora:
    """Matrices of low rank beside weights that stay."""

    @pytest.mark.parametrize("kind", ["ours", "llama", "gpt2"])
    def test_cx_2_4_only_the_matrices_are_trained_and_saved(self, tmp_path, kind):
        base = base_of_ours(tmp_path / "base") if kind == "ours" else base_of_theirs(tmp_path / "base", kind)
        run_dir = tuned(tmp_path, base, "lora", "finetune.rank=3")
        saved = weights(run_dir)
        assert saved and all(".lora_" in name for name in saved)
        model = load(run_dir).model
        with torch.no_grad():
            alone, own = model(ids())[0], dict(model.named_parameters())
            before = {name: each.clone() for name, each in own.items()}
            with merged(model):
                together = model(ids())[0]
            assert all(torch.equal(before[name], own[name]) for name in own)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        assert not torch.allclose(alone, first_of(base)(ids()), atol=1e-3)
        trained = [name for name, each in own.items() if each.requires_grad]
        assert sorted(trained) == sorted(saved)
        for name, each in base_weights(base).items():
            found = next(own[other] for other in own if other.removeprefix("host.").replace(".base_layer", "") == name)
            assert torch.equal(found, each)

    def test_a_fresh_one_is_its_base_to_the_bit(self, tmp_path):
        base = base_of_ours(tmp_path / "base")
        model = load(tuned(tmp_path, base, "lora", "optim.lr=1e-30")).model
        assert torch.equal(model(ids())[0], load(base).model(ids())[0])

    def test_dropout_acts_in_training_alone(self, tmp_path):
        """With it the same steps leave other matrices, and what is read afterwards is read without."""
        base = base_of_ours(tmp_path / "base")
        plain = weights(tuned(tmp_path, base, "lora"))
        shutil.rmtree(tmp_path / "run")
        run_dir = tuned(tmp_path, base, "lora", "finetune.dropout=0.5")
        dropped, model = weights(run_dir), load(run_dir).model
        assert any(not torch.equal(plain[name], dropped[name]) for name in plain)
        with torch.no_grad():
            assert torch.equal(model(ids())[0], model(ids())[0])
        assert not torch.equal(model(ids())[0], model(ids())[0])

    def test_nothing_matched_raises(self, tmp_path):
        with pytest.raises(WrongValue, match="no layer of this model ends in q_proj, so nothing would be trained"):
            tuned(tmp_path, base_of_ours(tmp_path / "base"), "lora", "finetune.targets=[q_proj]")
        memory = build(ModelConfig(dim=16, n_layers=1, n_heads=2), MemoryConfig(head_dim=8), 256, 0)
        with pytest.raises(WrongValue, match="is read by a memory in more ways than as a layer"):
            matched(memory, ("recall.qkv",))

    @pytest.mark.parametrize("kind", ["ours", "llama"])
    def test_a1_another_base_is_refused(self, tmp_path, kind):
        """Other numbers, a missing or a surplus key, one that has grown: each is named."""
        make = base_of_ours if kind == "ours" else base_of_theirs
        base = make(tmp_path / "base")
        run_dir = tuned(tmp_path, base, "lora")
        first = load(run_dir).model(ids())[0]
        place = tmp_path / "base"
        kept = shutil.copytree(place, tmp_path / "kept")
        shutil.rmtree(place)
        make(place, seed=4)
        with pytest.raises(CheckpointMismatch, match="the same keys, and other numbers"):
            load(run_dir)
        shutil.rmtree(place)
        with pytest.raises(NoCheckpoint, match="whose weights this model rests on, is gone"):
            load(run_dir)
        if kind == "ours":
            base_of_ours(place, SMALL.model_copy(update={"n_layers": 3}))
            match = "blocks.2.mixer.out.weight: found .16, 16., expected nothing"
        else:
            shutil.copytree(kept, place)
            tensors = without_one(place / "model.safetensors")
            match = f"{tensors}: found nothing, expected"
        with pytest.raises(CheckpointMismatch, match=match):
            load(run_dir)
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        assert torch.equal(load(run_dir).model(ids())[0], first)

    def test_a1_an_adapter_with_other_keys_is_refused(self, tmp_path):
        """A key too few, one too many, and another rank are listed."""
        run_dir = tuned(tmp_path, base_of_ours(tmp_path / "base"), "lora", "finetune.rank=3")
        found = store.find(run_dir, lambda event: None)
        tensors = {name: each.clone() for name, each in found.tree("model").items()}
        first, second, *_ = sorted(tensors)
        tensors["extra"] = tensors.pop(first)
        tensors[second] = torch.cat([tensors[second], tensors[second]])
        values = {"topology": found.value("topology")}
        files = {name: found.file(name) for name in ("config.yaml", "tokenizer.json")}
        path = store.save(tmp_path / "torn", step=1, trees={"model": tensors}, values=values, files=files, header={})
        with pytest.raises(CheckpointMismatch) as caught:
            load(path)
        listed = "; ".join(caught.value.fields["differences"])
        assert f"{first}: saved not at all" in listed and "extra: saved" in listed and f"{second}: saved (" in listed

    def test_a1_a_run_goes_on_with_its_own_rank_alone(self, tmp_path):
        base = base_of_ours(tmp_path / "base")
        tuned(tmp_path, base, "lora", "finetune.rank=3")
        with pytest.raises(CheckpointMismatch, match="finetune.rank was 3, is 4"):
            tuned(tmp_path, base, "lora", "finetune.rank=4", steps=8)


@pytest.mark.extras
@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_host_resumes_to_the_bit(tmp_path, how):
    """Three steps and three more leave what six leave."""
    base = base_of_theirs(tmp_path / "base")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    once = weights(tuned(whole, base, how, "schedule.shape=constant"))
    tuned(parts, base, how, "schedule.shape=constant", steps=3)
    again = weights(tuned(parts, base, how, "schedule.shape=constant", resume="must"))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.extras
def test_a_host_reads_on(tmp_path):
    """What is read in pieces is what is read at once, as far as the host sees; and a folder is refused by halves."""
    base = base_of_theirs(tmp_path / "base", "gpt2")
    model = load(tuned(tmp_path, base, "full")).model
    assert model.host.get_output_embeddings().weight is model.host.get_input_embeddings().weight
    whole = model(ids())[0]
    first, state = model(ids()[:, :6])
    second, state = model(ids()[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-5)
    longer, state = model(ids(60), state)
    assert model.window == 64 and longer.shape[1] == 60 and state["tokens_bt"].shape[1] == 64
    torch.testing.assert_close(first_of(base)(ids()), first_of(base)(ids()))
    without_one(base / "model.safetensors")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointMismatch, match="are not those of its config.json"):
        tuned(tmp_path, base, "full")


@pytest.mark.extras
def test_the_verb(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = "data.seq_len=17 data.batch_size=3 train.steps=2 train.max_time=null eval.n_windows=2 eval.n_windows_end=2"
    more = [*words.split(), "eval.n_samples=1", "eval.sample_tokens=2", f"data.root={tmp_path}", "device.device=cpu"]
    place = ["--run-dir", str(tmp_path / "run"), "--how", "lora"]
    assert run(["finetune", str(base_of_theirs(tmp_path / "base")), str(text), *more, *place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2
    assert run(["sample", str(tmp_path / "run"), "--max-tokens", "3"]) == 0
    capsys.readouterr()
    longer = [str(tmp_path / "run" / "config.yaml"), "train.steps=3", "--run-dir", str(tmp_path / "run"), "--json"]
    assert run(["train", *longer]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 3


def first_of(base: Path):
    """Tokens to logits, of a base as it is."""
    if not remote.is_folder(base):
        model = load(base).model
        return lambda tokens: model(tokens)[0]
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base)
    return lambda tokens: theirs(input_ids=tokens).logits


def base_weights(base: Path) -> dict[str, torch.Tensor]:
    if remote.is_folder(base):
        from meristem.adapters.base import weights_in

        found = weights_in(base)
        prefix = "" if any(name.startswith(("model.", "transformer.")) for name in found) else "transformer."
        return {f"{prefix}{name}": each for name, each in found.items()}
    return store.open_checkpoint(base).tree("model")


def without_one(path: Path) -> str:
    """Take a tensor out of a file; its name."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    return name


@pytest.mark.extras
class TestMemory:
    """A host that stays gains memories."""

    def test_a_fresh_one_is_the_host_to_the_bit(self, tmp_path):
        base = base_of_theirs(tmp_path / "base")
        model = load(tuned(tmp_path, base, "memory", "memory.head_dim=8", "memory.chunk=4", "optim.lr=1e-30")).model
        for memory in model.memories.values():
            torch.nn.init.zeros_(memory.mixer.out.weight)
        assert torch.equal(model(ids())[0], first_of(base)(ids()))

    def test_only_memories_are_trained_saved_and_resumed(self, tmp_path):
        base = base_of_theirs(tmp_path / "base", "gpt2")
        settings = (
            "memory.head_dim=8 memory.chunk=4 memory.rule=delta finetune.layers=[0,1] schedule.shape=constant".split()
        )
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir(), parts.mkdir()
        run_dir = tuned(whole, base, "memory", *settings)
        once = weights(run_dir)
        assert {name.split(".")[0] for name in once} == {"memories"}
        tuned(parts, base, "memory", *settings, steps=3)
        again = weights(tuned(parts, base, "memory", *settings, resume="must"))
        assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
        model = load(run_dir).model
        assert not torch.allclose(model(ids())[0], first_of(base)(ids()), atol=1e-3)
        for name, each in base_weights(base).items():
            assert torch.equal(model.get_parameter(f"host.{name}"), each)

    def test_it_reads_on_and_remembers_what_the_host_no_longer_sees(self, tmp_path):
        """In pieces as at once; and far behind the window of the host, what was read before still counts."""
        from meristem.memory.state import join_rows, take_rows

        base = base_of_theirs(tmp_path / "base", "gpt2")
        settings = "memory.head_dim=8 memory.chunk=4 memory.rule=delta memory.half_life=1e6".split()
        model = load(tuned(tmp_path, base, "memory", *settings)).model
        with torch.no_grad():
            whole, _ = model(ids(30))
            pieces, state = [], None
            for piece in ids(30).split([1, 12, 17], dim=1):
                logits, state = model(piece, state)
                pieces.append(logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)
            apart = join_rows([take_rows(state, 0, 1), model(ids(7)[1:])[1]])
            both, _ = model(ids(5), apart)
            alone, _ = model(ids(5)[1:], model(ids(7)[1:])[1])
            torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
            found = []
            for first in (ids(40), ids(40).flip(1)):
                _, state = model(first, None)
                for piece in ids(120).split(30, dim=1):
                    logits, state = model(piece, state)
                found.append(logits)
            reads, after = frozen(model)(ids(5), state)
            for name, leaf in state["layer"]["1"]["memory"].items():
                assert torch.equal(after["layer"]["1"]["memory"][name], leaf)
            assert not torch.equal(model(ids(5), state)[1]["layer"]["1"]["memory"][name], leaf)
        assert reads.shape[1] == 5 and not torch.equal(*found)
        assert state["tokens_bt"].shape[1] <= model.window

    def test_what_cannot_be_is_refused(self, tmp_path):
        from meristem.events import silent
        from meristem.export.hf import export

        base = base_of_theirs(tmp_path / "base")
        with pytest.raises(WrongValue, match="finetune.layers names .7., but the host has the layers 0 to 1"):
            tuned(tmp_path, base, "memory", "memory.head_dim=8", "finetune.layers=[7]")
        shutil.rmtree(tmp_path / "run")
        run_dir = tuned(tmp_path, base, "memory", "memory.head_dim=8", "memory.chunk=4", steps=1)
        (tmp_path / "second").mkdir()
        with pytest.raises(WrongValue, match="is a fine-tuned model itself. Go on with its run"):
            tuned(tmp_path / "second", run_dir, "full")
        with pytest.raises(WrongValue, match="gained a memory, and no class of transformers has a place for its state"):
            export(run_dir, tmp_path / "hf", form="auto", emit=silent)


@pytest.mark.extras
@pytest.mark.parametrize("kind, how", [("llama", "lora"), ("gpt2", "full"), ("ours", "lora")])
def test_a_fine_tuned_model_is_exported_as_its_base_is(tmp_path, kind, how, capsys):
    """Matrices of low rank are in the weights; what transformers loads gives the logits of the run."""
    from meristem.events import silent
    from meristem.export.hf import export

    base = base_of_ours(tmp_path / "base") if kind == "ours" else base_of_theirs(tmp_path / "base", kind)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    run_dir = tuned(tmp_path, base, how)
    assert export(run_dir, tmp_path / "hf", form="auto", emit=silent).form == "plain"
    assert "Loading weights" not in capsys.readouterr().err
    described, card = (tmp_path / "hf" / name for name in ("config.json", "README.md"))
    sizes = json.loads(described.read_text())
    n_layers, width = (
        sizes.get(new, sizes.get(old)) for new, old in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
    )
    assert f"| model | {sizes['model_type']}, {n_layers} layers of width {width} |" in card.read_text()
    assert f"| fine-tuned from | {'base/step-00000007' if kind == 'ours' else 'base'} |" in card.read_text()
    ours = load(run_dir).model(ids())[0]
    torch.testing.assert_close(first_of(tmp_path / "hf")(ids()), ours, rtol=0, atol=1e-4)
    assert (tmp_path / "hf" / "chat_template.jinja").exists() == (kind != "ours")
    assert not torch.allclose(ours, first_of(base)(ids()), atol=1e-3)
