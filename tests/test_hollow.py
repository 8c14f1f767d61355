"""Loading a model without its weights."""

import json
import subprocess
import sys

from tests.tiny_models import ROOT

LOAD = """
import json, resource, sys
from runtime.llama.hollow import HollowModel
from runtime.memory import peak_bytes
from runtime.llama.model_file import ModelFile
file = ModelFile.open(sys.argv[1])
faults, peak = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, peak_bytes()
model = HollowModel(file)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
names = sorted(model.weights)
model.free()
print(json.dumps({"faults": faults, "bytes": peak_bytes() - peak, "weights": names, "file": file.n_bytes}))
"""


def test_a_load_touches_no_pages_of_weights(tiny_model):
    """The model has more than 10,000 pages; llama.cpp's own structures take a few hundred."""
    path = tiny_model("llama:layers=4,dim=1024,ffn=2048,heads=8,vocab=512,ctx=512")
    done = subprocess.run([sys.executable, "-c", LOAD, path], cwd=ROOT, capture_output=True, text=True, check=True)
    load = json.loads(done.stdout)
    assert load["file"] > 40_000_000
    assert load["faults"] < 3000
    assert load["bytes"] < 10_000_000
    assert {"token_embd.weight", "blk.3.ffn_down.weight", "output_norm.weight"} <= set(load["weights"])
