"""sample.py: o texto que sai, letra por letra, e os erros."""

import os
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import TOY, assert_short_error, run_main, run_script

import prepare
import sample
from prepare import build_encoding


@pytest.fixture(scope="module")
def trained(toy_data):
    """toy_data com um treino curto em out/a."""
    run_main(
        "train.py", *TOY, "--max_iters=30", "--eval_interval=30", "--out_dir=out/a", cwd=toy_data
    )
    return toy_data


def run_sample(cwd, *options, check=True):
    return run_main("sample.py", "--out_dir=out/a", "--device=cpu", *options, cwd=cwd, check=check)


def test_letters_cut_between_tokens_come_out_whole():
    encoding = prepare.build_encoding(
        prepare.make_tokenizer("bpe", {bytes([b]): b for b in range(256)})
    )
    text = "ação, 🐱 e 漢字"
    pieces = list(sample.text_pieces(text.encode(), encoding))  # um token por byte
    assert "".join(pieces) == text
    assert set(pieces) == set(text) | {""}
    cut = text.encode()[:-1]  # o texto acaba no meio de uma letra
    assert "".join(sample.text_pieces(cut, encoding)) == text[:-1]


def test_the_same_seed_writes_the_same_text(trained):
    first, again, other = (
        run_sample(trained, "--start=O gato", "--max_new_tokens=40", f"--seed={seed}").stdout
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.startswith("O gato")


def test_greedy_text_equals_the_models(trained):
    output = run_sample(
        trained, "--start=O gato", "--temperature=0", "--max_new_tokens=8", "--dtype=float32"
    ).stdout
    model, tokenizer = sample.load_model(trained / "out/a/best.pt")
    encoding = build_encoding(tokenizer)
    prompt = [encoding.eot_token, *encoding.encode_ordinary("O gato")]
    ids = list(prompt)
    while len(ids) < len(prompt) + 8:  # sem generate nem cache: o texto todo de novo a cada token
        logits, _ = model(torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    assert len(ids) <= 16 and encoding.eot_token not in ids[1:]
    assert output == encoding.decode(ids[1:]) + "\n"


@pytest.mark.parametrize(
    "device, parameters, name, dtype",
    [
        ("cpu", 24e6, "auto", torch.float32),
        ("cpu", 26e6, "auto", torch.bfloat16),
        ("cuda", 24e6, "auto", torch.bfloat16),
        ("cpu", 24e6, "bfloat16", torch.bfloat16),
    ],
)
def test_a_small_model_on_a_cpu_writes_in_float32(monkeypatch, device, parameters, name, dtype):
    monkeypatch.setattr("model.has_native_bf16", lambda device: True)
    size = SimpleNamespace(num_params=lambda: parameters)
    assert sample.sampling_dtype(size, torch.device(device), name) == dtype


def test_several_samples_have_nanogpts_line_between_them(trained):
    result = run_sample(trained, "--start=Era", "--num_samples=3", "--max_new_tokens=15")
    parts = result.stdout.split("\n---------------\n")
    assert len(parts) == 3 and all(part.startswith("Era") for part in parts)
    assert len(set(parts)) == 3
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout


def test_only_text_goes_to_stdout(trained):
    result = run_main("sample.py", "--start=O gato", "--max_new_tokens=5", cwd=trained)
    assert "best.pt" in result.stderr and "[5 tokens, " in result.stderr
    assert result.stdout.startswith("O gato") and "[" not in result.stdout


def test_prompt_from_a_file(trained, tmp_path):
    (tmp_path / "começo.txt").write_text("Um dia, a coruja", encoding="utf-8")
    output = run_sample(trained, f"--start=FILE:{tmp_path}/começo.txt", "--max_new_tokens=3").stdout
    assert output.startswith("Um dia, a coruja")


def test_the_newest_run_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for age, name in ((300, "velho"), (100, "novo"), (200, "meio")):
        path = tmp_path / "out" / name / "best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (10_000 - age, 10_000 - age))
    assert sample.find_checkpoint(None).parent.name == "novo"
    assert "novo" in capsys.readouterr().err
    assert sample.find_checkpoint("out/velho").parent.name == "velho"


def test_a_checkpoint_is_all_it_needs(trained, tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out/a/best.pt").write_bytes((trained / "out/a/best.pt").read_bytes())
    assert run_sample(tmp_path, "--start=O gato", "--max_new_tokens=5").stdout.startswith("O gato")


def test_without_a_checkpoint(tmp_path):
    assert_short_error(run_script("sample.py", cwd=tmp_path, check=False), "train.py")
    assert_short_error(run_sample(tmp_path, check=False), "best.pt", "train.py")


@pytest.mark.parametrize(
    "option, word",
    [
        ("--temperature=-1", "--temperature"),
        ("--top_k=-1", "--top_k"),
        ("--num_samples=0", "--num_samples"),
        ("--max_new_tokens=0", "--max_new_tokens"),
        ("--device=gpu", "gpu"),
        ("--dtype=int8", "int8"),
        ("--start=FILE:nada.txt", "nada.txt"),
    ],
)
def test_bad_options(trained, option, word):
    assert_short_error(run_sample(trained, option, check=False), word)


def test_unknown_option(trained):
    assert_short_error(run_sample(trained, "--top-k=3", check=False), "Seria top_k?", code=2)


# ------------------------------------------------------------------------------------------------
# A atenção visível


def letters_tokenizer():
    """Um vocabulário de bytes e uma só fusão: quase toda palavra tem vários tokens."""
    return prepare.make_tokenizer("bpe", {bytes([b]): b for b in range(256)} | {b" o": 256})


def test_words_and_their_tokens_are_those_of_the_whole_sentence(trained):
    _, tokenizer = sample.load_model(trained / "out/a/best.pt")
    encoding = build_encoding(tokenizer)
    text = "A cachorra correu atrás da bola, mas ela era rápida!"
    words, asked = sample.split_words(text.replace("ela", "_ela_"), tokenizer)
    ids = [token for _, tokens in words for token in tokens]
    assert ids == [encoding.eot_token, *encoding.encode_ordinary(text)]
    assert words[asked][0] == "ela"
    assert "".join(word for word, _ in words[1:]) == text.replace(" ", "")


@pytest.mark.parametrize(
    "sentence, asked",
    [
        ("o gato viu", "viu"),
        ("o gato viu!...", "viu"),
        ("_o_ gato", "o"),
        ("o _guarda-chuva_ caiu", "guarda-chuva"),
        ("_o gato_ caiu", "o gato"),
        ("o _!_ caiu", "!"),
        ("a irma\u0303", "irmã"),
        ("o\x1bgato", "gato"),
        ("nome_de_variável _fim_.", "fim"),
        ("ele, _ele_, ele", "ele"),
    ],
)
def test_the_asked_word(sentence, asked):
    words, i = sample.split_words(sentence, letters_tokenizer())
    assert words[i][0] == asked
    assert not sentence.startswith("ele") or i == 3  # (começo), "ele", ",", "ele"


def test_word_attention_equals_sums_by_hand(trained):
    model, tokenizer = sample.load_model(trained / "out/a/best.pt")
    words, _ = sample.split_words("O gato viu.", letters_tokenizer())
    words = [(word, [token % model.config.vocab_size for token in tokens]) for word, tokens in words]
    ids = torch.tensor([[token for _, tokens in words for token in tokens]])
    weights = []
    model(ids, weights=weights)
    shares = sample.word_attention(model, words)
    spans, start = [], 0
    for _, tokens in words:
        spans.append(range(start, start + len(tokens)))
        start += len(tokens)
    for layer in range(2):
        for head in range(2):
            for i, asking in enumerate(spans):
                for j, seen in enumerate(spans):
                    expected = sum(
                        weights[layer][0, head, a, b].item() for a in asking for b in seen
                    ) / len(asking)
                    assert abs(shares[layer, head, i, j].item() - expected) < 1e-6
    assert (shares.sum(-1) - 1).abs().max() < 1e-5


def test_attention_lists_every_word_up_to_the_asked_one(trained, tmp_path):
    image = tmp_path / "a.svg"
    output = run_sample(
        trained, "--attention=A < gato _viu_ ela", f"--image={image}"
    ).stdout
    rows = [line for line in output.splitlines() if "%" in line]
    percents = [float(row.split("%")[0].split()[-1]) for row in rows]
    assert percents == sorted(percents, reverse=True) and abs(sum(percents) - 100) < 1
    assert sorted(row.split()[0] for row in rows) == ["(começo)", "<", "A", "gato", "viu"]
    assert "camada" in rows[0] and "não o que é certo" in output
    drawing = ElementTree.parse(image).getroot()
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("camada 2, cabeça 1") == 1 and "ela" in texts and "<" in texts
    one = run_sample(trained, "--attention=O gato viu", "--layer=2", "--head=1").stdout
    assert "camada 2, cabeça 1" in one and "média" not in one


def test_layer_and_head_choose_what_is_shown(trained):
    model, tokenizer = sample.load_model(trained / "out/a/best.pt")
    words, asked = sample.split_words("O gato viu", tokenizer)
    shares = sample.word_attention(model.float(), words)
    shown = run_sample(trained, "--attention=O gato viu", "--layer=2", "--head=1").stdout
    first = next(line for line in shown.splitlines() if "%" in line)
    assert f"{shares[1, 0, asked].max():.1%}" in first


@pytest.mark.parametrize(
    "options, word, code",
    [
        (["--attention="], "frase", 1),
        (["--attention=..."], "frase", 1),
        (["--attention=_um_ e _dois_"], "sublinhados", 1),
        (["--attention=o gato_"], "sublinhados", 1),
        (["--attention=__ela__"], "sublinhados", 1),
        (["--attention=O gato", "--image=a.png"], ".svg", 1),
        (["--attention=O gato", "--image="], ".svg", 1),
        (["--attention=O gato", "--export=hf"], "--attention", 2),
        (["--attention=" + "muito " * 20], "16", 1),
        (["--attention=O gato", "--layer=3"], "--layer 3", 1),
        (["--attention=O gato", "--head=0"], "--head 0", 1),
        (["--layer=1"], "--attention", 2),
        (["--image=a.svg"], "--attention", 2),
    ],
)
def test_bad_attention_options(trained, options, word, code):
    assert_short_error(run_sample(trained, *options, check=False), word, code=code)
