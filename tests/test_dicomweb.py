"Scans from a real archive (Orthanc on loopback) and back, with the faults that archives have."
import json, threading, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pydicom
import pytest

pytest.importorskip("dicomweb_client", reason="pip install 'ctvlm[dicom]'")
from ctvlm.core import InputError
from ctvlm.dicomweb import TOKEN, connect, fetch_series, fetched, find_series, parse_address, send
from ctvlm.preprocessing import load_volume
from orthanc import free_port

class Proxy(BaseHTTPRequestHandler):
    "Passes requests on to the archive, and does what its server's `fault` says on the way."
    protocol_version = "HTTP/1.0"
    def do_GET(self): self.pass_on(None)
    def do_POST(self): self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))
    def pass_on(self, body):
        self.server.asked.append((self.command, self.path))
        status = self.server.fault(self)
        if status: self.send_response(status); self.end_headers(); return
        headers = {k: v for k, v in self.headers.items() if k.lower() in ("accept", "content-type")}
        request = urllib.request.Request(f"http://127.0.0.1:{self.server.archive}{self.path}", body, headers, method=self.command)
        try: answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as e: self.send_response(e.code); self.end_headers(); return
        content = self.server.change(self, answer.read())
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(content) if not self.server.cut(self) else 2 * len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *words): pass


@pytest.fixture()
def proxy(archive):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.archive, server.asked = archive.port, []
    server.fault, server.change, server.cut = (lambda r: None), (lambda r, content: content), (lambda r: False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


def main_series(phantom): return phantom[0].scan.main


def fetch(archive, proxy, phantom, folder): return fetch_series(archive.address(main_series(phantom).uid, proxy.server_port), folder, backoff=.01)


def test_a_series_comes_as_it_was_stored(archive, phantom, tmp_path):
    study, folder = phantom
    came = fetch_series(archive.address(main_series(phantom).uid), tmp_path / "scan")
    back, first = load_volume(came), load_volume(folder / f"series-{main_series(phantom).number:03d}")
    assert np.array_equal(back.array, first.array) and np.allclose(back.affine, first.affine) and np.array_equal(back.image_numbers, first.image_numbers)
    assert all(oct(f.stat().st_mode & 0o777) == "0o600" for f in came.iterdir())


def test_a_study_needs_a_series(archive, phantom, tmp_path):
    "Several fit: the list; by number: the right one."
    rows = find_series(connect(parse_address(archive.address()).base), parse_address(archive.address()))
    assert {r["number"] for r in rows} == {s.number for s in phantom[0].scan.series} and all(r["images"] for r in rows)
    with pytest.raises(InputError, match="4 CT series of study .* fit.*--series"): fetch_series(archive.address(), tmp_path / "a")
    assert len(list(fetch_series(archive.address(), tmp_path / "b", main_series(phantom).number).iterdir())) == main_series(phantom).count
    with pytest.raises(InputError, match="0 CT series"): fetch_series(archive.address(), tmp_path / "c", 4711)


def test_a_study_without_series(archive, proxy):
    "Servers answer with 404 or with an empty list."
    address = parse_address(archive.address(port=proxy.server_port))
    proxy.change = lambda r, content: b"[]"
    with pytest.raises(InputError, match="no CT series of study.*check its UID"): find_series(connect(address.base), address)


def test_two_series_of_one_number(archive, phantom, tmp_path):
    from ctvlm.dicomweb import choose
    rows = [dict(uid=f"1.{k}", number=2, description="Axial", images=9) for k in (1, 2)]
    with pytest.raises(InputError, match="2 CT series.*1.1.*1.2"): choose(rows, parse_address(archive.address()), 2)


def test_500_twice_then_right(archive, proxy, phantom, tmp_path):
    proxy.fault = lambda r: 500 if len(proxy.asked) <= 2 else None
    assert len(list(fetch(archive, proxy, phantom, tmp_path / "a").iterdir())) == main_series(phantom).count


@pytest.mark.parametrize("status, remedy", [(401, TOKEN), (404, "check both UIDs"), (500, "try again later")])
def test_a_refusal_is_one_line(archive, proxy, phantom, tmp_path, status, remedy):
    proxy.fault = lambda r: status
    with pytest.raises(InputError, match=f"{status}.*{remedy}") as e: fetch(archive, proxy, phantom, tmp_path / "a")
    assert "\n" not in str(e.value) and not (tmp_path / "a").exists()


def test_gone_in_the_middle(archive, proxy, phantom, tmp_path):
    "The stream breaks off: what is missing is asked for one by one. Nobody answers any more: one line."
    proxy.cut = lambda r: r.path.split("?")[0].endswith(main_series(phantom).uid)
    proxy.change = lambda r, content: content[:len(content) // 2] if proxy.cut(r) else content
    assert len(list(fetch(archive, proxy, phantom, tmp_path / "a").iterdir())) == main_series(phantom).count
    with pytest.raises(InputError, match="cannot be reached"): fetch_series(archive.address(main_series(phantom).uid, free_port()), tmp_path / "b", backoff=.01)
    gone = [r for r in proxy.asked if r[1].split("?")[0].endswith("/instances")][0][1]
    proxy.fault = lambda r: None if r.path == gone or proxy.cut(r) else 404  # half of the stream, then nothing at all
    with pytest.raises(InputError, match="404"): fetch(archive, proxy, phantom, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_series_that_loses_an_image(archive, proxy, phantom, tmp_path):
    def one_more(r, content):
        if not r.path.split("?")[0].endswith("/instances"): return content
        rows = json.loads(content)
        rows.append({**rows[0], "00080018": {"vr": "UI", "Value": ["1.2.3.4"]}})
        return json.dumps(rows).encode()
    proxy.change = one_more
    with pytest.raises(InputError, match="404|did not come"): fetch(archive, proxy, phantom, tmp_path / "a")
    assert not list(tmp_path.iterdir())                              # nothing half-written


def test_two_scans_do_not_mix(archive, phantom, tmp_path):
    (tmp_path / "other.dcm").write_bytes(b"")
    with pytest.raises(InputError, match="is not empty"): fetch_series(archive.address(main_series(phantom).uid), tmp_path)


def test_memory_holds_a_few_images(archive, phantom, tmp_path):
    "Of 80 images of half a megabyte: the peak while they come is the same as for 20, and a fraction of the series."
    import tracemalloc
    ds = pydicom.dcmread(sorted((phantom[1] / f"series-{main_series(phantom).number:03d}").iterdir())[0])
    ds.Rows, ds.Columns, ds.PixelData = 512, 512, bytes(2 * 512 * 512)
    peaks, study = [], "1.2.826.0.1.3680043.8.498.30"
    for n in (20, 80):
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, f"{study}.{n}"
        for k in range(n):
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{study}.{n}.{k}"
            ds.save_as(tmp_path / "image.dcm")
            archive.rest("/instances", (tmp_path / "image.dcm").read_bytes())
        tracemalloc.start()
        assert len(list(fetch_series(archive.address(f"{study}.{n}", study=study), tmp_path / str(n)).iterdir())) == n
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 10, peaks        # MiB; the series has 40


def test_the_token_is_sent_and_not_shown(archive, proxy, phantom, tmp_path, monkeypatch):
    seen = []
    proxy.fault = lambda r: seen.append(r.headers.get("Authorization")) or 403
    monkeypatch.setenv(TOKEN, "geheim")
    with pytest.raises(InputError, match="403") as e: fetch(archive, proxy, phantom, tmp_path / "a")
    assert set(seen) == {"Bearer geheim"} and "geheim" not in str(e.value)
    with pytest.raises(InputError, match="use https"): connect("http://archive.example/dicom-web")


def test_what_is_sent_is_there_once(archive, proxy, phantom):
    study, folder = phantom
    ds = pydicom.dcmread(sorted((folder / f"series-{main_series(phantom).number:03d}").iterdir())[0])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    address = archive.address(port=proxy.server_port)
    before = len(archive.rest("/instances"))
    assert send([ds], address) == [dict(uid=str(ds.SOPInstanceUID), stored=True)]
    assert send([ds], address) == [dict(uid=str(ds.SOPInstanceUID), stored=False)]
    assert [m for m, _ in proxy.asked].count("POST") == 1 and len(archive.rest("/instances")) == before + 1
    proxy.fault = lambda r: 503 if r.command == "POST" else None
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    proxy.asked.clear()
    with pytest.raises(InputError, match="503"): send([ds], address, backoff=.01)
    assert [m for m, _ in proxy.asked].count("POST") == 1    # not repeated by itself: nobody knows what arrived


def test_what_a_killed_process_left_is_removed(archive, phantom, tmp_path, monkeypatch):
    "Not what another process still reads."
    import os, subprocess, sys, tempfile
    address = archive.address(main_series(phantom).uid)
    code = f"import os, sys\nfrom ctvlm.dicomweb import fetched\nwith fetched({address!r}): print('there', flush=True); sys.stdin.read()"
    def start():
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "there\n"
        return process, next(p for p in tmp_path.iterdir() if p not in seen)
    seen = set()
    killed, left = start()
    seen.add(left)
    running, kept = start()
    killed.kill(); killed.wait()
    assert list(left.rglob("*.dcm")) and left.stat().st_mode & 0o77 == 0
    for folder in (left, kept): os.utime(folder, (0, 0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with fetched(address): assert not left.exists() and list(kept.rglob("*.dcm"))
    running.communicate("")
    assert running.returncode == 0 and not list(tmp_path.iterdir())
