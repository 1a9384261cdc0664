"""The recipe of CONTRIBUTING.md, followed literally: the file of its code blocks and one line in the enum."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft

ROOT = Path(__file__).parents[2]
CHECK = """
import torch
from torch import nn
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, ScaleConfig, get_peft_model
from peft.cli import main

model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), ScaleConfig(target_modules=["0"], init_scale=2.0))
x = torch.randn(5, 4)
with model.disable_adapter():
    base = model(x)
assert torch.allclose(model(x), 2 * base)
model.save_pretrained("adapter")
plain = model.unload()
again = PeftModel.from_pretrained(plain, "adapter")
merged = again.merge_and_unload()
assert torch.allclose(merged(x), 2 * base) and type(merged[0]) is nn.Linear
assert "SCALE" in PEFT_TYPE_TO_CONFIG_MAPPING
main(["methods"])
"""


def test_the_recipe_works(tmp_path):
    package = tmp_path / "src" / "peft"
    shutil.copytree(Path(peft.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (package / "tuners" / "scale.py").write_text('"""Output scaling: an example."""\n\n' + "\n\n".join(blocks))
    types = package / "utils" / "peft_types.py"
    types.write_text(re.sub(r"( +)(DEFT = .*)", r'\1\2\n\1SCALE = "SCALE"', types.read_text()))
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^scale +layers +yes +Output scaling", done.stdout, re.MULTILINE)
