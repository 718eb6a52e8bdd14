"A tiny model and micro-batches of noise, for the tests of training."
import torch

from ctvlm.core import stable_rng
from ctvlm.model import CTVLMConfig, CTVLMModel

VOCAB, QUESTIONS = 48, 3


def model(seed=0, **changes):
    "A model small enough to train in a test; `adapters=dict(...)` brings dropout."
    torch.manual_seed(seed)
    sizes = dict(width=24, depth=2, heads=2, layer_scale=1.)
    text = dict(CTVLMConfig.tiny(VOCAB).text, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    return CTVLMModel(CTVLMConfig.tiny(VOCAB, **{**dict(window=(16, 16, 32), window_encoder=sizes, scan_encoder={**sizes, "rope_base": 100.}, text=text, head_widths=(24, 24, 16), projection_dim=16), **changes}))


def batch(scans, seed, windows=False):
    "A micro-batch of noise."
    g = torch.Generator().manual_seed(seed)
    grid = torch.randint(1, 3, (scans, 3), generator=g)
    N, S = int(grid.prod(1).sum()), scans + 1
    which = torch.randint(0, scans, (S,), generator=g)
    text = lambda n, L: (torch.randint(1, VOCAB, (n, L), generator=g), (torch.arange(L) < torch.randint(8, L + 1, (n, 1), generator=g)).long())
    out = dict(grid=grid, labels=torch.randint(-2, 2, (scans, QUESTIONS), generator=g), snippet_scan=which, snippet_bin=torch.rand(S, generator=g) * 8 * grid[which, 2] - 0.5)
    for name, (ids, mask) in (("report", text(scans, 24)), ("snippet", text(S, 9))): out |= {f"{name}_ids": ids, f"{name}_mask": mask}
    out["groups"] = torch.randint(0, 6, (scans, 2), generator=torch.Generator().manual_seed(seed))   # few reports, few patients
    if windows: return out | dict(windows=torch.rand(N, 1, 16, 16, 32, generator=g).half())
    return out | dict(cls=torch.randn(N, 24, generator=g).half(), depth_tokens=torch.randn(N, 8, 24, generator=g).half())


def prompts():
    g = torch.Generator().manual_seed(5)
    mask = (torch.arange(7) < torch.randint(4, 8, (QUESTIONS, 2, 2, 1), generator=g)).long()
    return dict(ids=torch.randint(1, VOCAB, (QUESTIONS, 2, 2, 7), generator=g), mask=mask, pos_weight=torch.tensor([1., 4, 20]), question_weight=torch.tensor([1., 1, 5]))


class Data:
    "`size` scans of noise per epoch, in an order of the epoch's own, shared among processes; knows its position in scans."
    def __init__(self, size=18, batch_size=3, rank=0, world=1):
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world
        self.prompts, self.epoch, self.at = prompts(), 0, 0
    def one(self, i): return batch(1, i)
    def steps(self, k):
        order = [int(i) for i in stable_rng(0, "order", self.epoch).permutation(self.size)]
        for s in range(k):
            first, last = s * self.size // k, (s + 1) * self.size // k
            if last <= self.at: continue
            mine, self.at = order[first:last][self.rank::self.world], last
            yield [together([self.one(i) for i in mine[j:j + self.batch_size]]) for j in range(0, len(mine), self.batch_size)]
        self.epoch, self.at = self.epoch + 1, 0
    def state_dict(self): return {"epoch": self.epoch, "at": self.at}
    def load_state_dict(self, state): self.epoch, self.at = state["epoch"], state["at"]


def together(batches):
    "Micro-batches as one."
    first, out = 0, {}
    for b in batches:
        for k, v in b.items(): out.setdefault(k, []).append(v + first if k == "snippet_scan" else v)
        first += len(b["grid"])
    return {k: torch.cat(v) for k, v in out.items()}
