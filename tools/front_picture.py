#!/usr/bin/env python
"""The two pictures of the front page, by the model that ships: python tools/front_picture.py FOLDER

FOLDER holds the DICOM series of patient LIDC-IDRI-0314 of TCIA LIDC-IDRI (CC BY 3.0). Writes nbs/images/answer.png, which is
what `ctvlm localize` draws, and nbs/images/reader.png, the picture of the reader; prints the answer in words."""
import sys
from pathlib import Path

import matplotlib
matplotlib.use("agg")
from ctvlm.model import ready_model
from ctvlm.pictures import answer_words, localization_figure
from ctvlm.preprocessing import load_volume
from ctvlm.reader import Planes

TEXT = "Large pleural effusion on the right"
IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"


def draw(volume, answer, trained_on):
    notes = f"LIDC-IDRI-0314 (LIDC-IDRI, CC BY 3.0); the model that ships, trained on {trained_on}"
    localization_figure(answer, volume, notes=notes).savefig(IMAGES / "answer.png", dpi=80, bbox_inches="tight")
    X, Y, _ = volume.array.shape
    k = volume.slice_at(float(answer.depth_mm))
    (IMAGES / "reader.png").write_bytes(Planes(volume).draw(X // 2, Y // 2, k, answer=answer))


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    scan, model = load_volume(sys.argv[1]), ready_model()
    [found] = model.localize(scan, [TEXT])
    draw(scan, found, model.config.trained_on)
    print(f"{TEXT}: {answer_words(found)}")
