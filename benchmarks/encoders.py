"""Window encoder, training step of the tiny model, and a whole question on a full-size model; one JSON line per measurement.

    python benchmarks/encoders.py                       4 windows of `large` on this machine, the tiny model's training
    python benchmarks/encoders.py --scan FOLDER         also: a question to a full-size model with random weights (goal: 90 s, 8,192 MiB on 2 cores)
    python benchmarks/encoders.py --device cuda         plain, compiled, prepared; memory (goal: 60 % of the measured peak at 64 windows)

With --results the lines go to benchmarks/results/encoders_cpu.jsonl, or encoders_cuda.jsonl, for chapter 10.
"""
import argparse, contextlib, datetime, json, os, platform, resource, time
from pathlib import Path

import torch, transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctvlm.core import pick_device, seed_everything, write_atomically
from ctvlm.model import CTVLMConfig, CTVLMModel, CTVLMProcessor, fast_dtype
from ctvlm.prepared import PreparedEncoder
from ctvlm.text import train_tokenizer
from ctvlm.vision import EncoderSizes, WindowEncoder


FORMS = ("compiled", "prepared", "prepared and compiled",
         "prepared and compiled, attention by cuDNN", "prepared and tuned") # the last two are not used by the package: do they help?
lines = []
def report(what, **more):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines.append(json.dumps({"benchmark": "encoders", "what": what, "threads": torch.get_num_threads(), **more, "peak_mib": round(peak)}))
    print(lines[-1], flush=True)


def cpu_name():
    try: return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor()


def seconds(f, device, repeats): # best of some, after one to warm up
    best = float("inf")
    for i in range(repeats + 1):
        if device.type == "cuda": torch.cuda.synchronize()
        began = time.perf_counter()
        f()
        if device.type == "cuda": torch.cuda.synchronize()
        if i: best = min(best, time.perf_counter() - began)
    return best


def matmul_peak(device, dtype): # FLOP/s of the largest product in a block, at a size that fills the device
    rows, width = (16384, 4096) if device.type == "cuda" else (2052, 1080)
    a, b = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(4 * width, width, device=device, dtype=dtype)
    return 8 * rows * width**2 / seconds(lambda: torch.nn.functional.linear(a, b), device, 10)


def flop_per_window(encoder): # multiply and add count as two
    s, L = encoder.sizes, 1 + encoder.grid[0] * encoder.grid[1] * encoder.grid[2]
    block = 2 * L * s.width**2 * (4 + 2 * s.mlp_ratio) + 4 * L**2 * s.width
    return s.depth * block + 2 * (L - 1) * s.width * encoder.patch[0] * encoder.patch[1] * encoder.patch[2]


def window_encoder(device, dtype, batches, form="plain"):
    "`form`: plain, compiled, prepared, or prepared and more (chapter 05a)."
    compiled = "compiled" in form
    with device: encoder = WindowEncoder(EncoderSizes()).eval().requires_grad_(False)
    if "prepared" in form: encoder = PreparedEncoder(encoder, dtype, compiled)
    else:
        encoder = encoder.to(dtype)
        for block in encoder.blocks if compiled else (): block.compile()
    for block in encoder.blocks if "tuned" in form else ():
        block.compile(dynamic=False, mode="max-autotune-no-cudagraphs")
    attention = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if "cuDNN" in form else contextlib.nullcontext()
    flop = flop_per_window(WindowEncoder(EncoderSizes()))
    for n in batches:
        if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        windows = torch.rand(n, 1, *encoder.window, device=device).half()
        with torch.inference_mode(), attention:
            took = seconds(lambda: encoder.features(windows), device, 10 if device.type == "cuda" else 2)
        peak, rate = matmul_peak(device, dtype), n * flop / took
        more = {"gpu_mib": round(torch.cuda.max_memory_allocated() / 2**20)} if device.type == "cuda" else {}
        report("window encoder, large", dtype=str(dtype)[6:], windows=n, form=form, windows_per_s=round(n / took, 3), tflops=round(rate / 1e12, 3), matmul_peak_tflops=round(peak / 1e12, 3), share_of_peak=round(rate / peak, 3), **more)


def tiny_training(device, dtype):
    model = CTVLMModel(CTVLMConfig.tiny()).train().to(device)
    windows = torch.rand(120, 1, 32, 32, 32, device=device).half()
    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): cls, depth_tokens = model.encode_windows(windows)
        (cls.float().sum() + depth_tokens.float().sum()).backward()
    report("window encoder, tiny, forward and backward", dtype=str(dtype)[6:], windows_per_s=round(120 / seconds(step, device, 4)))


def question(device, scan):
    began = time.perf_counter()
    seed_everything(0)
    tokenizer = train_tokenizer(["Consolidation in the left lower lobe."], 300)
    model = CTVLMModel(CTVLMConfig.large()).eval().to(device)
    model.processor = CTVLMProcessor.of(model.config, tokenizer)
    built, began, used = time.perf_counter() - began, time.perf_counter(), time.process_time()
    answer = model.localize(scan, ["Consolidation in the left lower lobe."])[0]
    report("localize with large, random weights", building_s=round(built, 1), seconds=round(time.perf_counter() - began, 1), cpu_seconds=round(time.process_time() - used, 1),
           bins=len(answer.bin_depths_mm), dtype=str(fast_dtype(device))[6:])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default=None, help="cpu, cuda; the best one present")
    ap.add_argument("--threads", type=int, default=None, help="CPU threads")
    ap.add_argument("--scan", default=None, help="a scan for the question")
    ap.add_argument("--results", action="store_true", help="keep the lines for chapter 10")
    args = ap.parse_args()
    device = pick_device(args.device)
    if args.threads: torch.set_num_threads(args.threads)
    dtype = fast_dtype(device)
    report("versions", date=str(datetime.date.today()), machine=torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(), cores=os.cpu_count(), load=round(os.getloadavg()[0], 1),
           torch=torch.__version__, transformers=transformers.__version__)
    if device.type == "cuda":
        window_encoder(device, dtype, (1, 16, 64, 128))
        for form in FORMS: window_encoder(device, dtype, (16, 64), form)
    else:
        window_encoder(device, dtype, (4,))
        for kind in sorted({torch.float32, dtype}, key=str): tiny_training(device, kind)
    if args.scan: question(device, args.scan)
    if args.results:
        with write_atomically(Path(__file__).parent/"results"/f"encoders_{device.type}.jsonl") as t: t.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
