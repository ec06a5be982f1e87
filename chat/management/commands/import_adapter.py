"""`manage.py import_adapter PATH --checkpoint N`: a prefix that was trained elsewhere becomes an
adapter.
"""

import tempfile
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from chat.models import Checkpoint
from chat.registry import publish_adapter
from portal.models import User


class Command(BaseCommand):
    help = (
        "Import an upstream ptuning checkpoint-N/ folder, a peft prefix folder or an unpacked "
        "download of a portal as an "
        "adapter. Example: import_adapter output/adgen-chatglm-6b-pt-128-2e-2/checkpoint-3000 "
        "--checkpoint chatglm-6b"
    )

    def add_arguments(self, parser):
        parser.add_argument("path", help="the folder; it is read, not moved")
        parser.add_argument(
            "--checkpoint", required=True, help="name of the base checkpoint that it was trained on"
        )
        parser.add_argument(
            "--name",
            "--adapter",
            help="how people and the API call it (default: the folder's name)",
        )
        parser.add_argument(
            "--owner", help="user name; without one the adapter belongs to the whole team"
        )

    def handle(self, *, path, checkpoint, name, owner, **options):
        base = Checkpoint.objects.filter(name=checkpoint).first()
        if base is None:
            known = ", ".join(Checkpoint.objects.values_list("name", flat=True)) or "none"
            raise CommandError(f"There is no checkpoint named {checkpoint!r}. Registered: {known}.")
        user = User.objects.filter(username=owner).first() if owner else None
        if owner and user is None:
            raise CommandError(f"There is no user named {owner!r}.")
        folder = Path(path).expanduser().resolve()
        if not folder.is_dir():
            raise CommandError(f"{folder} is not a folder.")
        settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.DATA_DIR, prefix="import-") as work:
            converted = Path(work) / "adapter"
            metadata = convert(folder, base, converted)
            try:
                adapter = publish_adapter(
                    converted,
                    name=name or folder.name,
                    checkpoint=base,
                    owner=user,
                    step=step_of(folder),
                )
            except ValidationError as error:
                raise CommandError(" ".join(error.messages)) from error
        self.stdout.write(
            f"{adapter.name}: {metadata}, pre_seq_len {adapter.pre_seq_len}, for {base.name}"
        )


def convert(folder: Path, base: Checkpoint, target: Path) -> str:
    """Writes `folder`'s prefix as a KV prefix into `target`; CommandError, naming both sides, when
    it does not fit.
    """
    # torch takes seconds to import, so only here
    from chat.checkpoints import adapter_files
    from chat.checkpoints.foreign_adapters import read_prefix
    from chat.engine import adapters

    shape, shifts_positions = shape_of(base)
    try:
        if (folder / adapter_files.DESCRIPTION).is_file():
            prefix, kind = adapters.load(folder), "a portal's adapter"
            layers, _two, kv_heads, _length, head_dim = prefix.tensor.shape
            if (layers, kv_heads, head_dim) != (shape.layers, shape.kv_heads, shape.head_dim):
                raise CommandError(
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
        raise CommandError(str(error)) from error
    adapters.save(prefix, target)
    return kind


def shape_of(base: Checkpoint):
    """(BaseShape, whether a prefix shifts positions) of a checkpoint, from its config alone."""
    from transformers import AutoConfig

    from chat.checkpoints.foreign_adapters import BaseShape

    base.family.register()
    try:
        config = AutoConfig.from_pretrained(base.path).get_text_config()
    except (OSError, ValueError) as error:
        raise CommandError(f"The folder of {base.name} cannot be read: {error}") from error
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BaseShape(config.num_hidden_layers, kv_heads, head_dim), base.family.shifts_positions


def step_of(folder: Path) -> int | None:
    """`checkpoint-3000` says its step."""
    number = folder.name.rpartition("checkpoint-")[2]
    return int(number) if number != folder.name and number.isascii() and number.isdigit() else None
