"""The default model, for tests that need real weights or a real tokenizer.

`TOKENMILL_TEST_GGUF` names a GGUF file to use instead of the pulled one; what is derived from it then lives in a
temporary folder of this process. Without it the model comes out of the cache, or is pulled into it once.
"""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from deploy.paths import cache_folder
from gateway import model_files


def default_model() -> Path:
    """The GGUF file of the default model. Raises FileNotFoundError when TOKENMILL_TEST_GGUF names no file."""
    if named := os.environ.get("TOKENMILL_TEST_GGUF"):
        path = Path(named).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"TOKENMILL_TEST_GGUF={named}: no such file")
        return path
    return default_folder() / "model.gguf"


@cache
def default_folder() -> Path:
    """The pulled model: a folder with `model.gguf`, `tokenizer.json` and `card.json`."""
    if os.environ.get("TOKENMILL_TEST_GGUF"):
        folder = Path(tempfile.mkdtemp(prefix="tokenmill-test-model-")) / "smollm2-135m-instruct"
        folder.mkdir()
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
        (folder / "model.gguf").symlink_to(default_model())
        model_files.prepare(folder / "model.gguf", folder)
        return folder
    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    if (folder / "model.gguf").is_file():
        model_files.prepare(folder / "model.gguf", folder)
        return folder
    from deploy.pull import pull

    return pull("default")
