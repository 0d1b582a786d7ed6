"""Programs of another environment: a current transformers, sentence-transformers and gensim.

Their versions clash with what AllenNLP needs here.

The environment is made once by ``python -m venv`` and pip, without their requirements, in ``~/.cache/lapse-elmo`` (or
``LAPSE_ELMO_TEST_VENV``, an environment that is there already); torch and what else is here comes from this one. Where
pip cannot fetch the packages the tests that need them are skipped, and say so.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

PINS = (
    "transformers==5.24.0", "huggingface-hub==2.4.0", "tokenizers==0.23.3", "safetensors==0.8.0",
    "sentence-transformers==6.2.0", "gensim==4.4.0",
)
# Packages that they import and that are missing or too old here.
EXTRAS = (
    "anyio==4.16.0", "filelock==3.*", "h11==0.16.0", "hf-xet==1.*", "httpcore2==2.16.2", "httpx2==2.16.2", "idna==3.*",
    "joblib==1.*", "packaging", "pyyaml==6.*", "regex", "scikit-learn==1.*", "scipy==1.*", "smart-open>=6",
    "threadpoolctl==3.*", "truststore==0.10.*", "typer", "click",
)


_TIME_S = 600.0  # for a program, and for the imports
# Runs programs, each in a fork of itself: a line of JSON with a program and its arguments is answered by one with its
# result or its error. What the programs print goes to standard error.
_SERVER = """
import json, os, sys, traceback
sys.path.append(sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import gensim.models, sentence_transformers, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
for line in sys.stdin:
    program, arguments = json.loads(line)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        names = {"arguments": arguments}
        try:
            exec(program, names)
            answer = {"result": names["result"]}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writer, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    print(answer or json.dumps({"error": f"the process has ended with {status}"}), file=answers, flush=True)
"""


def run_in_other_python(program: str, arguments: Any) -> Any:
    """Run ``program`` with the variable ``arguments``; return its variable ``result``, passed as JSON.

    The imports, which take seconds, are done once: programs run in forks of a process that has done them.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([textwrap.dedent(program), arguments]).encode() + b"\n")
    server.stdin.flush()
    assert select.select([server.stdout], [], [], _TIME_S)[0], "no answer"
    answer = json.loads(server.stdout.readline() or '{"error": "the packages cannot be imported"}')
    assert "error" not in answer, answer["error"]
    return answer["result"]


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """Start the process that runs programs; it ends with this one."""
    environment = {
        "HOME": os.environ.get("HOME", "/tmp"), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error",
        "HF_MODULES_CACHE": str(python().parent.parent / "modules"),
    }
    command = [str(python()), "-c", _SERVER, str(shared_packages())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


@functools.cache
def shared_packages() -> Path:
    """Return a folder of links to the packages installed here, torch above all, except torchvision.

    Its CUDA build cannot be imported together with a CPU build of torch.
    """
    folder = Path(tempfile.mkdtemp(prefix="lapse-elmo-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith("torchvision"):
            (folder / path.name).symlink_to(path)
    return folder


@functools.cache
def python() -> Path:
    """Return the interpreter of the other environment; skip the test if it cannot be made."""
    given = os.environ.get("LAPSE_ELMO_TEST_VENV")
    if given:
        return Path(given) / "bin" / "python"
    name = hashlib.sha256(" ".join((sys.version, *PINS, *EXTRAS)).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "lapse-elmo" / f"tests-{name}"
    found = folder / "bin" / "python"
    if (folder / "complete").exists():
        return found
    shutil.rmtree(folder, ignore_errors=True)
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(found), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", *PINS, *EXTRAS],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"no environment with {PINS[0]} could be made: {reason}")
    (folder / "complete").touch()
    return found
