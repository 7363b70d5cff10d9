"""O formato do Hugging Face: o que eles publicam abre aqui, e o que é treinado aqui abre lá.

Os modelos são gravados pela própria transformers, com pesos sorteados e medidas tortas.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOY, assert_short_error, run_main
from test_prepare import NASTY, STORIES
from test_sample import sum_by_hand
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    PreTrainedTokenizerFast, pipeline)

import sample
from prepare import END_OF_TEXT, build_encoding

TEXTS = [*NASTY, STORIES[:3000], "".join(map(chr, range(1, 0x250))), "🐱 ação\u00a0\u3000 x\r\n"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Quem procura um endereço na rede acaba num erro que nenhum teste espera."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: 1 / 0)


def make_pretrained(folder, end=END_OF_TEXT, first=True, old=False, shard="5GB", **shape):
    """Uma pasta como as publicadas; old: com os arquivos e os nomes dos pesos do primeiro gpt2."""
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [STORIES], 399, special_tokens=[end] if first else [], show_progress=False)
    tokenizer.add_special_tokens(["<|x|>"] if first else [end])
    shape = {"n_positions": 32, "n_embd": 36, "n_layer": 3, "n_head": 3, "vocab_size": 400,
             "eos_token_id": tokenizer.token_to_id(end)} | shape
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    for p in theirs.parameters():
        p.data += torch.randn_like(p) * 0.1
    theirs.save_pretrained(folder, max_shard_size=shard)
    if old:
        tokenizer.save_model(str(folder))
        (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
        mask = {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}
        torch.save(theirs.transformer.state_dict() | mask, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._tokenizer, eos_token=end).save_pretrained(folder)
    return theirs, tokenizer


def same_logits(ours, theirs):
    idx = (torch.arange(2 * ours.config.block_size) * 37 % 400).view(2, -1)
    assert (ours(idx, idx)[0] - theirs(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("options", [
    dict(end="</s>"), dict(first=False, n_embd=64, n_head=2, shard="20KB"),
    dict(first=False, old=True, n_embd=20, n_layer=1, n_head=5, n_positions=17)])
def test_what_they_publish_opens_here(options, workdir):
    theirs, tokenizer = make_pretrained(workdir / "m", **options)
    assert len(list((workdir / "m").glob("*.safetensors"))) > 1 or "shard" not in options
    ours, description = sample.load_model("m")
    same_logits(ours, theirs)
    encoding = build_encoding(description)
    sample.export("outra", ours, description)  # gravado de novo, tem os mesmos números
    again = AutoTokenizer.from_pretrained("outra")
    assert again.eos_token_id == encoding.eot_token == theirs.config.eos_token_id
    for text in TEXTS:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        if END_OF_TEXT not in text:
            assert ids == tokenizer.encode(text).ids == again.encode(text, add_special_tokens=False)
    theirs.set_attn_implementation("eager")  # a que mostra os pesos de atenção
    words, _ = sample.split_words("O _gato_ viu.", description)
    ids = [[token for _, tokens in words for token in tokens]]
    attentions = theirs(torch.tensor(ids), output_attentions=True).attentions
    expected = sum_by_hand(torch.cat(attentions), words)
    assert (sample.word_attention(ours, words) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("bias", ["True", "False"])
def test_what_is_trained_here_opens_there_and_comes_back(workdir, bias):
    run_main("train.py", *TOY, "--max_iters=3", f"--bias={bias}", "--out_dir=out/a", cwd=workdir)
    run_main("sample.py", "--export=hf", cwd=workdir)
    ours, description = sample.load_model("out/a/best.pt")
    same_logits(ours, AutoModelForCausalLM.from_pretrained("hf"))
    again, described = sample.load_model("hf")
    before, after = ours.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert described["vocab"] == description["vocab"]
    assert_short_error(run_main("sample.py", "--export=hf", cwd=workdir, check=False), "hf")


def test_an_exported_model_writes_there_what_it_writes_here(workdir):
    run_main("train.py", *TOY, "--max_iters=30", "--block_size=32", "--out_dir=out/a", cwd=workdir)
    run_main("sample.py", "--export=hf", cwd=workdir)
    writer = pipeline("text-generation", model="hf")
    assert writer("O gato")[0]["generated_text"].startswith("O gato")
    assert len(writer("O gato", num_return_sequences=4)) == 4
    tokenizer = AutoTokenizer.from_pretrained("hf")
    inputs = tokenizer("O gato", return_tensors="pt")
    ids = writer.model.generate(**inputs, do_sample=False, max_new_tokens=9)[0]
    here = run_main("sample.py", "--start=O gato", "--temperature=0", "--max_new_tokens=9",
                    "--dtype=float32", cwd=workdir).stdout
    assert tokenizer.decode(ids, skip_special_tokens=True) + "\n" == here
    rows, end = tokenizer(["a", "b c"], padding=True).input_ids, tokenizer.eos_token_id
    assert (rows[0][0], rows[0][-1], *tokenizer(END_OF_TEXT).input_ids) == (end, end, end, end)
    settings = json.loads(Path("hf/tokenizer_config.json").read_bytes())
    assert settings["clean_up_tokenization_spaces"] is False  # na transformers 4, o usual é True


def test_fine_tuning(workdir):
    theirs, _ = make_pretrained(workdir / "m", old=True)
    toy = [option for option in TOY if "n_" not in option and "rate" not in option]
    options = [*toy, "--init_from=m", "--out_dir=out/f", "--learning_rate=0", "--max_iters=2"]
    assert_short_error(run_main("train.py", *options, cwd=workdir, check=False), "--tokenizer m")
    (workdir / "t.txt").write_text(STORIES[:20_000], encoding="utf-8")
    run_main("prepare.py", "--input=t.txt", "--name=contos", "--tokenizer=m", cwd=workdir)
    options += ["--n_embd=36", "--n_layer=3"]
    for more, word in (([], "--n_head=3"), (["--n_head=3", "--block_size=99"], "--block_size=")):
        result = run_main("train.py", *options, *more, cwd=workdir, check=False)
        assert_short_error(result, word)
    run_main("train.py", *options, "--n_head=3", cwd=workdir)
    tuned, _ = sample.load_model("out/f/best.pt")
    assert tuned.config.block_size == 16
    same_logits(tuned, theirs)


@pytest.mark.parametrize("name", ["gpt3", "m/arquivo.bin", "a/b/c", "nada/a.bin", "data/livroz"])
def test_what_does_not_exist_is_not_asked_of_the_network(name, workdir):
    (workdir / "m").mkdir()
    for line in ("sample.py --init_from", "prepare.py --tokenizer", "train.py --init_from"):
        result = run_main(*f"{line}={name}".split(), cwd=workdir, check=False)
        assert_short_error(result, f"Não achei {name}")


def test_without_network_and_without_transformers(workdir, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run_main("sample.py", "--init_from=dona/m", cwd=workdir, check=False)
    assert_short_error(result, "dona/m")
    run_main("train.py", *TOY, "--max_iters=1", "--out_dir=out/a", cwd=workdir)
    for library in ("transformers", "tokenizers", "tokenizers.processors"):
        monkeypatch.setitem(sys.modules, library, None)
    for option in ("--init_from=dona/m", "--export=hf"):
        result = run_main("sample.py", option, cwd=workdir, check=False)
        assert_short_error(result, "pip install transformers")


def edit(name, change):
    """Muda um dos arquivos JSON da pasta."""
    def damage(folder):
        contents = json.loads((folder / name).read_bytes())
        change(contents)
        (folder / name).write_text(json.dumps(contents))

    return damage


def reverse_ids(contents):
    """As mesmas fusões, com números que não crescem na ordem delas."""
    vocab = contents["model"]["vocab"]
    vocab |= {token: 257 + 398 - number for token, number in vocab.items() if number >= 257}


@pytest.mark.parametrize("damage, word", [
    (edit("config.json", lambda c: c.update(model_type="gpt_neo")), "model_type = 'gpt_neo'"),
    (edit("config.json", lambda c: c.update(activation_function="relu")), "function = 'relu'"),
    (edit("config.json", lambda c: c.update(n_layer=4)), "h.3"),  # faltam pesos
    (edit("tokenizer.json", lambda c: c.update(pre_tokenizer=None)), "outro modo"),
    (edit("tokenizer.json", reverse_ids), "outro modo"), (LlamaConfig().save_pretrained, "llama"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "um vocabulário"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cortado"), ""),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors")])
def test_another_recipe_or_a_damaged_folder_is_refused(damage, word, tmp_path):
    make_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    result = run_main("sample.py", "--init_from=m", cwd=tmp_path, check=False)
    assert_short_error(result, "abrir m", word)
