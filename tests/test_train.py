"""train.py: os dados de cada passo, o otimizador, as opções, continuar, avaliar, e os erros."""

import functools
import hashlib
import math
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, assert_short_error, run_main, run_script

import train
from model import GPT, GPTConfig, choose_dtype, read_checkpoint
from train import (
    Config,
    Muon,
    Tokens,
    Trainer,
    lr_factor,
    make_optimizers,
    orthogonalize,
    read_options,
)


def toy_trainer(*options, folder="out/t"):
    trainer = Trainer(read_options([*TOY, f"--out_dir={folder}", *options]))
    trainer.out.mkdir(parents=True, exist_ok=True)
    trainer.compile()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def run_toy(cwd, *options, out="out/t", check=True):
    return run_main("train.py", *TOY, f"--out_dir={out}", *options, cwd=cwd, check=check)


def log_rows(folder):
    """As linhas de log.csv, menos os segundos."""
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    return [[value for i, value in enumerate(line.split(",")) if i != 2] for line in lines]


def same_tensors(a, b):
    """Compara dois conteúdos de checkpoint, tensor por tensor, bit a bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------
# Os dados


@pytest.fixture
def numbers(tmp_path):
    """Um .bin em que cada token é a própria posição."""

    def make(count, block_size, seed=0):
        tokens = np.arange(count, dtype="<u2")
        tokens.tofile(tmp_path / "a.bin")
        split = {"tokens": count, "sha256": hashlib.sha256(tokens).hexdigest()}
        return Tokens(tmp_path / "a.bin", split, 65536, block_size, seed)

    return make


@pytest.mark.parametrize(
    "count, block_size", [(1000, 10), (1009, 10), (25, 10), (11, 10), (500, 1)]
)
def test_each_window_once_per_epoch(numbers, count, block_size):
    data = numbers(count, block_size, seed=7)
    offsets, orders = set(), set()
    for epoch in range(8):
        starts = data.starts(epoch)
        assert len(set(starts)) == len(starts) == data.windows
        assert len(set(starts % block_size)) == 1  # sem sobreposição
        assert starts.min() >= 0 and starts.max() + block_size + 1 <= count
        offsets.add(starts[0] % block_size)
        orders.add(tuple(starts // block_size))
    if count >= 1000:
        assert len(offsets) > 3 and len(orders) == 8


def test_batches_walk_through_the_epochs(numbers):
    data = numbers(1000, 10, seed=7)
    rows = torch.cat([data.batch(number, 3)[0] for number in range(data.windows)])  # 3 voltas
    for epoch in range(3):
        first = rows[epoch * data.windows : (epoch + 1) * data.windows, 0]
        assert first.tolist() == data.starts(epoch).tolist()


def test_batch_is_a_pure_function_of_seed_and_number(numbers):
    x, y = numbers(1000, 10, seed=7).batch(40, 4)
    other = numbers(1000, 10, seed=7)
    other.batch(3, 4)
    assert torch.equal(other.batch(40, 4)[0], x)
    assert not torch.equal(numbers(1000, 10, seed=8).batch(40, 4)[0], x)
    assert torch.equal(y, x + 1)  # o alvo é o token seguinte
    assert x.dtype == torch.int64 and x.shape == (4, 10)


def test_evaluation_sees_all_of_a_small_text_and_spaced_windows_of_a_large_one(numbers):
    data = numbers(1005, 10)
    starts = [row[0].item() for x, _ in data.fixed_batches(8, most=100) for row in x]
    assert starts == list(range(0, 1000, 10))
    starts = [row[0].item() for x, _ in data.fixed_batches(8, most=2) for row in x]
    assert len(starts) == 16 and starts[0] == 0 and starts[-1] == 990
    assert max(np.diff(starts)) - min(np.diff(starts)) <= 10


# ------------------------------------------------------------------------------------------------
# O otimizador


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 64)])
def test_muon_equals_torch(shape, monkeypatch):
    # o polinômio do artigo, que é o do torch, em vez do nosso
    monkeypatch.setattr(train, "NEWTON_SCHULZ", ((3.4445, -4.7750, 2.0315),) * 5)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(p) for p in torch.randn(1, *shape).repeat(2, 1, 1))
    optimizers = [
        Muon([ours], lr=0.02, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95),
    ]
    start = ours.detach().clone()
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_orthogonalize_evens_out_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = torch.linalg.svdvals(matrix / matrix.norm())
    singular = torch.linalg.svdvals(orthogonalize(matrix, torch.float32))
    assert singular.max() < 1.28 and (singular > 0.72).sum() >= (before > 0.01).sum()
    assert (orthogonalize(matrix, torch.float32) * matrix).sum() > 0  # a mesma direção


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_weight_has_one_optimizer_and_only_matrices_decay(optimizer):
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8))
    optimizers = make_optimizers(
        model, Config(optimizer=optimizer, weight_decay=0.3), torch.float32
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    seen = [p for group in groups for p in group["params"]]
    assert sorted(map(id, seen)) == sorted(map(id, model.parameters()))
    for group in groups:
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] else {1})
        assert group["weight_decay"] in (0.0, 0.3)
    if optimizer == "muon":
        assert {id(p) for p in optimizers[0].param_groups[0]["params"]} == {
            id(p) for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2
        }


def test_learning_rate_rises_and_falls():
    config = Config(learning_rate=1e-3, min_lr=1e-4, warmup_iters=9, max_iters=109)
    factors = [lr_factor(step, config) for step in range(120)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[59] == pytest.approx((1 + 0.1) / 2)  # no meio do cosseno
    assert factors[109:] == pytest.approx([0.1] * 11)
    assert lr_factor(105, Config(warmup_iters=9, max_iters=109, decay_lr=False)) == 1
    assert (
        lr_factor(
            50, Config(learning_rate=1, min_lr=0, warmup_iters=0, max_iters=200, lr_decay_iters=50)
        )
        == 0
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_equal_one_large_batch(workdir, optimizer):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = toy_trainer(
            f"--batch_size={batch_size}",
            f"--gradient_accumulation_steps={accumulation}",
            f"--optimizer={optimizer}",
        )
        start = weights(trainer)
        losses = [trainer.train_step().item() for _ in range(3)]
        results.append((weights(trainer), losses))
    for after, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], abs=1e-5)
        assert (after - results[0][0]).norm() < 1e-3 * (after - start).norm()


def test_gradient_is_clipped(workdir):
    trainer = toy_trainer("--grad_clip=1e-3")
    norms = []
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item()
        )
    trainer.train_step()
    assert norms == pytest.approx([1e-3], rel=1e-3)


def test_a_gradient_that_is_not_a_number_stops_before_the_update(workdir):
    trainer = toy_trainer("--optimizer=muon")
    trainer.train_step()
    with torch.no_grad():
        trainer.model.wpe.weight[0, 0] = math.nan
    before = weights(trainer)
    with pytest.raises(SystemExit, match="Passo 1: .*learning_rate"):
        trainer.train_step()
    assert torch.equal(weights(trainer).isnan(), before.isnan())
    assert torch.equal(weights(trainer).nan_to_num(), before.nan_to_num())


def test_float16_skips_both_optimizers_when_the_gradient_overflows(workdir):
    trainer = toy_trainer("--optimizer=muon", "--dtype=float16")
    assert trainer.scaler.is_enabled()
    before = weights(trainer)
    with torch.no_grad():  # só um peso da parte do AdamW transborda
        trainer.scaler._lazy_init_scale_growth_tracker(trainer.device)
    trainer.model.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    scale = trainer.scaler.get_scale()
    trainer.train_step()
    assert torch.equal(weights(trainer), before)
    assert trainer.scaler.get_scale() == scale / 2


def test_float16_trains(workdir):
    trainer = toy_trainer("--optimizer=muon", "--dtype=float16")
    losses = [trainer.train_step().item() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------------------------------------
# As opções


def test_config_file_then_command_line(tmp_path):
    path = tmp_path / "meu.py"
    path.write_text(
        "n_layer = 3  # comentário\nlearning_rate = 1\nbias = False\ndataset = 'livros'\n"
    )
    config = read_options([str(path), "--n_layer=5", "--dropout", "0.5", "--compile=False"])
    assert (config.n_layer, config.dropout, config.learning_rate) == (5, 0.5, 1.0)
    assert (config.bias, config.compile, config.dataset) == (False, False, "livros")
    assert config.out_dir == "out/meu"
    assert read_options([str(path), "--out_dir=out/x"]).out_dir == "out/x"


@pytest.mark.parametrize(
    "content, words",
    [
        ("n_layer = 2\nn_layr = 3\n", ["--n_layr=3", "Seria n_layer?"]),
        ("n_layer = 'três'\n", ["--n_layer", "'três' não é do tipo int"]),
        ("n_layer = 2.0\n", ["--n_layer", "int"]),
        ("n_layer = True\n", ["--n_layer", "int"]),
        ("compile = 1\n", ["--compile", "'1' não é True nem False"]),
        ("n_layer = 3\nimport os\n", ["linha 2", "n_layer = 4"]),
        ("n_layer = __import__('os').system('touch invadido')\n", ["linha 1"]),
        ("n_layer = batch_size = 3\n", ["linha 1"]),
        ("n_layer, n_head = 3, 4\n", ["linha 1"]),
        ("n_head = 3\nn_layer == \n", ["linha 2"]),
        ("n_head = 3\nn_embd = 16\n", ["n_embd = 16", "n_head = 3"]),
        ("n_layer = 0\n", ["n_layer = 0"]),
        ("learning_rate = -1.0\n", ["learning_rate"]),
        ("dropout = 1.0\n", ["dropout"]),
        ("optimizer = 'sgd'\n", ["sgd", "adamw", "muon"]),
        ("dtype = 'int8'\n", ["int8"]),
        ("device = 'gpu'\n", ["gpu"]),
        ("block_size = 100_000\n", ["100000", "train.bin"]),
        ("dataset = 'outro'\n", ["outro", "prepare.py"]),
    ],
)
def test_bad_config_file(content, words, workdir):
    (workdir / "ruim.py").write_text(content, encoding="utf-8")
    result = run_main("train.py", "ruim.py", cwd=workdir, check=False)
    assert_short_error(result, *words)
    assert not (workdir / "invadido").exists() and not (workdir / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--batchsize=3"], ["--batchsize", "Seria batch_size?"]),
        (["--batch_size=dois"], ["--batch_size", "'dois'", "int"]),
        (["--bias=sim"], ["--bias", "'sim' não é True nem False"]),
        (["--bias"], ["--bias", "falta o valor"]),
    ],
)
def test_bad_command_line(arguments, words, workdir):
    result = run_main("train.py", *arguments, cwd=workdir, check=False)
    assert_short_error(result, "erro:", *words, code=2)


def test_missing_files(tmp_path):
    result = run_script("train.py", *TOY, cwd=tmp_path, check=False)
    assert_short_error(result, "data", "python prepare.py")
    result = run_main("train.py", "config/nada.py", cwd=tmp_path, check=False)
    assert_short_error(result, "config/nada.py")


def test_help_lists_every_option_with_meaning_and_default(tmp_path):
    output = " ".join(run_main("train.py", "--help", cwd=tmp_path).stdout.split())
    for name, default in vars(Config()).items():
        assert re.search(
            rf"--{name} (int|float|str|bool) \S.{{9,}}? \[{re.escape(str(default))}\]", output
        ), name


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_is_valid_and_explained(path):
    read_options([str(path)])
    for line in path.read_text(encoding="utf-8").splitlines():
        assert " = " not in line.partition("#")[0] or "# " in line, f"sem explicação: {line}"


# ------------------------------------------------------------------------------------------------
# Continuar, guardar, avaliar


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer=adamw"],
        ["--optimizer=muon", "--dropout=0.2", "--gradient_accumulation_steps=2"],
    ],
)
def test_continuing_equals_never_stopping(workdir, options):
    options += ["--lr_decay_iters=20", "--eval_interval=5"]
    run_toy(workdir, *options, "--max_iters=20", out="out/direto")
    run_toy(workdir, *options, "--max_iters=10", out="out/partes")
    output = run_toy(workdir, *options, "--max_iters=20", out="out/partes").stdout
    assert "Continuo" in output and "passo 10" in output
    assert "Mudou desde a última vez: max_iters, de 10 para 20." in output
    straight, parts = (
        read_checkpoint(workdir / "out" / name / "last.pt") for name in ("direto", "partes")
    )
    for key in ("model", "optimizers", "scaler", "step", "best_val_loss"):
        assert same_tensors(straight[key], parts[key]), key
    assert log_rows(workdir / "out/direto") == log_rows(workdir / "out/partes")


def test_the_chosen_precision_is_kept_and_its_change_is_told(workdir):
    run_toy(workdir, "--dtype=auto", "--max_iters=2")
    chosen = read_checkpoint(workdir / "out/t/last.pt")["config"]["dtype"]
    assert chosen == str(choose_dtype(torch.device("cpu")))[6:]
    other = "float32" if chosen == "bfloat16" else "bfloat16"
    output = run_toy(workdir, f"--dtype={other}", "--max_iters=4").stdout
    assert f"dtype, de '{chosen}' para '{other}'" in output


def test_evaluating_and_showing_change_nothing_in_the_training(workdir):
    results = []
    for options in (
        ["--eval_interval=1", "--log_interval=1", "--sample_prompt=Era"],
        ["--eval_interval=100", "--log_interval=100"],
    ):
        run_toy(workdir, "--max_iters=6", "--dropout=0.2", *options, out=f"out/{len(results)}")
        results.append(read_checkpoint(workdir / f"out/{len(results)}/last.pt"))
    assert same_tensors(results[0]["model"], results[1]["model"])


def test_settings_that_may_change_take_effect(workdir):
    run_toy(workdir, "--max_iters=2")
    trainer = toy_trainer(
        "--max_iters=9",
        "--learning_rate=0.5",
        "--weight_decay=0.7",
        "--decay_lr=False",
        "--eval_interval=3",
        "--batch_size=2",
        "--gradient_accumulation_steps=2",
    )
    trainer.train_step()
    (optimizer,) = trainer.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]


def test_finished_run_says_so_and_touches_nothing(workdir):
    first = run_toy(workdir, "--max_iters=4").stdout
    assert "python sample.py --out_dir=out/t" in first
    before = {file: file.stat().st_mtime_ns for file in (workdir / "out/t").iterdir()}
    output = run_toy(workdir, "--max_iters=4").stdout
    assert "já terminou, com 4 passos" in output and "--max_iters=8" in output
    assert before == {file: file.stat().st_mtime_ns for file in (workdir / "out/t").iterdir()}


def test_restart_keeps_the_old_run(workdir):
    run_toy(workdir, "--max_iters=2")
    old = (workdir / "out/t/last.pt").read_bytes()
    for number in (1, 2):
        output = run_toy(workdir, "--max_iters=2", "--restart=True").stdout
        assert f"out/t.{number}" in output and "passo 0 " in output
    assert (workdir / "out/t.1/last.pt").read_bytes() == old


def test_another_run_in_the_same_folder_is_refused(workdir):
    run_toy(workdir, "--max_iters=2")
    before = (workdir / "out/t/last.pt").read_bytes()
    result = run_toy(workdir, "--n_embd=32", "--seed=5", "--batch_size=8", check=False)
    assert_short_error(
        result,
        "n_embd: era 16, agora é 32",
        "seed: era 1337, agora é 5",
        "era 4, agora é 8",
        "--out_dir=",
        "--restart=True",
    )
    run_main("prepare.py", "--vocab_size=300", cwd=workdir)
    assert_short_error(run_toy(workdir, check=False), "vocabulário: era", "train.bin: era")
    assert (workdir / "out/t/last.pt").read_bytes() == before


def test_init_from(workdir):
    assert_short_error(
        run_toy(workdir, "--init_from=resume", check=False), "Não há treino a continuar"
    )
    run_toy(workdir, "--max_iters=10", out="out/a")
    output = run_toy(workdir, "--max_iters=1", "--init_from=out/a/best.pt", out="out/b").stdout
    best = read_checkpoint(workdir / "out/a/best.pt")
    assert f"validação {best['val_loss']:.3f}" in output.split("passo 0 ")[1]
    result = run_toy(workdir, "--n_embd=32", "--init_from=out/a/best.pt", out="out/c", check=False)
    assert_short_error(result, "out/a/best.pt", "formato")


def test_checkpoints_hold_what_they_promise(workdir):
    run_toy(workdir, "--max_iters=6", "--eval_interval=2", "--optimizer=muon")
    last, best = (read_checkpoint(workdir / "out/t" / name) for name in ("last.pt", "best.pt"))
    assert {
        "model",
        "model_config",
        "tokenizer",
        "config",
        "optimizers",
        "scaler",
        "step",
        "fingerprint",
    } <= last.keys()
    assert {"model", "model_config", "tokenizer"} <= best.keys() and "optimizers" not in best
    rows = log_rows(workdir / "out/t")
    assert rows[0] == ["step", "tokens", "lr", "train_loss", "val_loss", "val_bpb"]
    assert [row[0] for row in rows[1:]] == ["0", "2", "4", "6"]
    losses = [float(row[4]) for row in rows[1:]]
    assert best["val_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert [row[1] for row in rows[1:]] == ["0", "128", "256", "384"]  # 4 × 16 tokens por passo


def test_best_stays_the_best_when_later_losses_are_worse(workdir):
    trainer = toy_trainer()
    losses = iter([3.0, 2.0, 2.5])
    trainer.evaluate = lambda: (1.0, loss := next(losses), loss)
    for trainer.step in range(3):
        trainer.log_evaluation()
    best = read_checkpoint(trainer.out / "best.pt")
    assert (best["step"], best["val_loss"]) == (1, 2.0)


def test_bits_per_byte(workdir):
    trainer = toy_trainer()
    _, val_loss, bits = trainer.evaluate()
    val = np.fromfile(workdir / "data/contos/val.bin", dtype="<u2")
    text = trainer.encoding.decode(val[val != trainer.encoding.eot_token])
    assert bits == pytest.approx(val_loss / math.log(2) * len(val) / len(text.encode()))


def test_evaluation_is_the_mean_over_the_windows(workdir):
    trainer = toy_trainer("--eval_iters=1000", "--batch_size=7")
    val = torch.from_numpy(
        np.fromfile(workdir / "data/contos/val.bin", dtype="<u2").astype(np.int64)
    )
    losses = []
    for start in range(0, len(val) - 16, 16):
        with torch.no_grad():
            losses.append(
                trainer.model.eval()(
                    val[None, start : start + 16], val[None, start + 1 : start + 17]
                )[1]
            )
    assert trainer.evaluate()[1] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert trainer.evaluate() == trainer.evaluate()


def test_eval_only(workdir):
    run_toy(workdir, "--max_iters=4")
    before = {file: file.stat().st_mtime_ns for file in (workdir / "out/t").iterdir()}
    output = run_toy(workdir, "--eval_only=True").stdout
    last_row = log_rows(workdir / "out/t")[-1]
    assert f"validação {last_row[4]} | {last_row[5]} bits por byte" in output
    assert before == {file: file.stat().st_mtime_ns for file in (workdir / "out/t").iterdir()}


def test_it_learns_and_says_what_it_does(workdir):
    output = run_toy(
        workdir, "--max_iters=60", "--eval_interval=30", "--optimizer=muon", "--bias=False"
    ).stdout
    for words in (
        "1 × cpu, contas em float32",
        "parâmetros",
        "ln(400) = 5.99",
        "tokens/s",
        "faltam",
        "bits por byte",
        "    O gato",
        "loss de validação, do começo ao fim: █",
        "python sample.py",
    ):
        assert words in output
    losses = [float(row[4]) for row in log_rows(workdir / "out/t")[1:]]
    assert abs(losses[0] - math.log(400)) < 0.2 and losses[-1] < losses[0] - 1


def test_progress_is_one_moving_line_in_a_terminal(workdir):
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            *TOY,
            "--max_iters=20",
            "--log_interval=1",
            "--out_dir=out/t",
        ],
        cwd=workdir,
        stdout=writer,
        stderr=writer,
        stdin=subprocess.DEVNULL,
    )
    os.close(writer)
    output = b""
    try:
        while chunk := os.read(reader, 4096):
            output += chunk
    except OSError:  # o outro lado fechou
        pass
    assert process.wait(60) == 0
    lines = output.decode().split("\n")
    moving = [line for line in lines if line.count("tokens/s") > 1]
    assert len(moving) == 1 and moving[0].count("\r") >= 20


def pretend_cuda(trainer):
    """Faz o treino achar que a CPU é cuda, onde a compilação acontece."""

    class Device(str):
        type = "cuda"

    trainer.device = Device("cpu")


def test_compiling_falls_back_to_the_model_itself(workdir, monkeypatch, capsys):
    trainer = toy_trainer()

    def broken(model):
        def call(*arguments):
            raise RuntimeError("sem compilador")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    pretend_cuda(trainer)
    trainer.compile()
    assert trainer.forward is trainer.parallel is trainer.model
    assert "RuntimeError" in capsys.readouterr().out


def test_compiled_model_trains_the_same_and_saves_the_same_names(workdir, monkeypatch):
    plain, compiled = toy_trainer(), toy_trainer()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    pretend_cuda(compiled)
    compiled.compile()
    assert compiled.forward is not compiled.model
    for _ in range(3):
        plain.train_step(), compiled.train_step()
    assert (weights(plain) - weights(compiled)).abs().max() < 1e-4
    compiled.save_last()
    saved = read_checkpoint(compiled.out / "last.pt")
    assert saved["model"].keys() == plain.model.state_dict().keys()


def test_sparkline_and_duration():
    assert train.sparkline([3, 2, 1]) == "█▅▁"
    assert train.sparkline([5]) == "▁"
    assert train.duration(200) == "3min20s"
    assert train.duration(3725) == "1h02min"
