"""Nothing in a micro-batch asks a card for a number: asking means waiting until all that was sent to it is done.

A CPU stands in for the card. What a card would hold (weights, features and all that is computed from them) is followed through
every operation, backward too; operations whose result depends on values, which the processor would have to wait for, are noted."""
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import made_up
from ctvlm.effective_batch import _ON_HOST, Objective, scan_part, text_parts, unpadded

ASKS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal"}


class Card(TorchDispatchMode):
    "Follows what a card would hold, and notes what would be asked of it."
    def __init__(self, tensors):
        super().__init__()
        self.held, self.asked = WeakIdKeyDictionary(), []
        for x in tensors: self.held[x] = True

    def __enter__(self):
        self.tolist = torch.Tensor.tolist                  # reads memory without an operation
        torch.Tensor.tolist = lambda x: self.asked.extend(["tolist"] * (x in self.held)) or self.tolist(x)
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x in self.held for x in tensors):
            name = op.__name__.split(".")[0]
            masked = name in ("index", "index_put", "index_put_") and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
            if name in ASKS or masked: self.asked.append(name)
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor): self.held[x] = True
        return out


def on_the_card(model, batch):
    there = [x for name, x in batch.items() if isinstance(x, torch.Tensor) and name not in _ON_HOST]
    return Card([*model.parameters(), *model.buffers(), *there])


@pytest.mark.parametrize("training", [False, True])
def test_scans_and_snippets(training):
    model, seen = made_up.model().train(training), {}
    batch = made_up.batch(4, seed=1)
    N = int(batch["grid"].prod(1).sum())
    batch["patch_mask"] = torch.ones(N, 8, dtype=torch.bool)
    batch["patch_mask"][0, :3] = False
    with on_the_card(model, batch) as card:
        embedded, own = scan_part(model, batch, Objective(localization=0.3, text_tokens=64), 4, seen, torch.device("cpu"))(True)
        (own + sum(x.square().sum() for x in embedded.values())).backward()
    assert card.asked == ["_local_scalar_dense"]           # `localization_loss` looks at its mask on a CPU only
    assert seen["loss"] > 0 and len(card.held) > 20


def test_texts():
    model, batch = made_up.model().train(), made_up.batch(4, seed=1)
    rows = unpadded(batch["report_ids"], batch["report_mask"])
    with on_the_card(model, batch) as card:
        parts, _ = text_parts(model, rows, 64, "text", torch.device("cpu"))
        for part in parts: part(True)[0]["text"].square().sum().backward()
    assert len(parts) > 1 and not card.asked


def test_what_is_asked_is_seen():
    weight = torch.nn.Parameter(torch.ones(3))
    for ask in (lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.tolist()):
        with Card([weight]) as card: ask(weight * 2)
        assert card.asked
