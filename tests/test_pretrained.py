"""O formato do Hugging Face: o que eles publicam abre aqui, e o que é treinado aqui abre lá.

Os modelos são gravados pela própria transformers, com pesos sorteados e medidas tortas.
"""

import json
import os
import shutil

import pytest
import torch
from conftest import TOY, assert_short_error, run_main
from safetensors.torch import load_file, save_file
from test_data import Server
from test_prepare import NASTY, STORIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import prepare
import sample
from model import read_pretrained, read_safetensors
from prepare import END_OF_TEXT, build_encoding, read_pretrained_tokenizer

EVERYTHING = [
    *NASTY,
    STORIES[:3000],
    "".join(map(chr, range(1, 0x250))),
    "🐱 ação\u00a0\u3000 x\r\n",
]


def train_tokenizer(folder, special_first, old_files):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=399 + special_first,
        special_tokens=[END_OF_TEXT] if special_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORIES], trainer)
    if not special_first:
        tokenizer.add_special_tokens([END_OF_TEXT])
    if old_files:
        tokenizer.model.save(str(folder))
        vocab = tokenizer.get_vocab()
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_pretrained(folder, special_first=True, old_files=False, **shape):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(folder, special_first, old_files)
    sizes = {"n_positions": 32, "n_embd": 36, "n_layer": 3, "n_head": 3} | shape
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(vocab_size=400, bos_token_id=end, eos_token_id=end, **sizes)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(folder)
    return theirs, tokenizer


def same_logits(ours, theirs):
    block_size = ours.config.block_size
    idx = torch.randint(400, (2, block_size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours(idx, idx)[0] - theirs(idx).logits).abs().max().item()
    assert difference < 1e-4
    return difference


SHAPES = [
    dict(special_first=True),
    dict(special_first=False, old_files=True, n_embd=20, n_layer=1, n_head=5, n_positions=17),
    dict(special_first=True, old_files=True, n_embd=64, n_layer=4, n_head=2, n_positions=64),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_they_publish_opens_here(shape, tmp_path):
    theirs, tokenizer = make_pretrained(tmp_path / "m", **shape)
    ours, description = sample.load_model(tmp_path / "m")
    same_logits(ours, theirs)
    encoding = build_encoding(description)
    for text in EVERYTHING:
        ids = encoding.encode_ordinary(text)
        assert ids == tokenizer.encode(text).ids or END_OF_TEXT in text
        assert encoding.decode(ids) == text
    assert encoding.eot_token == tokenizer.token_to_id(END_OF_TEXT)


def test_old_weights_file(tmp_path):
    theirs, _ = make_pretrained(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "m/pytorch_model.bin")
    same_logits(sample.load_model(tmp_path / "m")[0], theirs)


def test_attention_equals_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, tokenizer = make_pretrained(tmp_path / "m")
    theirs.set_attn_implementation("eager")
    words, asked = sample.split_words("O gato viu a _menina_.", sample.load_model("m")[1])
    ids = [token for _, tokens in words for token in tokens]
    assert ids[1:] == tokenizer.encode("O gato viu a menina.").ids
    attentions = theirs(torch.tensor([ids]), output_attentions=True).attentions
    shares = sample.word_attention(sample.load_model("m")[0], words)
    last = len(ids) - len(words[-1][1])  # a palavra escolhida é a penúltima
    for layer, expected in enumerate(attentions):
        first = last - len(words[asked][1])
        given = expected[0, :, first:last].mean(1)  # (nh, T)
        start = 0
        for i, (_, tokens) in enumerate(words):
            received = given[:, start : start + len(tokens)].sum(-1)
            assert (shares[layer, :, asked, i] - received).abs().max() < 1e-5
            start += len(tokens)
    output = run_main("sample.py", "--init_from=m", "--attention=O gato _viu_ a", cwd=tmp_path)
    assert "«viu»: a média de 9 cabeças" in output.stdout


@pytest.mark.parametrize("bias", ["True", "False"])
def test_what_is_trained_here_opens_there_and_comes_back(workdir, bias):
    run_main("train.py", *TOY, "--max_iters=3", f"--bias={bias}", "--out_dir=out/a", cwd=workdir)
    run_main("sample.py", "--export=hf", cwd=workdir)
    theirs = AutoModelForCausalLM.from_pretrained(workdir / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(workdir / "hf")
    ours, description = sample.load_model(workdir / "out/a/best.pt")
    same_logits(ours, theirs)
    encoding = build_encoding(description)
    for text in EVERYTHING:
        if END_OF_TEXT not in text:
            assert tokenizer.encode(text, add_special_tokens=False) == encoding.encode_ordinary(
                text
            )
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 399
    assert tokenizer.encode(END_OF_TEXT, add_special_tokens=False) == [399]
    assert theirs.generation_config.eos_token_id == 399
    again, described = sample.load_model(workdir / "hf")
    before, after = ours.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert described["vocab"] == description["vocab"]
    result = run_main("sample.py", "--export=hf", cwd=workdir, check=False)
    assert_short_error(result, "hf", "pasta nova")


def test_downloaded_once_then_fine_tuned(workdir, monkeypatch):
    theirs, _ = make_pretrained(workdir / "m", old_files=True)
    names = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
    server = Server({f"dona/m/resolve/main/{n}": (workdir / "m" / n).read_bytes() for n in names})
    monkeypatch.setattr(prepare, "HUB", server.url("").rstrip("/"))
    options = ["--init_from=dona/m", "--max_new_tokens=5", "--start=O gato", "--dtype=float32"]
    first = run_main("sample.py", *options, cwd=workdir).stdout
    server.shutdown()
    assert run_main("sample.py", *options, cwd=workdir).stdout == first  # agora sem rede

    shape = ["--n_embd=36", "--n_layer=3", "--n_head=3", "--block_size=16", "--max_iters=2"]
    toy = [option for option in TOY if option.split("=")[0] not in " ".join(shape)]
    options = [*toy, *shape, "--init_from=dona/m", "--out_dir=out/f", "--learning_rate=0"]
    result = run_main("train.py", *options, cwd=workdir, check=False)
    assert_short_error(result, "outro vocabulário", "--tokenizer dona/m")
    (workdir / "t.txt").write_text(STORIES[:20_000], encoding="utf-8")
    run_main("prepare.py", "--input=t.txt", "--name=contos", "--tokenizer=dona/m", cwd=workdir)
    result = run_main("train.py", *options, "--n_layer=2", "--n_head=2", cwd=workdir, check=False)
    assert_short_error(result, "--n_layer=3 --n_head=3")
    run_main("train.py", *options, cwd=workdir)
    tuned, _ = sample.load_model(workdir / "out/f/best.pt")
    assert tuned.config.block_size == 16
    same_logits(tuned, theirs)


def test_no_network_and_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(prepare, "WAIT", 0.01)
    result = run_main("sample.py", "--init_from=gpt2", cwd=tmp_path, check=False)
    assert_short_error(result, "gpt2", "ConnectionError", "rede")
    result = run_main("sample.py", "--init_from=gpt3", cwd=tmp_path, check=False)
    assert_short_error(result, "Não achei gpt3", "gpt2-medium")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.ln_f.bias")
    save_file(tensors, folder / "model.safetensors")


def header(change):
    """Estraga o cabeçalho de model.safetensors."""

    def damage(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        contents = json.loads(data[8 : 8 + size])
        change(contents["transformer.wpe.weight"])
        text = json.dumps(contents).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return damage


def shuffled_ids(folder):
    contents = json.loads((folder / "tokenizer.json").read_text())
    vocab = contents["model"]["vocab"]
    a, b = (token for token, number in vocab.items() if number in (300, 301))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(contents))


def truncate(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(file.name) - 100)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: edit(f / "config.json", model_type="llama"), ["config.json", "llama"]),
        (lambda f: edit(f / "config.json", activation_function="relu"), ["relu"]),
        (lambda f: edit(f / "config.json", n_layer=4), ["h.3", "falta"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "model.safetensors").unlink(), ["pytorch_model.bin"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
        (truncate, ["model.safetensors"]),
        (header(lambda entry: entry.update(dtype="I4")), ["wpe", "I4"]),
        (header(lambda entry: entry["shape"].append(2)), ["wpe"]),
        (header(lambda entry: entry["shape"].reverse()), ["wpe.weight tem o formato"]),
        (header(lambda entry: entry.update(data_offsets=[0, 4])), ["model.safetensors"]),
        (
            header(lambda entry: entry.update(data_offsets=[n + 4 for n in entry["data_offsets"]])),
            ["model.safetensors"],
        ),
        (header(lambda entry: entry.update(data_offsets=[-8, 10**12])), ["model.safetensors"]),
        (drop_a_tensor, ["ln_f.bias falta"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["vocab.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
        (shuffled_ids, ["tokenizer.json", "fusões"]),
    ],
)
def test_damaged_folders(damage, words, tmp_path):
    make_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    result = run_main("sample.py", "--init_from=m", cwd=tmp_path, check=False)
    assert_short_error(result, *words)


def test_safetensors_equals_the_reference(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 3).half(),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    ours = read_safetensors(tmp_path / "t.safetensors")
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)


def test_masks_of_old_files_are_ignored(tmp_path):
    theirs, _ = make_pretrained(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # como no gpt2 publicado
    save_file(tensors, path)
    assert "h.0.attn.bias" not in read_pretrained(tmp_path / "m")["model"]
    same_logits(sample.load_model(tmp_path / "m")[0], theirs)
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(SystemExit, match="tokenizer.json|vocab.json|Não achei"):
        read_pretrained_tokenizer(tmp_path / "m")
