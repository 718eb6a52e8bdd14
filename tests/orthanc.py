"An Orthanc of our own, on loopback."
import json, shutil, socket, subprocess, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pydicom, pytest

PLUGINS = [p for p in ("/usr/share/orthanc/plugins/libOrthancDicomWeb.so", "/usr/lib/orthanc/libOrthancDicomWeb.so") if Path(p).exists()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Archive:
    def __init__(self, port, study): self.port, self.study = port, study
    def address(self, series=None, port=None, study=None):
        tail = f"/series/{series}" if series else ""
        return f"dicomweb://127.0.0.1:{port or self.port}/dicom-web/studies/{study or self.study}{tail}"
    def rest(self, path, data=None):
        return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, timeout=30).read())
    def upload(self, folder): # -> Study Instance UID
        files = sorted(Path(folder).rglob("*.dcm"))
        for f in files: self.rest("/instances", f.read_bytes())
        return str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)


@contextmanager
def archive_with(folder, here):
    "An Orthanc that keeps its files in `here` and holds the study in `folder`, as long as the block runs."
    if not shutil.which("Orthanc") or not PLUGINS: pytest.skip("no Orthanc here: apt-get install orthanc orthanc-dicomweb")
    port = free_port()
    config = {"Name": "test", "StorageDirectory": str(here / "db"), "IndexDirectory": str(here / "db"), "HttpPort": port, "RemoteAccessAllowed": False,
              "AuthenticationEnabled": False, "DicomServerEnabled": False, "HttpBindAddresses": ["127.0.0.1"], "Plugins": PLUGINS, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}}
    (here / "orthanc.json").write_text(json.dumps(config))
    with open(here / "log", "wb") as log: process = subprocess.Popen(["Orthanc", str(here / "orthanc.json")], stdout=log, stderr=log)
    try:
        archive = Archive(port, None)
        for _ in range(150):
            try: archive.rest("/system"); break
            except OSError: time.sleep(.1)
        archive.study = archive.upload(folder)
        yield archive
    finally:
        process.terminate(); process.wait(20)
