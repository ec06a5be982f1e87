"""A prefix that was trained elsewhere becomes an adapter of the portal."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ValidationError

from chat.engine.request import LONGEST_PREFIX
from chat.models import Adapter, Checkpoint
from chat.registry import digest_of, publish_adapter


@dataclass(frozen=True)
class Imported:
    adapter: Adapter
    kind: str  # what the folder was
    known: bool = False  # it was here before


def import_adapter(
    path: str | Path, base: Checkpoint, *, name: str = "", owner=None, again: bool = True
) -> Imported:
    """`path`: an original `checkpoint-N/` (or the .bin in it), a peft folder, an unpacked download
    of a portal. It is read, not moved. again=False: the adapter of the same content that `owner`
    sees is taken, where there is one. ValidationError in one sentence when it is no prefix, or
    another model's.
    """
    folder = _folder(Path(path).expanduser().resolve())
    settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.DATA_DIR, prefix="import-") as work:
        converted = Path(work) / "adapter"
        kind = _convert(folder, base, converted)
        if not again:
            visible = Adapter.objects.visible_to(owner).filter(checkpoint=base)
            known = visible.filter(sha256=digest_of(converted)).first()
            if known is not None:
                return Imported(known, kind, known=True)
        adapter = publish_adapter(
            converted,
            name=name or folder.name,
            checkpoint=base,
            owner=owner,
            step=_step_of(folder),
        )
        return Imported(adapter, kind)


def _folder(path: Path) -> Path:
    if path.is_file():  # the weights themselves: what they mean is said beside them
        if path.suffix in (".bin", ".safetensors"):
            return path.parent
        raise ValidationError(f"{path} is a file; name the folder that holds the adapter.")
    if not path.is_dir():
        raise ValidationError(f"{path} is not a folder.")
    inside = sorted(
        (child for child in path.glob("checkpoint-*") if child.is_dir()),
        key=lambda child: _step_of(child) or 0,
    )
    if inside and not any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        names = ", ".join(child.name for child in inside)
        raise ValidationError(f"{path} holds {names}: name one of them, {inside[-1]} is the last.")
    return path


def _convert(folder: Path, base: Checkpoint, target: Path) -> str:
    """Writes `folder`'s prefix as a KV prefix into `target`; what it was."""
    # torch takes seconds to import, so only here
    from chat.checkpoints import adapter_files
    from chat.checkpoints.foreign_adapters import read_prefix
    from chat.engine import adapters

    shape, shifts_positions = _shape_of(base)
    try:
        if (folder / adapter_files.DESCRIPTION).is_file():
            prefix, kind = adapters.load(folder), "a portal's adapter"
            layers, _two, kv_heads, _length, head_dim = prefix.tensor.shape
            if (layers, kv_heads, head_dim) != (shape.layers, shape.kv_heads, shape.head_dim):
                raise ValidationError(
                    f"The adapter has {layers} layers of {kv_heads} x {head_dim}; {base.name} has "
                    f"{shape}."
                )
        else:
            prefix = read_prefix(
                folder,
                shape,
                checkpoint_fingerprint=base.fingerprint,
                shifts_positions=shifts_positions,
            )
            kind = f"{prefix.metadata['format']} folder"
    except adapters.AdapterInvalid as error:
        raise ValidationError(str(error)) from error
    length, context = prefix.pre_seq_len, base.description.get("context_length")
    if length > LONGEST_PREFIX:
        raise ValidationError(
            f"The prefix has {length} tokens; those of at most {LONGEST_PREFIX} are served."
        )
    if isinstance(context, int) and prefix.shifts_positions and length >= context - 1:
        raise ValidationError(
            f"The prefix has {length} tokens; {base.name} has room for {context} in all."
        )
    adapters.save(prefix, target)
    return kind


def _shape_of(base: Checkpoint):
    """(BaseShape, whether a prefix shifts positions) of a checkpoint, from its config alone."""
    from transformers import AutoConfig

    from chat.checkpoints.foreign_adapters import BaseShape

    base.family.register()
    try:
        config = AutoConfig.from_pretrained(base.path).get_text_config()
    except (OSError, ValueError) as error:
        raise ValidationError(f"The folder of {base.name} cannot be read: {error}") from error
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BaseShape(config.num_hidden_layers, kv_heads, head_dim), base.family.shifts_positions


def _step_of(folder: Path) -> int | None:
    """`checkpoint-3000` says its step."""
    number = folder.name.rpartition("checkpoint-")[2]
    return int(number) if number != folder.name and number.isascii() and number.isdigit() else None
