"""O que todos os testes usam: rodar um dos programas, e um conjunto de dados pequeno já pronto."""

import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402

torch.set_num_threads(1)  # como nos treinos noutro processo: assim os bits são os mesmos

# um modelo de brinquedo, que treina em milissegundos
TOY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
       "--gradient_accumulation_steps=1", "--eval_iters=2", "--warmup_iters=2",
       "--learning_rate=1e-2", "--device=cpu", "--dtype=float32"]


def run_script(script, *arguments, cwd, check=True, **environment):
    """Roda `python script argumentos...` na pasta cwd, como faria uma pessoa."""
    result = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], cwd=cwd, capture_output=True,
        encoding="utf-8", stdin=subprocess.DEVNULL, timeout=200, env=os.environ | environment)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def run_main(script, *arguments, cwd, check=True):
    """O mesmo que run_script, mas neste processo: poupa o tempo de importar o torch de novo."""
    main = importlib.import_module(script.removesuffix(".py")).main
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = 0
    with chdir(cwd), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            prepare.run(lambda: main(list(map(str, arguments))))
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # o Python mostraria a mensagem e sairia com 1
                print(code, file=stderr)
                code = 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    texts = []
    for stream in (stdout, stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    if check:
        assert code in (0, None), "".join(texts)
    return subprocess.CompletedProcess([script, *arguments], code, *texts)


@contextmanager
def chdir(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def assert_short_error(result, *words):
    """Confere que um erro de quem usa termina em mensagem curta, sem traceback."""
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr.rpartition("uso:")[2] if result.returncode == 2 else result.stderr
    message = message[message.find("erro:") :] if "erro:" in message else message
    assert 0 < len(message) < 900
    for word in words:
        assert str(word) in message, result.stderr


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Uma pasta com data/contos/: as primeiras histórias, com um vocabulário de 400 tokens."""
    folder = tmp_path_factory.mktemp("toy")
    text = (ROOT / "data" / "contos.txt").read_text(encoding="utf-8")
    (folder / "contos.txt").write_text(text[:60_000], encoding="utf-8")
    run_main("prepare.py", "--input", "contos.txt", "--vocab_size=400", cwd=folder)
    return folder


@pytest.fixture
def workdir(toy_data, tmp_path, monkeypatch):
    """Uma cópia de toy_data só deste teste, como pasta atual."""
    shutil.copytree(toy_data / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path
