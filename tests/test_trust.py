"""O treino em que se pode confiar: continuar, paradas, quedas, arquivos estragados, processos."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT, TOY, assert_short_error, run_main
from test_train import compare_runs, log_rows, read, run_toy, same

import train
from model import read_checkpoint


def start(cwd, *options, out="out/t", command=(sys.executable,), **settings):
    """Começa um treino de verdade, noutro processo, com a saída num cano."""
    return subprocess.Popen(
        [*command, ROOT / "train.py", *TOY, "--log_interval=1", f"--out_dir={out}", *options],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"}, **settings)


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


def test_continuing_says_so_and_takes_the_new_settings(workdir):
    run_toy(workdir, "--max_iters=4", "--dropout=0.1")
    output = run_toy(workdir, "--max_iters=4", "--dropout=0.1").stdout
    assert "terminou, com 4 passos" in output and "max_iters" in output
    before = {file: file.stat().st_mtime_ns for file in (workdir / "out/t").iterdir()}
    run_toy(workdir, "--max_iters=4", "--dropout=0.1")
    assert before == {file: file.stat().st_mtime_ns for file in (workdir / "out/t").iterdir()}
    (workdir / "out/t").rename(workdir / "out/mudou")
    with open(workdir / "out/mudou/log.csv", "a", encoding="utf-8") as file:
        file.write("\nanotação minha; 3\n")
    output = run_toy(workdir, "--max_iters=6", "--learning_rate=0.5", "--min_lr=0.5",
                     "--batch_size=2", "--weight_decay=0.7", "--gradient_accumulation_steps=2",
                     out="out/mudou").stdout
    for words in ("Continuo out/mudou/last.pt do passo 4.", "max_iters, de 4 para 6",
                  "dropout, de 0.1", "batch_size, de 4 para 2", "weight_decay, de 0.1 para 0.7"):
        assert words in output
    assert [row[0] for row in log_rows(workdir / "out/mudou")] == ["step", "0", "4", "6"]
    assert read("out/mudou/last.pt")["log"][-1][3] == 1.0  # a taxa não desce: min_lr é ela mesma


def test_another_run_in_the_same_folder_is_refused(workdir):
    run_toy(workdir, "--max_iters=2")
    before = (workdir / "out/t/last.pt").read_bytes()
    result = run_toy(workdir, "--n_embd=32", "--seed=5", "--batch_size=8", check=False)
    assert_short_error(result, "n_embd (era 16, agora é 32)", "seed (era 1337, agora é 5)",
                       "era 64, agora é 128", "--out_dir=")
    other = ["--input=data/contos/vocab.tiktoken", "--name=contos", "--vocab_size=300"]
    run_main("prepare.py", *other, cwd=workdir)
    assert run_toy(workdir, check=False).returncode == 1
    assert (workdir / "out/t/last.pt").read_bytes() == before


def test_a_checkpoint_of_an_earlier_version(workdir):
    run_toy(workdir, "--max_iters=2")
    last = torch.load("out/t/last.pt", weights_only=True)
    last["config"].pop("grad_clip")
    torch.save(last, "out/t/last.pt")
    assert "do passo 2" in run_toy(workdir, "--max_iters=3").stdout
    last.pop("optimizers")
    torch.save(last, "out/t/last.pt")
    assert_short_error(run_toy(workdir, check=False), "out/t/last.pt", "falta optimizers")
    os.remove("out/t/last.pt")  # como se caísse entre o primeiro best.pt e o primeiro last.pt
    assert "passo 0 " in run_toy(workdir, "--max_iters=2").stdout


LONG = ["--max_iters=90", "--eval_interval=40", "--save_interval=15", "--dropout=0.1"]


@pytest.mark.parametrize("options, number, code", [
    (["--optimizer=adamw", "--gradient_accumulation_steps=2"], signal.SIGTERM, 143),
    (["--optimizer=muon"], signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_continues_exactly(workdir, options, number, code):
    process = start(workdir, *LONG, *options)
    wait_for_step(process, 10)
    process.send_signal(number)
    result, output = finish(process)
    assert result == code
    assert re.search(r"Parei no passo \d+, guardado em out/t/last.pt. A mesma linha cont", output)
    stopped = read("out/t/last.pt")["step"]
    assert 10 <= stopped < 90
    output = run_toy(workdir, *LONG, *options).stdout
    assert f"Continuo out/t/last.pt do passo {stopped}." in output
    run_toy(workdir, *LONG, *options, out="out/direto")
    compare_runs("out/t", "out/direto")


def test_killed_three_times_it_loses_little_and_ends_the_same(workdir):
    moments, saved = random.Random(0), 0
    for _ in range(3):
        process = start(workdir, *LONG)
        text = wait_for_step(process, saved + 1 + moments.randrange(18))
        time.sleep(moments.random() * 0.03)
        process.kill()
        process.wait()
        reached = int(re.findall(r"passo (\d+)/", text + process.stdout.read())[-1])
        saved = read("out/t/last.pt")["step"]
        assert reached - saved <= 15
    assert f"do passo {saved}" in run_toy(workdir, *LONG).stdout
    run_toy(workdir, *LONG, out="out/direto")
    compare_runs("out/t", "out/direto")
    assert {file.name for file in (workdir / "out/t").iterdir()} == {
        "last.pt", "best.pt", "log.csv", ".lock"}


def test_two_runs_in_the_same_folder(workdir):
    first = start(workdir, "--max_iters=100000")
    wait_for_step(first, 3)
    assert_short_error(run_toy(workdir, "--max_iters=5", check=False), "Outro treino está usando")
    first.kill()
    first.wait()
    run_toy(workdir, "--max_iters=1")


def test_no_room_to_save(workdir):
    run_toy(workdir, "--max_iters=2")
    before = (workdir / "out/t/last.pt").read_bytes()
    limit = len(before) * 3 // 4
    result, output = finish(start(workdir, "--max_iters=4", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit))))
    assert result == 1 and "Traceback" not in output
    assert "Não consegui gravar out/t/last.pt" in output
    assert (workdir / "out/t/last.pt").read_bytes() == before
    read_checkpoint("out/t/best.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch invadido",)


def test_a_pickle_that_would_run_code(workdir, monkeypatch):
    run_toy(workdir, "--max_iters=1")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": {}, "model_config": {}, "step": Evil()}, "out/t/last.pt")
    assert_short_error(run_toy(workdir, "--max_iters=3", check=False), "out/t/last.pt")
    assert not (workdir / "invadido").exists()


def test_cut_anywhere_or_one_flipped_bit(workdir):
    """Recusado, ou lido idêntico (os bits de enchimento do formato): nunca diferente."""
    run_toy(workdir, "--max_iters=2")
    path, bits, refused = workdir / "out/t/last.pt", random.Random(0), 0
    whole, expected = path.read_bytes(), read(path)
    for size in [*bits.sample(range(len(whole)), 20), 0, 1, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(SystemExit, match="last.pt está danificado"):
            read_checkpoint(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        directory, starts = archive.start_dir, [info.header_offset for info in archive.infolist()]
    places = bits.sample(range(len(whole)), 100)  # em qualquer lugar
    for begin in (*bits.sample(starts, 3), directory, len(whole) - 22):
        places += range(begin, min(begin + 80, len(whole)))  # e em todos os bytes dos cabeçalhos
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bits.randrange(8)
        path.write_bytes(flipped)
        try:
            contents = read(path)
        except SystemExit:
            refused += 1
        else:
            assert same(contents, expected), f"byte {place}"
    assert refused > len(places) / 3


@pytest.mark.parametrize("name, change, word", [
    ("train.bin", lambda data: b"", "0 bytes"), ("train.bin", lambda data: data[:-1], "tokens"),
    ("train.bin", lambda data: data + data, "tokens"), ("val.bin", None, "0 bytes"),
    ("meta.json", lambda data: b"", ""), ("meta.json", lambda data: data[: len(data) // 2], ""),
    ("vocab.tiktoken", lambda data: data[:99], ""), ("vocab.tiktoken", None, ""),
    ("vocab.tiktoken", lambda data: data[: data.index(b"\n") + 1], "")])
def test_damaged_data(workdir, name, change, word):
    path = workdir / "data/contos" / name
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    assert_short_error(run_toy(workdir, check=False), "data/contos", "prepare.py", word)
    assert not (workdir / "out").exists()


# ------------------------------------------------------------------------------------------------
# Vários processos

TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_train_as_one(workdir, monkeypatch):
    options = ["--max_iters=12", "--eval_interval=4", "--gradient_accumulation_steps=4",
               "--dropout=0.1", "--grad_clip=0", "--optimizer=muon", "--eval_iters=9"]
    result, output = finish(start(workdir, *options, out="out/dois", command=TWO))
    assert result == 0 and "2 × cpu" in output and output.count("passo 12/12") == 1, output
    run_toy(workdir, *options, out="out/um")
    one, two = (read(f"out/{name}/last.pt") for name in ("um", "dois"))
    for a, b in zip(log_rows(workdir / "out/um")[1:], log_rows(workdir / "out/dois")[1:]):
        assert list(map(float, a)) == pytest.approx(list(map(float, b)), abs=1e-4)
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().max() < 1e-3, name
    # a média dos gradientes mostra a escala deles, que Muon e AdamW não deixam ver nos pesos
    for a, b in zip(one["optimizers"][0].values(), two["optimizers"][0].values()):
        assert torch.allclose(a["momentum"], b["momentum"], rtol=0.05, atol=1e-4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_toy(workdir, "--gradient_accumulation_steps=3", check=False)
    assert_short_error(result, "não se reparte por 2 processos")


def test_torchrun_asked_to_stop_saves(workdir):
    options = ["--max_iters=100000", "--gradient_accumulation_steps=2", "--save_interval=100000"]
    process = start(workdir, *options, command=TWO)
    wait_for_step(process, 10)
    process.send_signal(signal.SIGTERM)
    result, output = finish(process)
    assert result != 0 and "Parei no passo" in output
    assert read("out/t/last.pt")["step"] >= 10


def test_each_process_takes_its_card_before_any_tensor(workdir, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.append(number))
    monkeypatch.setattr(train, "choose_device", lambda name: calls.append("tensor") or 1 / 0)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZeroDivisionError):
        run_toy(workdir, "--device=cuda")
    assert calls == [1, "tensor"]
