"""O que todos os testes usam: rodar um dos programas e um conjunto de dados pequeno, já preparado."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# um modelo de brinquedo, que treina em milissegundos
TOY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
       "--gradient_accumulation_steps=1", "--eval_iters=2", "--warmup_iters=2", "--learning_rate=1e-2",
       "--device=cpu", "--dtype=float32"]


def run_script(script, *arguments, cwd, check=True, **environment):
    """Roda `python script argumentos...` na pasta cwd, como faria uma pessoa."""
    result = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], cwd=cwd, capture_output=True,
        encoding="utf-8", stdin=subprocess.DEVNULL, timeout=200, env=os.environ | environment)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def assert_short_error(result, *words, code=1):
    """Confere que um erro de quem usa termina em mensagem curta, sem traceback."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert 0 < len(result.stderr) < 800
    for word in words:
        assert str(word) in result.stderr, result.stderr


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Uma pasta com data/contos/: as primeiras histórias do projeto, com 400 tokens."""
    folder = tmp_path_factory.mktemp("toy")
    text = (ROOT / "data" / "contos.txt").read_text(encoding="utf-8")
    (folder / "contos.txt").write_text(text[:60_000], encoding="utf-8")
    run_script("prepare.py", "--input", "contos.txt", "--vocab_size=400", cwd=folder)
    return folder


@pytest.fixture
def workdir(toy_data, tmp_path, monkeypatch):
    """Uma cópia de toy_data só deste teste, como pasta atual."""
    shutil.copytree(toy_data / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path
