"""SigLIP loss with its gradients: time and peak memory of the matrix form and of ours, each in a process of its own.

    python benchmarks/siglip.py > benchmarks/results/siglip.jsonl   ours to N = 32,768, the matrix as far as memory goes; chapter 7 shows it
    python benchmarks/siglip.py --form ours --n 4096  one measurement
"""
import argparse, json, resource, subprocess, sys, time


def measure(form, n, width, threads):
    "One JSON line: MiB above the embeddings and their gradients, seconds."
    import torch, torch.nn.functional as F
    from ctvlm.siglip import siglip_loss
    torch.set_num_threads(threads)

    def matrix(zimg, ztxt, t, b):
        logits = t.exp() * F.normalize(zimg, dim=-1) @ F.normalize(ztxt, dim=-1).T + b
        return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)

    g = torch.Generator().manual_seed(0)
    z = [torch.randn(n, width, generator=g, requires_grad=True) for _ in range(2)] + [torch.tensor(v, requires_grad=True) for v in (4.6, -16.)]
    siglip_loss(z[0][:8], z[1][:8], *z[2:]).backward()                       # libraries are loaded now
    for x in z: x.grad = torch.zeros_like(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    loss = (matrix if form == "matrix" else siglip_loss)(*z)
    loss.backward()
    print(json.dumps({"benchmark": "siglip", "form": form, "n": n, "width": width, "threads": threads, "loss": round(float(loss.detach()), 6),
                      "seconds": round(time.perf_counter() - began, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
                      "extra_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)}), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--form", choices=["matrix", "ours"])
    ap.add_argument("--n", type=int, default=32768)
    ap.add_argument("--width", type=int, default=512)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    if args.form: return measure(args.form, args.n, args.width, args.threads)
    import psutil
    for form, n in [("matrix", 4096), ("ours", 4096), ("matrix", 8192), ("ours", 8192), ("matrix", 16384), ("ours", 16384), ("matrix", 32768), ("ours", 32768)]:
        needed = 6 * 4 * n * n
        if form == "matrix" and needed > 0.8 * psutil.virtual_memory().available:
            print(json.dumps({"benchmark": "siglip", "form": form, "n": n, "skipped": f"needs about {needed / 2**30:.0f} GiB"}), flush=True); continue
        subprocess.run([sys.executable, __file__, "--form", form, "--n", str(n), "--width", str(args.width), "--threads", str(args.threads)], check=True)


if __name__ == "__main__": main()
