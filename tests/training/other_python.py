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


def run_in_other_python(program: str, arguments: Any) -> Any:
    """Run ``program`` with the variable ``arguments``; return its variable ``result``, passed as JSON."""
    code = "\n".join([
        f"import sys; sys.path.append({str(shared_packages())!r})", "import json",
        "arguments = json.loads(sys.stdin.read())", textwrap.dedent(program), "print('\\n' + json.dumps(result))",
    ])
    environment = {
        "HOME": os.environ.get("HOME", "/tmp"), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error",
        "HF_MODULES_CACHE": str(python().parent.parent / "modules"),
    }
    done = subprocess.run(
        [str(python()), "-c", code], input=json.dumps(arguments), capture_output=True, text=True, timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
