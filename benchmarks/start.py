"""Where does the contrast of a small batch start? First loss over that of a model that knows nothing, for batches of 8 to 512
scans of patients that no model has trained on, and for several rules of scale exp(t) and bias b.

    python benchmarks/start.py --run runs/tiny      a folder of tools/train_tiny.py or `ctvlm demo`; a minute

Two models: `fresh` as training begins (the demo's, its scan encoder started from features, its text encoder taught which
sentences mean the same), and `shipped`, the one in the package, for those who train it further. Writes
benchmarks/results/start.json, which chapter 12 shows.
"""
import argparse, math
from pathlib import Path

import torch, torch.nn.functional as F

from ablation import fresh, prepared
from ctvlm.data import Batches
from ctvlm.effective_batch import Objective, scan_part, text_parts, unpadded
from ctvlm.model import ready_model
from ctvlm.recipe import fitted_bias
from ctvlm.siglip import siglip_loss
from runs import phantoms_of, write_json

SIZES = 8, 16, 32, 64, 128, 256, 512


@torch.inference_mode()
def embeddings(model, studies, store):
    "Unit vectors of scans and of their reports, `(N, P)` each."
    device, objective, scans, reports = torch.device("cpu"), Objective(localization=0.), [], []
    model.eval()
    for b in Batches(studies, store, model.processor.tokenizer, 16, training=False):
        scans.append(scan_part(model, b, objective, 1, {}, device)(False)[0]["image"])
        reports += unpadded(b["report_ids"], b["report_mask"])
    parts, where = text_parts(model, reports, objective.text_tokens, "text", device)
    texts = torch.cat([part(False)[0]["text"] for part in parts])[where]
    return [F.normalize(z.float(), dim=-1) for z in (torch.cat(scans), texts)]


def rules(cosines, model): # name -> scale and bias, for one batch
    scale = math.exp(model.t.item())
    return {"published: 10, -10": (10., -10.), "model's scale, -ln N": (scale, -math.log(len(cosines))),
            "model's scale, fit": (scale, fitted_bias(cosines, scale)), "as the model is": (scale, model.b.item())}


def measured(name, model, x, y, seed=0):
    "A row per size of a batch and rule: first loss over the uninformed one, mean and largest of up to 20 batches."
    order, rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)), []
    for N in SIZES:
        if N > len(x): break
        found = {}
        for part in order[:len(x) // N * N].view(-1, N)[:20]:
            uninformed = math.log(N) + (N - 1) * math.log(N / (N - 1))
            for rule, (scale, bias) in rules(x[part] @ y[part].T, model).items():
                loss = siglip_loss(x[part], y[part], torch.tensor(scale).log(), torch.tensor(bias))
                found.setdefault(rule, []).append(float(loss) / uninformed)
        rows += [{"model": name, "N": N, "rule": rule, "batches": len(v), "mean": sum(v) / len(v), "largest": max(v)} for rule, v in found.items()]
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", type=Path, default=Path("runs/tiny"))
    ap.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"start.json")
    args = ap.parse_args()
    store, studies, _, _, features = prepared(args.run, None)
    unseen = studies[studies.split != "train"]
    rows, about = [], {}
    for name, model in (("fresh", fresh(studies, features, 0)), ("shipped", ready_model("cpu"))):
        x, y = embeddings(model, unseen, store)
        about[name] = {"scale": math.exp(model.t.item()), "bias": model.b.item(), "mean cosine": float((x @ y.T).mean()),
                       "weights": model.fingerprint()}
        rows += measured(name, model, x, y)
    write_json(args.output, {"patients": int(unseen.patient.nunique()), "phantoms": phantoms_of(studies), "models": about, "rows": rows})


if __name__ == "__main__": main()
