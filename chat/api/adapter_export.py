"""An adapter as people take it away: the portal's own folder and, beside it, peft's. Without torch:
it is one array.
"""

import json
import tempfile
import zipfile
from typing import IO

import numpy as np
import safetensors
from safetensors.numpy import save

from chat.checkpoints.adapter_files import (
    DESCRIPTION,
    PEFT_CONFIG,
    PEFT_TENSOR,
    PEFT_WEIGHTS,
    TENSOR,
    WEIGHTS,
    peft_config,
)
from chat.models import Adapter

README = """adapter.safetensors, adapter.json: the prefix as the portal serves it
(`manage.py import_adapter` reads it).
peft/: the same prefix for peft: PeftModel.from_pretrained(base_model, "peft").
ChatGLM-6B's own format (pytorch_model.bin):
`manage.py export_adapter NAME --format upstream --output FOLDER`.
"""


class AdapterUnreadable(Exception):
    """What lies on the disk is no adapter any more."""


def archive(adapter: Adapter) -> IO[bytes]:
    """A zip in a temporary file, at its beginning. AdapterUnreadable when the adapter's files are
    gone or damaged.
    """
    weights, description = adapter.path / WEIGHTS, adapter.path / DESCRIPTION
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the response closes it
    try:
        # random numbers do not compress
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            target.write(description, DESCRIPTION)
            target.write(weights, WEIGHTS)
            target.writestr("README.txt", README)
            prefix = read_prefix(weights.read_bytes())
            target.writestr(
                f"peft/{PEFT_CONFIG}",
                json.dumps(peft_config(prefix.shape, adapter.checkpoint.name), indent=2),
            )
            target.writestr(
                f"peft/{PEFT_WEIGHTS}",
                save({PEFT_TENSOR: peft_embeddings(prefix)}),
            )
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        file.close()
        raise AdapterUnreadable(str(error)) from error
    file.seek(0)
    return file


def read_prefix(content: bytes) -> np.ndarray:
    """[layers, 2, kv_heads, pre_seq_len, head_dim]; bfloat16, which numpy lacks, is widened to
    float32.
    """
    found = dict(safetensors.deserialize(content))[TENSOR]
    if found["dtype"] == "BF16":
        array = (np.frombuffer(found["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(
            found["data"], {"F32": np.float32, "F16": np.float16, "F64": np.float64}[found["dtype"]]
        )
    return array.reshape(found["shape"])


def peft_embeddings(prefix: np.ndarray) -> np.ndarray:
    """[pre_seq_len, layers * 2 * kv_heads * head_dim]: peft's (and ChatGLM-6B's) order of a prefix
    without projection.
    """
    layers, two, kv_heads, pre_seq_len, head_dim = prefix.shape
    flat = prefix.transpose(3, 0, 1, 2, 4).reshape(pre_seq_len, layers * two * kv_heads * head_dim)
    return np.ascontiguousarray(flat, dtype=np.float32)
