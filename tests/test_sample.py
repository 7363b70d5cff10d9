"""sample.py: o texto que sai, letra por letra, a atenção que se vê, e os erros."""

import os
import unicodedata
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import TOY, assert_short_error, run_main

import prepare
import sample
from prepare import build_encoding


@pytest.fixture(scope="module")
def trained(toy_data):
    """toy_data com um treino curto em out/a."""
    run_main("train.py", *TOY, "--max_iters=30", "--out_dir=out/a", cwd=toy_data)
    return toy_data


def run_sample(cwd, *options, check=True):
    return run_main("sample.py", "--out_dir=out/a", "--device=cpu", *options, cwd=cwd, check=check)


def test_letters_cut_between_tokens_come_out_whole(capsys, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}  # um token por byte
    encoding = build_encoding(prepare.make_tokenizer("bpe", ranks, {prepare.END_OF_TEXT: 256}))
    text, pieces = "ação, 🐱 e 漢字", []
    rows = [torch.tensor([*row.encode()]) for row in (text, "éé")]  # o segundo acaba antes
    tokens = torch.nn.utils.rnn.pad_sequence(rows, padding_value=256)  # (T, 2)

    def generate(idx, *_):
        assert idx[0].tolist() == [256, *b"Oi"]  # um texto começa depois do fim de outro
        return tokens[:, : len(idx)]

    model, device = SimpleNamespace(generate=generate), torch.device("cpu")
    options = SimpleNamespace(
        start="Oi", num_samples=2, max_new_tokens=9, temperature=1, top_k=0, seed=1)
    sample.write(model, encoding, options, device)
    assert capsys.readouterr().out == f"Oi{text}\n---------------\nOiéé\n"
    options.num_samples = 1
    monkeypatch.setattr("builtins.print", lambda piece="", **_: pieces.append(piece))
    sample.write(model, encoding, options, device)
    assert [piece for piece in pieces[:-1] if piece] == ["Oi", *text]  # uma letra por vez


def test_a_seed_is_a_text(trained):
    def write(*options):
        return run_sample(trained, "--start=O gato", "--max_new_tokens=30", *options).stdout

    assert write("--seed=1") == write("--seed=1") != write("--seed=2")
    parts = write("--num_samples=3").split("\n---------------\n")  # a linha do nanoGPT
    assert len(parts) == 3 == len(set(parts)) and all(part.startswith("O gato") for part in parts)


def test_greedy_text_equals_the_models(trained):
    options = ["--start=O gato", "--max_new_tokens=8", "--dtype=float32"]
    outputs = {run_sample(trained, *options, change).stdout
               for change in ("--temperature=0", "--temperature=1e-46", "--top_k=1")}
    model, tokenizer = sample.load_model(trained / "out/a/best.pt")
    encoding = build_encoding(tokenizer)
    ids = prompt = [encoding.eot_token, *encoding.encode_ordinary("O gato")]
    while len(ids) < len(prompt) + 8:  # sem generate nem cache: o texto todo de novo a cada token
        ids = [*ids, model(torch.tensor([ids]))[0][0, -1].argmax().item()]
    assert len(ids) <= 16 and encoding.eot_token not in ids[1:]
    assert outputs == {encoding.decode(ids[1:]) + "\n"}


@pytest.mark.parametrize("device, parameters, name, dtype", [
    ("cpu", 24e6, "auto", torch.float32), ("cpu", 26e6, "auto", torch.bfloat16),
    ("cuda", 24e6, "auto", torch.bfloat16), ("cpu", 24e6, "bfloat16", torch.bfloat16)])
def test_a_small_model_on_a_cpu_writes_in_float32(monkeypatch, device, parameters, name, dtype):
    monkeypatch.setattr(sample, "choose_dtype", lambda device, name: torch.bfloat16)
    size = SimpleNamespace(num_params=lambda: parameters)
    assert sample.sampling_dtype(size, torch.device(device), name) == dtype


def test_prompts(trained, tmp_path):
    def write(start):
        return run_sample(trained, f"--start={start}", "--max_new_tokens=6").stdout

    (tmp_path / "começo.txt").write_text("\ufeffUm dia, a irmã", encoding="utf-8")
    assert write(f"FILE:{tmp_path}/começo.txt") == write("Um dia, a irmã")
    assert write(unicodedata.normalize("NFD", "Um dia, a irmã")) == write("Um dia, a irmã")
    assert write("<|endoftext|>") == write("")  # o jeito do nanoGPT de não começar por nada
    assert write("caf\udce9").startswith("caf?")  # um byte que não é UTF-8


def test_a_checkpoint_is_all_it_needs_and_the_newest_is_used(trained, tmp_path):
    assert_short_error(run_main("sample.py", cwd=tmp_path, check=False), "train.py")
    for age, name in ((300, "velho"), (100, "novo"), (200, "meio")):
        path = tmp_path / "out" / name / "best.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes((trained / "out/a/best.pt").read_bytes() if name == "novo" else b"")
        os.utime(path, (10_000 - age, 10_000 - age))
    result = run_main("sample.py", "--start=O gato", "--max_new_tokens=5", cwd=tmp_path)
    assert "novo" in result.stderr and "[5 tokens, " in result.stderr
    assert result.stdout.startswith("O gato") and "[" not in result.stdout  # só o texto
    for name in ("velho", "outro"):  # um está danificado, e o outro não existe
        result = run_main("sample.py", f"--out_dir=out/{name}", cwd=tmp_path, check=False)
        assert_short_error(result, f"{name}/best.pt")


@pytest.mark.parametrize("option, word", [
    ("--temperature=-1", "--temperature"), ("--temperature=nan", "--temperature"),
    ("--top_k=-1", "--top_k"), ("--num_samples=0", "--num_samples"),
    ("--num_samples=3000000", "3000000"), ("--max_new_tokens=0", "--max_new_tokens"),
    ("--device=gpu", "gpu"), ("--dtype=int8", "int8"), ("--start=FILE:nada.txt", "nada.txt"),
    ("--top-k=3", "Seria --top_k?"), ("--attention=", "frase"), ("--attention=...", "frase"),
    ("--attention=_um_ e _dois_", "sublinhados"), ("--attention=o gato_", "sublinhados"),
    ("--attention=__ela__", "sublinhados"), ("--attention=" + "muito " * 20, "16"),
    ("--attention=O gato --image=a.png", ".svg"), ("--attention=O gato --export=hf", "--attention"),
    ("--attention=O gato --layer=3", "--layer"), ("--attention=O gato --head=0", "--head"),
    ("--layer=1", "--attention"), ("--image=a.svg", "--attention")])
def test_bad_options(trained, option, word):
    options = option.replace(" --", "\n--").split("\n")
    assert_short_error(run_sample(trained, *options, check=False), word)


# A atenção visível
@pytest.mark.parametrize("sentence, asked", [
    ("A cachorra correu atrás da bola, mas _ela_ era rápida!", "ela"), ("o gato viu!...", "viu"),
    ("A corrida era rápida", "rápida"), ("_o_ gato", "o"), ("o _!_ caiu", "!"), ("(_ela_)", "ela"),
    ("o _guarda-chuva_ caiu", "guarda-chuva"), ("_o gato_ caiu", "o gato"), ("a irmã", "irmã"),
    ("o\x1bgato", "gato"), ("nome_de_variável _fim_.", "fim"), ("ela, _ela_, ela", "ela")])
def test_the_asked_word_and_the_tokens_of_the_whole_sentence(trained, sentence, asked):
    _, tokenizer = sample.load_model(trained / "out/a/best.pt")
    encoding = build_encoding(tokenizer)
    words, i = sample.split_words(unicodedata.normalize("NFD", sentence), tokenizer)
    assert words[i][0] == asked
    assert not sentence.startswith("ela") or i == 3  # (começo), "ela", ",", "ela"
    ids = [token for _, tokens in words for token in tokens]
    text = sentence.replace(f"_{asked}_", asked)
    assert ids == [encoding.eot_token, *encoding.encode_ordinary(text)]


def sum_by_hand(weights, words):
    """De tokens a palavras, (L, nh, T, T) -> (L, nh, W, W): soma o que uma palavra recebe, e tira a
    média do que ela dá."""
    owner = [i for i, (_, tokens) in enumerate(words) for _ in tokens]  # a palavra de cada token
    shares = torch.zeros(*weights.shape[:2], len(words), len(words))
    for a, asking in enumerate(owner):
        for b, seen in enumerate(owner):
            shares[:, :, asking, seen] += weights[:, :, a, b] / owner.count(asking)
    return shares


def test_attention_lists_every_word_up_to_the_asked_one(trained, tmp_path):
    model, tokenizer = sample.load_model(trained / "out/a/best.pt")
    sentence, image = "A < gato _viu_ só", tmp_path / "a.svg"
    words, asked = sample.split_words(sentence, tokenizer)
    weights, shares = [], sample.word_attention(model, words)
    model(torch.tensor([[token for _, tokens in words for token in tokens]]), weights=weights)
    assert max(len(tokens) for _, tokens in words) > 1 and (shares.sum(-1) - 1).abs().max() < 1e-5
    assert (shares - sum_by_hand(torch.cat(weights), words)).abs().max() < 1e-6
    output = run_sample(trained, f"--attention={sentence}", f"--image={image}").stdout
    rows = [line for line in output.splitlines() if "%" in line]
    percents = {row.split()[0]: float(row.split("%")[0].split()[-1]) for row in rows}
    assert list(percents.values()) == sorted(percents.values(), reverse=True)
    means = 100 * shares.mean((0, 1))[asked]  # das quatro cabeças
    expected = {word: mean.item() for (word, _), mean in zip(words[: asked + 1], means)}
    assert percents == pytest.approx(expected, abs=0.051) and "não o certo" in output
    drawing = ElementTree.parse(image).getroot()
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("camada 2, cabeça 1") == 1 and "só" in texts and "<" in texts
    one = run_sample(trained, f"--attention={sentence}", "--layer=2", "--head=1").stdout
    assert "camada 2, cabeça 1" in one and "média" not in one
    assert f" {shares[1, 0, asked].max():.1%} " in one
