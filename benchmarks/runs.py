"""For benchmarks that train many times: runs side by side, each kept when it ends, so that an interrupted benchmark goes on where it was."""
import json, multiprocessing, signal, sys

import torch

from ctvlm.core import write_atomically


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
