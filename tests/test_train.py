"""train.py: as janelas, o otimizador, as opções, continuar, avaliar, e os erros."""

import functools
import math
import os
import pty
import re
import subprocess
import sys
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, assert_short_error, run_main

import prepare
import train
from model import GPT, GPTConfig, read_checkpoint
from train import Config, Muon, Tokens, lr_factor, make_optimizers, orthogonalize, read_options


def run_toy(cwd, *options, out="out/t", check=True):
    return run_main("train.py", *TOY, f"--out_dir={out}", *options, cwd=cwd, check=check)


def read(path):
    """Um checkpoint, com os pesos do modelo no lugar do modelo."""
    contents = read_checkpoint(path)
    return contents | {"model": contents["model"].state_dict()}


def log_rows(folder):
    """As linhas de log.csv, menos os segundos."""
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    return [[value for i, value in enumerate(line.split(",")) if i != 2] for line in lines]


def same(a, b):
    """Compara dois conteúdos de checkpoint, tensor por tensor, bit a bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare_runs(one, other):
    """Confere que dois treinos são o mesmo, bit a bit."""
    a, b = (read(Path(folder, "last.pt")) for folder in (one, other))
    for key in ("model", "optimizers", "scaler", "step", "identity"):
        assert same(a[key], b[key]), key
    assert log_rows(Path(one)) == log_rows(Path(other))


@pytest.fixture
def texts(tmp_path):
    """Um .bin de documentos de tamanhos dados: cada token é a própria posição; o do fim é 0."""

    def make(lengths, block_size, seed=7):
        tokens = np.arange(1, sum(lengths) + 1, dtype="<u2")
        tokens[np.cumsum(lengths) - 1] = 0
        tokens.tofile(tmp_path / "a.bin")
        return Tokens(tmp_path / "a.bin", {"tokens": len(tokens)}, 0, block_size, seed)

    return make


LENGTHS = [3, 40, 1, 10, 11, 25, 9, 120, 2, 30] * 4


def test_a_window_begins_with_a_document_or_goes_on_in_it(texts):
    data = texts(LENGTHS, 10)
    ends = [-1, *np.flatnonzero(data.tokens == 0)]
    good = {place % len(data.tokens) for begin, end in zip(ends, ends[1:])
            for place in (begin, *range(begin + 5, end - 5))}
    seen, covered, rounds = [], set(), 20 * data.count
    for number in range(rounds // 4):
        x, y = data.batch(number, 4)
        assert x.shape == (4, 10) and x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])  # o alvo é o token seguinte
        covered |= set(y.flatten().tolist())
        for row, target in zip(x, y):
            place = (int(target[0]) or int(target[1]) - 1) - 1  # a posição do alvo
            seen.append(int(place - 1) % len(data.tokens))
    assert set(seen) <= good and covered == set(data.tokens.tolist())
    # um documento é visto tantas vezes quantas os seus tokens pedem, e as voltas são diferentes
    inside = sum(ends[8] <= place < ends[8] + 120 for place in seen)  # o primeiro de 120
    assert inside / len(seen) == pytest.approx(120 / len(data.tokens), rel=0.1)
    assert seen[: data.count] != seen[data.count : 2 * data.count]


def test_batch_is_a_pure_function_of_seed_and_number(texts):
    x, _ = texts(LENGTHS, 10).batch(40, 4)
    other = texts(LENGTHS, 10)
    other.batch(3, 4)
    assert torch.equal(other.batch(40, 4)[0], x)
    assert not torch.equal(texts(LENGTHS, 10, seed=8).batch(40, 4)[0], x)


@pytest.mark.parametrize("lengths", [LENGTHS, [500], [10] * 9, [1, 1, 1, 30]])
def test_evaluation_counts_each_token_once(texts, lengths):
    data = texts(lengths, 10)
    rows = [(x, y) for xs, ys in data.fixed_batches(8, most=1000) for x, y in zip(xs, ys)]
    counted = [y[y != -100].tolist() for _, y in rows]
    assert sorted(sum(counted, [])) == sorted(data.tokens.tolist())
    for x, y in rows:  # nada passa do documento em que a janela está
        assert 0 not in y[y != -100].tolist()[:-1]
    assert len(list(data.fixed_batches(8, most=2))) <= 2


def test_a_text_without_ends_also_serves(texts):
    data = texts(LENGTHS, 10)
    data.end = 60_000
    assert data.batch(0, 8)[0].shape == (8, 10)
    counted = sum((y != -100).sum().item() for _, y in data.fixed_batches(8, 1000))
    assert 0 <= counted - len(data.tokens) < 10  # a última janela dá a volta e lê o começo


@pytest.mark.parametrize("m, n, parts", [(16, 16, 1), (48, 16, 3), (64, 16, 1), (16, 64, 1)])
def test_muon_equals_torch(m, n, parts, monkeypatch):  # em c_attn, q, k e v à parte
    # o polinômio do artigo, que é o do torch, em vez do nosso
    monkeypatch.setattr(train, "NEWTON_SCHULZ", ((3.4445, -4.7750, 2.0315),) * 5)
    start, more = torch.randn(m, n, generator=torch.manual_seed(0)), parts**0.5
    ours, *theirs = (torch.nn.Parameter(p.clone()) for p in (start, *start.chunk(parts)))
    optimizers = [Muon([ours], lr=0.02, weight_decay=0.1, dtype=torch.bfloat16),
                  torch.optim.Muon(theirs, lr=0.02 * more, weight_decay=0.1 / more, momentum=0.95)]
    for _ in range(5):
        ours.grad = torch.randn(m, n)
        for p, gradient in zip(theirs, ours.grad.chunk(parts)):
            p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - torch.cat(theirs)).norm() < 0.02 * (ours - start).norm()


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 96, 32), (3, 32, 128)])
def test_orthogonalize_evens_out_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = torch.linalg.svdvals(matrix / matrix.norm(dim=(1, 2), keepdim=True))
    singular = torch.linalg.svdvals(orthogonalize(matrix))
    assert singular.max() < 1.28 and (singular > 0.72).sum() >= (before > 0.01).sum()
    assert (orthogonalize(matrix) * matrix).sum() > 0  # a mesma direção


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_weight_has_one_optimizer_and_only_matrices_decay(optimizer):
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8))
    config = Config(optimizer=optimizer, weight_decay=0.3)
    optimizers = make_optimizers(model, config, torch.float32)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    seen = [p for group in groups for p in group["params"]]
    assert sorted(map(id, seen)) == sorted(map(id, model.parameters()))
    for group in groups:
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] else {1})
    if optimizer == "muon":
        assert {id(p) for p in optimizers[0].param_groups[0]["params"]} == {
            id(p) for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}


def test_learning_rate_rises_and_falls():
    config = Config(learning_rate=1e-3, min_lr=1e-4, warmup_iters=9, max_iters=109)
    factors = [lr_factor(step, config) for step in range(110)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[34] == pytest.approx(1 - 0.9 / 4)  # um quarto da descida, em linha reta
    assert factors[109] == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_equal_one_large_batch(workdir, optimizer):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        run_toy(workdir, f"--batch_size={batch_size}", f"--optimizer={optimizer}", "--max_iters=3",
                f"--gradient_accumulation_steps={accumulation}", out=f"out/{batch_size}")
        results.append(read(workdir / f"out/{batch_size}/last.pt"))
    for other in results[1:]:
        for name, weight in results[0]["model"].items():
            assert (weight - other["model"][name]).abs().max() < 1e-4, name


def test_gradient_is_clipped(workdir, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def record(parameters, limit):
        before = clip(parameters, limit)
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    run_toy(workdir, "--grad_clip=1e-3", "--max_iters=2")
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)


def break_gradients(monkeypatch, value):
    """Faz o gradiente de um peso da parte do AdamW deixar de ser um número."""
    to = GPT.to

    def broken(model, device):
        model.wte.weight.register_hook(lambda gradient: gradient * value)
        return to(model, device)

    monkeypatch.setattr(GPT, "to", broken)


def test_a_gradient_that_is_not_a_number_stops_before_the_update(workdir, monkeypatch):
    run_toy(workdir, "--max_iters=2", "--optimizer=muon")
    before = (workdir / "out/t/last.pt").read_bytes()
    break_gradients(monkeypatch, math.nan)
    result = run_toy(workdir, "--max_iters=4", "--optimizer=muon", check=False)
    assert_short_error(result, "Passo 2", "learning_rate", "last.pt")
    assert (workdir / "out/t/last.pt").read_bytes() == before
    result = run_toy(workdir, "--max_iters=60", "--learning_rate=1e9", "--grad_clip=0",
                     "--save_interval=1000", out="out/longe", check=False)
    assert_short_error(result, "não é um número", "learning_rate")
    read_checkpoint(workdir / "out/longe/last.pt")


def test_float16_skips_both_optimizers_when_the_gradient_overflows(workdir, monkeypatch):
    options = ["--optimizer=muon", "--dtype=float16", "--weight_decay=0.5"]
    run_toy(workdir, *options, "--max_iters=20")
    rows = [float(row[4]) for row in log_rows(workdir / "out/t")[1:]]
    assert rows[-1] < rows[0] - 0.3  # aprende
    before = read(workdir / "out/t/last.pt")
    break_gradients(monkeypatch, math.inf)
    run_toy(workdir, *options, "--max_iters=21")
    after = read(workdir / "out/t/last.pt")
    assert same(before["model"], after["model"]) and after["step"] == 21
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2


def test_the_precision_may_change_between_two_runs(workdir, monkeypatch):
    monkeypatch.setattr(timeit, "repeat", lambda *args, **options: [0.0])  # bfloat16 não ganha
    run_toy(workdir, "--dtype=auto", "--max_iters=2")
    assert read(workdir / "out/t/last.pt")["config"]["dtype"] == "float32"
    for step, dtype in ((4, "float16"), (6, "float32"), (8, "float16")):
        output = run_toy(workdir, f"--dtype={dtype}", f"--max_iters={step}").stdout
        assert f"para '{dtype}'" in output


def test_config_file_then_command_line(tmp_path):
    path = tmp_path / "meu.py"
    path.write_text("\ufeffn_layer = 3  # é\n\nlearning_rate = 1\nbias = False\ndataset = 'a b'\n")
    config = read_options([str(path), "--n_layer=5", "--dropout", "0.5", "--compile=False"])
    assert (config.n_layer, config.dropout, config.learning_rate) == (5, 0.5, 1.0)
    assert (config.bias, config.compile, config.dataset) == (False, False, "a b")
    assert config.out_dir == "out/meu"
    assert read_options([str(path), "--out_dir=out/x"]).out_dir == "out/x"
    path.write_bytes("n_layer = 3  # três, no Windows antigo\n".encode("cp1252"))
    assert read_options([str(path)]).n_layer == 3
    assert read_options([]).out_dir == "out/gpt2"


@pytest.mark.parametrize("content, words", [
    ("n_layer = 2\nn_layr = 3\n", ["--n_layr=3", "Seria --n_layer?"]),
    ("n_layer = 'três'\n", ["--n_layer", "'três' não é do tipo int"]),
    ("n_layer = 2.0\n", ["--n_layer", "int"]), ("n_layer = True\n", ["--n_layer", "int"]),
    ("n_layer = 3\nimport os\n", ["import os", "n_layer = 4"]), ("device = 'gpu'\n", ["gpu"]),
    ("n_layer = __import__('os').system('touch invadido')\n", ["só cabem linhas"]),
    ("n_layer, n_head = 3, 4\n", ["só cabem linhas"]), ("n_layer == \n", ["só cabem linhas"]),
    ("n_head = 3\nn_embd = 16\n", ["n_embd = 16", "n_head = 3"]), ("dropout = 1.0\n", ["dropout"]),
    ("learning_rate = -1.0\n", ["learning_rate"]), ("dataset = 'outro'\n", ["outro", "prepare.py"]),
    ("compile = 1\n", ["compile = '1'"]), ("optimizer = 'sgd'\n", ["sgd"]),
    ("block_size = 100_000\n", ["100000", "train.bin"]), ("n_layer = 0\n", ["n_layer = 0"]),
    ("dtype = 'int8'\n", ["int8"]), ("learning_rate = 1e-6\nmin_lr = 3e-6\n", ["3e-06", "1e-06"])])
def test_bad_config_file(content, words, workdir):
    (workdir / "ruim.py").write_text(content, encoding="utf-8")
    assert_short_error(run_main("train.py", "ruim.py", cwd=workdir, check=False), *words)
    assert not (workdir / "invadido").exists() and not (workdir / "out").exists()


@pytest.mark.parametrize("argument, words", [
    ("--batchsize=3", ["--batchsize", "Seria --batch_size?"]), ("--bias=sim", ["bias", "'sim'"]),
    ("--batch_size=dois", ["--batch_size", "'dois'", "int"]), ("--bias=", ["bias"]),
    ("--bias", ["--bias", "falta o valor"]), ("config/nada.py", ["config/nada.py"])])
def test_bad_command_line(argument, words, workdir):
    assert_short_error(run_main("train.py", argument, cwd=workdir, check=False), *words)


def test_help_lists_every_option_with_meaning_and_default(tmp_path):
    output = " ".join(run_main("train.py", "--help", cwd=tmp_path).stdout.split())
    for name, default in vars(Config()).items():
        pattern = rf"--{name} \S+ \S.{{9,}}? \[{re.escape(str(default))}\]"
        assert name == "vocab_size" or re.search(pattern, output), name
    assert "uso: python" in output and "opções:" in output and "mostra esta ajuda" in output


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_is_valid_and_explained(path, capsys):
    read_options([str(path)])
    assert "Atenção" not in capsys.readouterr().out
    for line in path.read_text(encoding="utf-8").splitlines():
        assert " = " not in line.partition("#")[0] or "# " in line, f"sem explicação: {line}"


def test_evaluating_and_showing_change_nothing_in_the_training(workdir):
    results = []
    for options in (["--eval_interval=1", "--log_interval=1", "--sample_prompt=Era"],
                    ["--eval_interval=100", "--log_interval=100"]):
        run_toy(workdir, "--max_iters=6", "--dropout=0.2", *options, out=f"out/{len(results)}")
        results.append(read(workdir / f"out/{len(results)}/last.pt"))
    assert same(results[0]["model"], results[1]["model"])


def test_evaluation_by_hand(workdir):
    run_toy(workdir, "--max_iters=1", "--eval_iters=1000", "--batch_size=7")
    best = read_checkpoint("out/t/best.pt")
    meta, tokenizer = prepare.read_meta(Path("data/contos"))
    val = np.fromfile("data/contos/val.bin", "<u2").tolist()
    encoding = prepare.build_encoding(tokenizer)
    total, document = 0.0, [399]
    for token in val:
        document.append(token)
        if token == 399:
            for start in range(0, len(document) - 1, 16):
                piece = torch.tensor([document[start : start + 17]])
                loss = best["model"](piece[:, :-1], piece[:, 1:])[1].item()
                total += loss * (piece.size(1) - 1)
            document = [399]
    row = log_rows(workdir / "out/t")[-1]
    assert float(row[4]) == pytest.approx(total / len(val), abs=1e-4) == best["val_loss"]
    text = encoding.decode([token for token in val if token != 399])
    assert float(row[5]) == pytest.approx(total / math.log(2) / len(text.encode()), abs=1e-4)


def test_it_learns_and_says_what_it_does(workdir):
    output = run_toy(workdir, "--max_iters=60", "--eval_interval=30", "--optimizer=muon",
                     "--bias=False").stdout
    for words in ("1 × cpu, contas em float32", "parâmetros", "quem chuta tem loss 5.99", "faltam",
                  "tokens/s", "bits por byte", "    O gato", "com 60 passos", "python sample.py"):
        assert words in output
    rows = log_rows(workdir / "out/t")
    assert rows[0] == ["step", "tokens", "lr_factor", "train_loss", "val_loss", "val_bpb"]
    assert [row[:2] for row in rows[1:]] == [["0", "0"], ["30", "1920"], ["60", "3840"]]
    losses = [float(row[4]) for row in rows[1:]]
    assert abs(losses[0] - math.log(400)) < 0.2 and losses[-1] < losses[0] - 0.8
    last, best = (read_checkpoint(workdir / "out/t" / name) for name in ("last.pt", "best.pt"))
    assert best["val_loss"] == pytest.approx(min(losses), abs=1e-4) and "optimizers" not in best
    assert "Atenção" not in output and last["step"] == 60
    output = run_toy(workdir, "--max_iters=2", "--sample_prompt=e\u0301\udce9", out="out/u").stdout
    assert "Atenção" in output and "    \u00e9?" in output


def test_best_stays_the_best_when_later_losses_are_worse(workdir, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(train, "evaluate", lambda *_: (1.0, next(losses), "texto"))
    run_toy(workdir, "--max_iters=3", "--eval_interval=1")
    best = read_checkpoint("out/t/best.pt")
    assert (best["step"], best["val_loss"]) == (1, 2.0)


def test_progress_is_one_moving_line_in_a_terminal(workdir):
    reader, writer = pty.openpty()
    command = [sys.executable, ROOT / "train.py", *TOY, "--max_iters=20", "--log_interval=1"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": writer, "stderr": writer}
    process = subprocess.Popen(command, cwd=workdir, **streams)
    os.close(writer)
    output = b""
    try:
        while chunk := os.read(reader, 4096):
            output += chunk
    except OSError:  # o outro lado fechou
        pass
    assert process.wait(60) == 0
    moving = [line for line in output.decode().split("\n") if line.count("tokens/s") > 1]
    assert len(moving) == 1 and moving[0].count("\r") >= 20


class Card(str):
    """Uma CPU que se diz cuda, onde a compilação acontece."""

    type = "cuda"


def pretend_cuda(monkeypatch):
    monkeypatch.setattr(train, "choose_device", lambda name: Card("cpu"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.autograd.set_grad_enabled(
        torch.is_grad_enabled()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3e9)


def test_compiled_model_trains_the_same_and_saves_the_same_names(workdir, monkeypatch):
    run_toy(workdir, "--max_iters=3")
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    output = run_toy(workdir, "--max_iters=3", out="out/c").stdout
    assert "não funcionou" not in output and "memória  3.0 GB" in output
    plain, compiled = (read(workdir / name / "last.pt")["model"] for name in ("out/t", "out/c"))
    assert plain.keys() == compiled.keys()
    assert max((plain[name] - compiled[name]).abs().max() for name in plain) < 1e-4


def test_compiling_falls_back_to_the_model_itself(workdir, monkeypatch):
    run_toy(workdir, "--max_iters=3")
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda model: lambda *_: {}["sem compilador"])
    assert "não funcionou (KeyError)" in run_toy(workdir, "--max_iters=3", out="out/c").stdout
    assert same(*(read(workdir / name / "last.pt")["model"] for name in ("out/t", "out/c")))


@pytest.mark.parametrize("options, words", [
    (["--batch_size=12", "--gradient_accumulation_steps=2"], ["=6", "_accumulation_steps=4"]),
    (["--batch_size=9"], ["--batch_size=3", "--gradient_accumulation_steps=3"])])
def test_out_of_memory_says_what_to_use_instead(workdir, monkeypatch, options, words):
    def fault(error):
        def step(*_):
            raise error if error else torch.empty(10**15)  # o erro da CPU, de verdade

        monkeypatch.setattr(train, "train_step", step)

    for error in (None, torch.OutOfMemoryError("out of memory"), RuntimeError("MPS out of memory")):
        fault(error)
        result = run_toy(workdir, *options, out=f"out/{type(error).__name__}", check=False)
        assert_short_error(result, "Faltou memória", *words)
    for message in ("um defeito nosso", "CUDA error: an illegal memory access was encountered"):
        fault(RuntimeError(message))
        with pytest.raises(RuntimeError, match=message):
            run_toy(workdir, out=f"out/{len(message)}")
