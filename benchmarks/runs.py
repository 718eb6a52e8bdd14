"""For benchmarks that train many times: runs side by side, each kept when it ends, so that an interrupted benchmark goes on where it was."""
import hashlib, json, multiprocessing, signal, sys

import numpy as np, torch

from ctvlm.core import write_atomically
from ctvlm.data import open_scan


def kept(path, settings, measure):
    "What `measure()` finds, written to `path`; read from there if it was found with the same `settings`."
    if path.exists() and (found := json.loads(path.read_text()))["settings"] == settings: return found["result"]
    result = measure()
    with write_atomically(path) as t: t.write_text(json.dumps({"settings": settings, "result": result}))
    return result


def side_by_side(function, jobs, processes):
    "`function` of every job, in order, in processes of one thread each: small models waste a second thread."
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                  # asked to end: the processes end too
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool: yield from pool.imap(function, jobs)


def write_json(path, result):
    with write_atomically(path) as t: t.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def phantoms_of(studies):
    "A short name of drawn patients, from the first one's voxels and report: another where they are drawn otherwise."
    row = studies.iloc[0]
    digest = hashlib.sha256(np.ascontiguousarray(open_scan(row.scan).array))
    digest.update(f"{row.findings}\n{row.impression}".encode())
    return digest.hexdigest()[:16]
