"""O treino em que se pode confiar: paradas, quedas, arquivos estragados, vários processos."""

import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, assert_short_error, run_main
from test_train import log_rows, run_toy, same_tensors, toy_trainer, weights

import train
from model import read_checkpoint
from prepare import whole_file


def start(cwd, *options, out="out/t", command=(sys.executable,), **settings):
    """Começa um treino de verdade, noutro processo, com a saída num cano."""
    return subprocess.Popen(
        [*command, ROOT / "train.py", *TOY, "--log_interval=1", f"--out_dir={out}", *options],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **settings,
    )


def wait_for_step(process, step):
    """Lê a saída até aparecer o progresso de um passo; devolve o que foi lido."""
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith(f"passo {step}/"):
            return text
    raise AssertionError(f"o passo {step} não apareceu:\n{text}")


def finish(process):
    output = process.stdout.read()
    return process.wait(60), output


# ------------------------------------------------------------------------------------------------
# Parar e continuar

LONG = ["--max_iters=120", "--eval_interval=40", "--save_interval=15", "--dropout=0.1"]


@pytest.mark.parametrize(
    "options, number, code",
    [
        (["--optimizer=adamw", "--gradient_accumulation_steps=2"], signal.SIGTERM, 143),
        (["--optimizer=muon"], signal.SIGINT, 130),
    ],
)
def test_asked_to_stop_it_saves_and_continues_exactly(workdir, options, number, code):
    process = start(workdir, *LONG, *options)
    wait_for_step(process, 10)
    process.send_signal(number)
    result, output = finish(process)
    assert result == code
    assert re.search(
        r"Parei no passo \d+, guardado em out/t/last.pt. A mesma linha continua", output
    )
    stopped = read_checkpoint(workdir / "out/t/last.pt")["step"]
    assert 10 <= stopped < 120
    result, output = finish(start(workdir, *LONG, *options))
    assert result == 0 and f"Continuo out/t/last.pt do passo {stopped}." in output
    result, _ = finish(start(workdir, *LONG, *options, out="out/direto"))
    compare_runs(workdir / "out/t", workdir / "out/direto")


def compare_runs(one, other):
    """Confere que dois treinos são o mesmo, bit a bit."""
    a, b = (read_checkpoint(folder / "last.pt") for folder in (one, other))
    for key in ("model", "optimizers", "scaler", "step", "best_val_loss", "fingerprint"):
        assert same_tensors(a[key], b[key]), key
    assert log_rows(one) == log_rows(other)


def test_killed_five_times_it_loses_little_and_ends_the_same(workdir):
    moments = random.Random(0)
    saved = 0
    for kill in range(5):
        process = start(workdir, *LONG)
        text = wait_for_step(process, saved + 1 + moments.randrange(18))
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.wait()
        reached = int(re.findall(r"passo (\d+)/", text + process.stdout.read())[-1])
        saved = read_checkpoint(workdir / "out/t/last.pt")["step"]
        assert reached - saved <= 15
    result, output = finish(start(workdir, *LONG))
    assert result == 0 and f"do passo {saved}" in output
    finish(start(workdir, *LONG, out="out/direto"))
    compare_runs(workdir / "out/t", workdir / "out/direto")
    assert not list((workdir / "out/t").glob(".*"))


def test_killed_while_it_saves(tmp_path):
    """Um processo que só grava, morto em 40 momentos: o arquivo está sempre inteiro."""
    path = tmp_path / "last.pt"
    moments = random.Random(0)
    before, written = 0, None

    def time_of_writing():
        return path.stat().st_mtime_ns if path.exists() else None

    for _ in range(40):
        child = os.fork()
        if child == 0:
            number = before
            while True:
                number += 1
                with whole_file(path) as file:
                    contents = {"model": {"x": torch.from_numpy(np.full(100_000, number))}}
                    torch.save(contents | {"model_config": {}, "step": number}, file)
        while time_of_writing() == written:  # ao menos uma gravação inteira, e parte de outra
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # ainda vive: não se espera em vão
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoint, written = read_checkpoint(path), time_of_writing()
        assert checkpoint["step"] > before
        assert (checkpoint["model"]["x"] == checkpoint["step"]).all()
        before = checkpoint["step"]


def test_leftovers_of_a_killed_run_are_cleaned_up(workdir):
    run_toy(workdir, "--max_iters=2")
    (workdir / "out/t/.last.pt.tmp").write_bytes(b"pela metade")
    (workdir / "out/t/.best.pt.tmp").write_bytes(b"pela metade")
    run_toy(workdir, "--max_iters=3")
    assert {file.name for file in (workdir / "out/t").iterdir()} == {
        "last.pt",
        "best.pt",
        "log.csv",
    }


def test_a_second_ctrl_c_ends_at_once(workdir):
    # passos de muitos segundos: o primeiro pedido espera, o segundo não
    process = start(workdir, "--max_iters=1000", "--gradient_accumulation_steps=20000")
    for line in process.stdout:
        if line.startswith("    O gato"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    assert read_checkpoint(workdir / "out/t/last.pt")["step"] == 0


def test_no_room_to_save(workdir):
    run_toy(workdir, "--max_iters=2", "--optimizer=adamw")
    before = (workdir / "out/t/last.pt").read_bytes()
    limit = len(before) * 3 // 4
    process = start(
        workdir,
        "--max_iters=4",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    result, output = finish(process)
    assert result == 1 and "Traceback" not in output
    assert "Não consegui gravar out/t/last.pt" in output
    assert (workdir / "out/t/last.pt").read_bytes() == before
    read_checkpoint(workdir / "out/t/best.pt")
    assert not list((workdir / "out/t").glob(".*"))


# ------------------------------------------------------------------------------------------------
# Checkpoints estragados


class Evil:
    def __reduce__(self):
        return os.system, ("touch invadido",)


@pytest.fixture
def finished(workdir):
    run_toy(workdir, "--max_iters=2")
    return workdir / "out/t/last.pt"


def test_truncated_anywhere(finished):
    whole = finished.read_bytes()
    sizes = random.Random(0).sample(range(len(whole)), 20) + [0, 1, len(whole) - 1]
    for size in sizes:
        finished.write_bytes(whole[:size])
        with pytest.raises(SystemExit, match="last.pt está danificado"):
            read_checkpoint(finished)


def test_damaged_checkpoint_offers_best(finished, workdir):
    finished.write_bytes(finished.read_bytes()[:-100])
    result = run_toy(workdir, "--max_iters=3", check=False)
    assert_short_error(result, "out/t/last.pt", "--init_from=out/t/best.pt", "--out_dir=")
    run_toy(workdir, "--max_iters=3", "--init_from=out/t/best.pt", out="out/novo")


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_a_pickle_that_would_run_code(finished, workdir, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.save({"model": {}, "model_config": {}, "step": Evil()}, finished)
    assert_short_error(run_toy(workdir, "--max_iters=3", check=False), "out/t/last.pt")
    assert not (workdir / "invadido").exists()


def test_one_flipped_bit_anywhere(finished):
    """Recusado, ou lido idêntico (os bits de enchimento do formato): nunca diferente."""
    whole = finished.read_bytes()
    expected = read_checkpoint(finished)
    with zipfile.ZipFile(finished) as archive:
        directory = archive.start_dir
        starts = [info.header_offset for info in archive.infolist()]
    bits = random.Random(0)
    places = bits.sample(range(len(whole)), 150)  # em qualquer lugar
    for begin in (*bits.sample(starts, 3), directory, directory + 60, len(whole) - 22):
        places += range(begin, min(begin + 80, len(whole)))  # e em todos os bytes dos cabeçalhos
    refused = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bits.randrange(8)
        finished.write_bytes(flipped)
        try:
            contents = read_checkpoint(finished)
        except SystemExit:
            refused += 1
        else:
            assert same_tensors(contents, expected), f"byte {place}"
    assert refused > len(places) / 2


# ------------------------------------------------------------------------------------------------
# Contas que deixam de ser números


def test_float16_gives_up_after_20_skips(workdir):
    trainer = toy_trainer("--dtype=float16")
    trainer.model.wte.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    for _ in range(19):
        trainer.train_step()
        trainer.log_evaluation()  # avaliar no meio não recomeça a contagem
    assert trainer.skipped == 19
    with pytest.raises(SystemExit, match="Passo 19: .*float32"):
        trainer.train_step()
    assert torch.equal(weights(trainer), before)


def test_a_diverging_run_keeps_the_last_good_checkpoint(workdir):
    result = run_toy(
        workdir,
        "--max_iters=60",
        "--learning_rate=1e9",
        "--grad_clip=0",
        "--save_interval=1000",
        check=False,
    )
    assert_short_error(result, "deixou de ser um número", "learning_rate", "out/t/last.pt")
    checkpoint = read_checkpoint(workdir / "out/t/last.pt")
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


# ------------------------------------------------------------------------------------------------
# Os dados, conferidos no começo


def damage(workdir, change):
    path = workdir / "data/contos/train.bin"
    path.write_bytes(change(path.read_bytes()))
    return run_toy(workdir, check=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda data: b"", ["0 bytes"]),
        (lambda data: data[:-1], ["bytes, e não", "tokens de 2 bytes"]),
        (lambda data: np.frombuffer(data, "<u2").astype("<u4").tobytes(), ["tokens de 2 bytes"]),
        (lambda data: b"\xff\xff" + data[2:], ["65535", "399"]),
        (lambda data: data[2:4] + data[:2] + data[4:], ["SHA-256"]),
    ],
)
def test_damaged_data(workdir, change, words):
    assert_short_error(damage(workdir, change), "data/contos/train.bin", "prepare.py", *words)
    assert not (workdir / "out").exists()


def test_missing_or_short_data(workdir):
    assert_short_error(run_toy(workdir, "--block_size=50000", check=False), "50000", "block_size")
    (workdir / "data/contos/val.bin").unlink()
    assert_short_error(run_toy(workdir, check=False), "data/contos/val.bin", "prepare.py")


# ------------------------------------------------------------------------------------------------
# Vários processos

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def test_two_processes_train_as_one(workdir):
    options = [
        "--max_iters=12",
        "--eval_interval=4",
        "--gradient_accumulation_steps=4",
        "--dropout=0.1",
        "--grad_clip=0",
        "--optimizer=muon",
        "--eval_iters=9",
    ]
    result, output = finish(
        start(workdir, *options, out="out/dois", command=(*TORCHRUN, "--nproc_per_node=2"))
    )
    assert result == 0, output
    assert "2 × cpu" in output and output.count("passo 12/12") == 1
    run_toy(workdir, *options, out="out/um")
    one, two = (read_checkpoint(workdir / name / "last.pt") for name in ("out/um", "out/dois"))
    for a, b in zip(log_rows(workdir / "out/um")[1:], log_rows(workdir / "out/dois")[1:]):
        assert a[:3] == b[:3]
        assert list(map(float, a[3:])) == pytest.approx(list(map(float, b[3:])), abs=1e-4)
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().max() < 1e-3, name
    # a média dos gradientes mostra a escala deles, que Muon e AdamW não deixam ver nos pesos
    for a, b in zip(one["optimizers"][0].values(), two["optimizers"][0].values()):
        assert torch.allclose(a["momentum"], b["momentum"], rtol=0.05, atol=1e-4)
    assert max(state["momentum"].abs().max() for state in one["optimizers"][0].values()) > 1e-3


def test_accumulation_must_be_shared_out_evenly(workdir):
    result, output = finish(
        start(workdir, "--gradient_accumulation_steps=3", command=(*TORCHRUN, "--nproc_per_node=2"))
    )
    assert (
        result == 1 and "gradient_accumulation_steps = 3 não se reparte por 2 processos" in output
    )


def test_torchrun_revives_a_killed_process(workdir):
    options = ["--max_iters=150", "--save_interval=5", "--gradient_accumulation_steps=2"]
    # restart não pode apagar o que os processos religados devem continuar
    command = (*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1")
    process = start(workdir, *options, "--restart=True", command=command)
    wait_for_step(process, 20)
    pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(pids.split()[-1]), signal.SIGKILL)
    result, output = finish(process)
    assert result == 0, output
    assert int(re.search(r"Continuo out/t/last.pt do passo (\d+)", output)[1]) >= 15
    assert read_checkpoint(workdir / "out/t/last.pt")["step"] == 150


def test_torchrun_asked_to_stop_saves(workdir):
    options = ["--max_iters=100000", "--gradient_accumulation_steps=2", "--save_interval=100000"]
    process = start(workdir, *options, command=(*TORCHRUN, "--nproc_per_node=2"))
    wait_for_step(process, 10)
    process.send_signal(signal.SIGTERM)
    result, output = finish(process)
    assert result != 0 and "Parei no passo" in output
    assert read_checkpoint(workdir / "out/t/last.pt")["step"] >= 10


# ------------------------------------------------------------------------------------------------
# Memória


@pytest.mark.parametrize(
    "shape",
    [
        ["--n_layer=1", "--n_embd=64", "--block_size=64", "--batch_size=6"],
        [
            "--n_embd=48",
            "--block_size=32",
            "--batch_size=3",
            "--dtype=bfloat16",
            "--optimizer=muon",
        ],
        ["--n_layer=3", "--n_embd=32", "--block_size=128", "--batch_size=8"],
    ],
)
def test_activations_are_what_autograd_saves(workdir, shape):
    trainer = toy_trainer(*shape)
    fixed, activations = trainer.memory()
    x, y = trainer.train_data.batch(0, trainer.config.batch_size)
    kept, own = {}, {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.autocast:
        _, loss = trainer.model(x, y)
    saved = sum(size for pointer, size in kept.items() if pointer not in own)
    logits = 2 * 4 * x.numel() * 400  # as notas e o gradiente delas vivem pouco, mas contam
    assert activations - logits == pytest.approx(saved, rel=0.15)
    loss.backward()
    trainer.compile()
    trainer.train_step()
    states = [t for o in trainer.optimizers for state in o.state.values() for t in state.values()]
    sizes = sum(p.nbytes for p in trainer.model.parameters()) * 2
    sizes += sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.dim())
    assert fixed == pytest.approx(sizes, rel=0.01)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--batch_size=12", "--gradient_accumulation_steps=2"],
            ["--batch_size=6", "--gradient_accumulation_steps=4"],
        ),
        (["--batch_size=9"], ["--batch_size=3", "--gradient_accumulation_steps=3"]),
        (["--batch_size=1"], ["block_size", "n_embd"]),
    ],
)
def test_out_of_memory_says_what_to_use_instead(workdir, monkeypatch, options, words):
    for fault in (
        lambda self: torch.empty(10**15),  # o erro da CPU, de verdade
        lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    ):
        monkeypatch.setattr(train.Trainer, "train_step", fault)
        assert_short_error(run_toy(workdir, *options, check=False), "Faltou memória", *words)


def test_other_runtime_errors_are_not_hidden(workdir, monkeypatch):
    def fault(self):
        raise RuntimeError("um defeito nosso")

    monkeypatch.setattr(train.Trainer, "train_step", fault)
    with pytest.raises(RuntimeError, match="um defeito nosso"):
        run_toy(workdir)


# ------------------------------------------------------------------------------------------------
# O que o treino diz


def test_says_when_the_model_begins_to_memorise(workdir, capsys):
    trainer = toy_trainer()
    losses = iter([(3.0, 3.0), (2.9, 3.1), (2.8, 3.2), (2.7, 3.3), (2.6, 3.4), (2.5, 3.3)])
    trainer.evaluate = lambda: (*next(losses), 1.0)
    said = []
    for trainer.step in range(6):
        trainer.log_evaluation()
        said.append("decorar" in capsys.readouterr().out)
    assert said == [False, False, False, True, False, False]


def test_says_what_changes_with_max_iters_and_with_the_batch(workdir):
    run_toy(workdir, "--max_iters=2", "--dropout=0.1")
    output = run_toy(
        workdir,
        "--max_iters=4",
        "--dropout=0.1",
        "--batch_size=2",
        "--gradient_accumulation_steps=2",
    ).stdout
    assert "As taxas acompanham max_iters" in output
    assert "o dropout sorteia" in output and "max_iters, de 2 para 4" in output


def test_a_moved_folder_continues(workdir):
    run_toy(workdir, "--max_iters=2")
    (workdir / "out/t").rename(workdir / "out/mudou")
    output = run_main("train.py", *TOY, "--out_dir=out/mudou", "--max_iters=4", cwd=workdir).stdout
    assert "Continuo out/mudou/last.pt do passo 2." in output


def test_what_existed_is_never_lost(workdir):
    run_toy(workdir, "--max_iters=4")
    best = (workdir / "out/t/best.pt").read_bytes()
    # pesos que deixaram de ser números não tomam o lugar dos bons
    last = (workdir / "out/t/last.pt").read_bytes()
    trainer = toy_trainer("--max_iters=8")
    with torch.no_grad():
        trainer.model.wte.weight[0, 0] = math.nan
    with pytest.raises(SystemExit, match="ficou como estava"):
        trainer.save_last()
    assert (workdir / "out/t/last.pt").read_bytes() == last
    # um restart que não pode dar certo não tira o treino do lugar
    options = ["--restart=True", "--n_head=3"]
    assert_short_error(run_toy(workdir, *options, check=False), "n_head = 3")
    assert (workdir / "out/t/last.pt").exists()
    # best.pt no lugar de last.pt, ou sem last.pt
    (workdir / "out/t/last.pt").write_bytes(best)
    assert_short_error(run_toy(workdir, check=False), "falta optimizers", "--init_from")
    (workdir / "out/t/last.pt").unlink()
    assert "out/t.1" in run_toy(workdir, "--max_iters=1").stdout
    assert (workdir / "out/t.1/best.pt").read_bytes() == best


def test_killed_between_the_first_two_files_it_starts_again(workdir):
    trainer = toy_trainer()
    trainer.log_evaluation()  # grava best.pt do passo 0, e cai antes do primeiro last.pt
    assert {file.name for file in trainer.out.iterdir()} == {"best.pt", "log.csv"}
    run_toy(workdir, "--max_iters=2")
    assert read_checkpoint(workdir / "out/t/last.pt")["step"] == 2


def test_init_from_another_vocabulary_is_refused(workdir):
    run_toy(workdir, "--max_iters=1")
    text = "Outro texto, com outras palavras e outra ordem delas. " * 200
    (workdir / "b.txt").write_text(text, encoding="utf-8")
    run_main("prepare.py", "--input", "b.txt", "--vocab_size=300", cwd=workdir)
    options = ["--dataset=b", "--init_from=out/t/best.pt"]
    assert_short_error(run_toy(workdir, *options, out="out/b", check=False), "outro vocabulário")


@pytest.mark.parametrize("name", ["meta.json", "vocab.tiktoken"])
@pytest.mark.parametrize("change", [lambda text: "", lambda text: text[: len(text) // 2]])
def test_damaged_description_of_the_data(workdir, name, change):
    path = workdir / "data/contos" / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert_short_error(run_toy(workdir, check=False), "data/contos", "prepare.py")


def test_the_log_is_made_anew_from_the_checkpoint(workdir):
    run_toy(workdir, "--max_iters=2")
    with open(workdir / "out/t/log.csv", "a", encoding="utf-8") as file:
        file.write("\nanotação minha; 3\n")
    run_toy(workdir, "--max_iters=4")
    assert [row[0] for row in log_rows(workdir / "out/t")] == ["step", "0", "2", "4"]
