"""sample.py: o texto que sai, letra por letra, e os erros."""

import os

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
