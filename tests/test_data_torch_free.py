"""Readers, preprocessing and metrics leave torch unloaded."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import mdpd_deploy.data
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.load import load_task
from mdpd_deploy.data.preprocess import ImagePreprocess, TextPreprocess, load_preprocess
from mdpd_deploy.tasks.metrics import METRICS, compute

root = Path(sys.argv[1])
table = root / "a.csv"
table.write_text("text,label\\n" + "good film,1\\nbad film,0\\n" * 5)
(root / "hub").mkdir()
(root / "hub" / "train.csv").write_text(table.read_text())
for path in (str(table), f"hub:{root / 'hub'}"):
    for task in ("classify", "regress"):
        text = load_task(task, DataConfig(path=path), seed=0)
for name in ("cat", "dog"):
    (root / "pictures" / name).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (9, 9)).save(root / "pictures" / name / f"{i}.png")
pictures = load_task("classify", DataConfig(path=str(root / "pictures")), seed=0)
pictures = check_images(pictures, DataConfig())
digits = load_task("digits", DataConfig(), seed=0)

tokenizer = Tokenizer(WordLevel({"good": 0, "bad": 1, "film": 2, "?": 3}, unk_token="?"))
tokenizer.pre_tokenizer = Whitespace()
for preprocess, raws in [
    (TextPreprocess(tokenizer, ("input_ids", "attention_mask"), 8, 3), text.train.inputs),
    (ImagePreprocess((8, 8), (0.5,) * 3, (0.5,) * 3), pictures.train.inputs),
    (ImagePreprocess((8, 8), (0.5,) * 3, (0.5,) * 3), digits.train.inputs[:4]),
]:
    preprocess.save(root)
    assert load_preprocess(root)(raws)
compute(list(METRICS), np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 0]))
assert "torch" not in sys.modules, "torch was imported"
print("free")
"""


def test_the_data_room_does_not_import_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["free"]
