"Light things for tests that start processes: importing them costs little."
import os, signal
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from ctvlm.preprocessing import WindowSpec


class Encoder(torch.nn.Module):
    "As much of a model as `embed_studies` asks for."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.window_encoder = torch.nn.Linear(16 * 16 * 4, 24)
        self.config = SimpleNamespace(window_spec=WindowSpec((3., 3., 3.), (16, 16, 32), (8, 8, 4)), fit="pad", hu_levels=(), window_encoder={"width": 24}, trained_on="nothing")
        self.device = torch.device("cpu")

    def _ask(self): return torch.no_grad()
    def window_features(self, scans=1): return self.encode_windows
    def encode_windows(self, windows, chunk=None):
        slabs = windows.float().unflatten(-1, (8, 4)).movedim(-2, 1).flatten(2)   # (N, 8, voxels)
        tokens = self.window_encoder(slabs)
        return tokens.mean(1), tokens


class Dying(Encoder):
    "Takes its process with it at the third scan, once."
    def __init__(self, marker): super().__init__(); self.marker, self.count = marker, 0
    def encode_windows(self, windows, chunk=None):
        self.count += 1
        if self.count == 3 and not os.path.exists(self.marker): open(self.marker, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_windows(windows, chunk)


def dies(job):
    if job == 2: os._exit(9)
    return job * job
