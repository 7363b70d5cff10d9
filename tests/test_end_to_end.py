"""Os três comandos do README, um depois do outro, com o texto e a receita de verdade."""

import csv

from conftest import ROOT, run_script


def test_from_text_to_text(tmp_path):
    assert "data/contos" in run_script("prepare.py", cwd=tmp_path).stdout
    output = run_script("train.py", ROOT / "config/tiny.py", "--max_iters=20", "--eval_interval=10",
                        "--warmup_iters=5", "--eval_iters=2", cwd=tmp_path).stdout
    assert "parâmetros" in output and "python sample.py --out_dir=out/tiny" in output
    with open(tmp_path / "out/tiny/log.csv", encoding="utf-8") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3 and abs(losses[0] - 8.3) < 0.2 and losses[-1] < 6.5
    result = run_script("sample.py", "--start", "O gato", "--max_new_tokens=30", cwd=tmp_path)
    assert result.stdout.startswith("O gato") and len(result.stdout) > 20
