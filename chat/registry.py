"""How checkpoints and adapters become known to the portal, under which names, and how they leave
it.

Names of checkpoints and adapters are ids of the OpenAI API and share one namespace; `base:adapter`
means both at once. No torch here: the files tell enough.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from chat.checkpoints import adapter_files
from chat.checkpoints.describe import CheckpointInvalid, describe, fingerprint
from chat.explanations import UNUSABLE_CHECKPOINT
from chat.models import Adapter, Checkpoint, ServingSwitch
from chat.worker.addresses import RemoteAddress
from portal.explanations import sentence
from portal.rest.conventions import Conflict
from portal.text import is_storable

logger = logging.getLogger(__name__)

STARTER = "starter"
STARTER_FOLDER = settings.BASE_DIR / "chat" / "starter" / "model"
_NAME = re.compile(r"[^\x00-\x1f\x7f:,|=\\?#%]+")


# ------------------------------------------------------------------ names


def check_name(name: str, longest: int, *, except_row=None) -> str:
    """`name` stripped, when it may be given to a checkpoint or an adapter; ValidationError
    otherwise.
    """
    name = name.strip() if isinstance(name, str) else ""
    if not name or len(name) > longest:
        raise ValidationError(
            _("A name has 1 to %(most)s characters.") % {"most": longest}, "invalid_name"
        )
    if (
        not _NAME.fullmatch(name)
        or not is_storable(name)
        or name.isdigit()
        or name.startswith((".", "/"))
        or name.endswith("/")
    ):
        message = _(
            "A name must not contain : , | = ? # %% or \\, nor begin with a dot or slash, nor be "
            "only digits."
        )
        raise ValidationError(message % {}, "invalid_name")
    for model in (Checkpoint, Adapter):
        taken = model.objects.filter(name=name)
        if isinstance(except_row, model):
            taken = taken.exclude(pk=except_row.pk)
        if taken.exists():
            raise ValidationError(_("The name “%(name)s” is taken.") % {"name": name}, "name_taken")
    return name


def free_name(wish: str, longest: int) -> str:
    """`wish` made fit to be a name, with -2, -3 ... behind it when it is taken."""
    wish = re.sub(r"[\x00-\x1f\x7f:,|=\\?#%]+", "-", str(wish)).strip("-./ ") or "adapter"
    wish = f"adapter-{wish}" if wish.isdigit() else wish
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        name = wish[: longest - len(suffix)] + suffix
        try:
            return check_name(name, longest)
        except ValidationError:
            number += 1


def find_model(user, name: str) -> tuple[Checkpoint, Adapter | None]:
    """The checkpoint and adapter that `checkpoint`, `adapter` or `checkpoint:adapter` names;
    LookupError when `user` sees none. An adapter may be two, as `style+domain`
    (chat/compositions.py); ValidationError when they do not go together.
    """
    from chat import compositions  # which publishes what it makes

    if not is_storable(name):
        raise LookupError(name)
    base, colon, tuned = name.partition(":")
    adapters = Adapter.objects.visible_to(user).select_related("checkpoint")
    if colon:
        adapter = adapters.filter(name=tuned, checkpoint__name=base).first()
        adapter = adapter or _together(compositions.named, user, base, tuned)
        if adapter is None:
            raise LookupError(name)
        return adapter.checkpoint, adapter
    checkpoint = Checkpoint.objects.visible_to(user).filter(name=base).first()
    if checkpoint is not None:
        return checkpoint, None
    adapter = adapters.filter(name=base).first()
    adapter = adapter or _together(compositions.named, user, "", base)
    if adapter is None:
        raise LookupError(name)
    return adapter.checkpoint, adapter


def _together(named, user, checkpoint_name: str, name: str) -> Adapter | None:
    try:
        return named(user, checkpoint_name, name)
    except ValidationError as error:
        raise ValidationError({"model": error}) from error


# ------------------------------------------------------------------ checkpoints


def register_checkpoint(
    path, name: str | None = None, *, default: bool = False, run=None
) -> Checkpoint:
    """Makes a local Hugging Face folder known, or reads a known one again. run: the tuning run that
    made it. ValidationError({"path" or "name": ...}).
    """
    try:
        folder = Path(str(path)).expanduser().resolve()
        description, digest = describe(folder), fingerprint(folder)
    except CheckpointInvalid as error:
        raise ValidationError({"path": ValidationError(_reason(error), error.code)}) from error
    except (OSError, ValueError) as error:  # unreadable, a NUL in the path ...
        message = _("The folder cannot be read: %(reason)s") % {"reason": error}
        raise ValidationError({"path": ValidationError(message, "unreadable")}) from error
    if len(str(folder)) > Checkpoint._meta.get_field("path").max_length:
        raise ValidationError({"path": ValidationError(_("The path is too long."), "too_long")})
    known = Checkpoint.objects.filter(path=str(folder)).first()
    if known is not None and name not in (None, "", known.name):
        message = _("This folder is already registered as “%(name)s”.") % {"name": known.name}
        raise ValidationError({"path": ValidationError(message, "already_registered")})
    if known is None:
        try:
            name = check_name(name, 100) if name else free_name(folder.name, 100)
        except ValidationError as error:
            raise ValidationError({"name": error}) from error
        known = Checkpoint(name=name, path=str(folder))
    known.fingerprint, known.description = digest, description
    known.run = run or known.run
    try:
        return _saved(known, default or not Checkpoint.objects.filter(is_default=True).exists())
    except IntegrityError as error:  # somebody registered another under this name in between
        message = _("The name “%(name)s” is taken.") % {"name": known.name}
        raise ValidationError({"name": ValidationError(message, "name_taken")}) from error


@transaction.atomic
def _saved(checkpoint: Checkpoint, default: bool) -> Checkpoint:
    checkpoint.save()
    if default and not checkpoint.is_default:
        make_default(checkpoint)
    return checkpoint


@transaction.atomic
def make_default(checkpoint: Checkpoint, user=None) -> None:
    """The one that workers change over to, and that forms offer first (chat/serving.py)."""
    before = Checkpoint.objects.filter(is_default=True).exclude(pk=checkpoint.pk).first()
    Checkpoint.objects.filter(is_default=True).exclude(pk=checkpoint.pk).update(is_default=False)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(is_default=True)
    checkpoint.is_default = True
    if before is not None and checkpoint.path:
        ServingSwitch.record(checkpoint, before, before.precision, user)


@transaction.atomic
def remember_memory(checkpoint: Checkpoint, measured: dict) -> None:
    """Keeps what a load took, for the estimates of chat/checkpoints/memory.py."""
    row = Checkpoint.objects.select_for_update().filter(pk=checkpoint.pk).first()
    if row is not None:
        row.description = {**row.description, "measured": measured}
        row.save(update_fields=["description"])


def ensure_starter() -> Checkpoint | None:
    """The embedded starter model as a checkpoint; called at every start, so that it follows a moved
    or updated portal.
    """
    if not STARTER_FOLDER.is_dir():
        logger.warning("the starter model is missing: %s", STARTER_FOLDER)
        return None
    starter = Checkpoint.objects.filter(is_starter=True).first()
    if starter is None:
        starter = Checkpoint(is_starter=True, name=free_name(STARTER, 100))
    starter.path = str(STARTER_FOLDER)
    starter.fingerprint, starter.description = fingerprint(STARTER_FOLDER), describe(STARTER_FOLDER)
    return _saved(starter, not Checkpoint.objects.filter(is_default=True).exists())


def ensure_upstreams() -> list[Checkpoint]:
    """A checkpoint for every OpenAI-compatible server of PORTAL_UPSTREAMS: weights elsewhere, so no
    folder and no adapters.
    """
    found = []
    for upstream in settings.UPSTREAMS:
        remote = RemoteAddress.parse(upstream)
        described = {"upstream": remote.url, "architecture": remote.model}
        checkpoint, _new = Checkpoint.objects.get_or_create(
            name=remote.checkpoint, defaults={"description": described}
        )
        found.append(checkpoint)
    return found


def _reason(error: CheckpointInvalid) -> str:
    return sentence(UNUSABLE_CHECKPOINT, error.code, error.parameters) or error.message


# ------------------------------------------------------------------ adapters


def publish_adapter(
    prefix_folder, *, name: str, checkpoint, owner, run=None, step=None, shared: bool = False
) -> Adapter:
    """Takes over the folder that chat.engine.adapters.save wrote: it moves below
    DATA_DIR/adapters/<sha256>/ and gets a row.

    `name` gets a suffix when it is taken. Publishing the same content for the same run again gives
    the first row back, so a trainer that was killed after publishing may do it once more.
    ValidationError when the folder does not fit the checkpoint.
    """
    source = Path(prefix_folder)
    # moved by an attempt that was killed before it could tell
    if not source.exists() and run is not None:
        found = Adapter.objects.filter(run=run).order_by("-id").first()
        if found is not None:
            return found
    digest, pre_seq_len, metadata = _inspected(source, checkpoint)
    target = settings.DATA_DIR / "adapters" / digest
    if target.exists():
        if target.resolve() != source.resolve():
            shutil.rmtree(source)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)
    if run is not None:
        found = Adapter.objects.filter(run=run, sha256=digest).first()
        if found is not None:
            return found
    return _named(
        name,
        checkpoint=checkpoint,
        owner=owner,
        run_id=run.pk if run is not None else None,
        step=step,
        shared=shared,
        folder=str(target.relative_to(settings.DATA_DIR)),
        sha256=digest,
        pre_seq_len=pre_seq_len,
        with_history=metadata.get("with_history"),
    )


def _named(name: str, **fields) -> Adapter:
    for _attempt in range(5):
        try:
            with transaction.atomic():
                return Adapter.objects.create(name=free_name(name, 120), **fields)
        except IntegrityError:  # somebody took the name in between
            continue
    raise ValidationError(_("The name “%(name)s” is taken.") % {"name": name}, "name_taken")


def digest_of(folder: Path) -> str:
    """sha256 of an adapter folder's weights; OSError."""
    with open(folder / adapter_files.WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inspected(folder: Path, checkpoint) -> tuple[str, int, dict]:
    """(sha256 of the weights, pre_seq_len, metadata); ValidationError when this is no adapter of
    `checkpoint`.
    """
    try:
        description = json.loads((folder / adapter_files.DESCRIPTION).read_text(encoding="utf-8"))
        pre_seq_len, theirs = (
            int(description["pre_seq_len"]),
            str(description.get("checkpoint_fingerprint", "")),
        )
        metadata = dict(description.get("metadata") or {})
        if not isinstance(metadata.get("with_history"), bool):
            metadata["with_history"] = None
        digest = digest_of(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = _("%(folder)s does not hold an adapter: %(reason)s") % {
            "folder": folder,
            "reason": error,
        }
        raise ValidationError(message, "invalid_adapter") from error
    if theirs and theirs != checkpoint.fingerprint:
        message = _("The adapter was trained on the checkpoint %(its)s; “%(name)s” is %(chosen)s.")
        parameters = {
            "its": theirs[:12],
            "name": checkpoint.name,
            "chosen": checkpoint.fingerprint[:12],
        }
        raise ValidationError(message % parameters, "invalid_adapter")
    return digest, pre_seq_len, metadata


# Apps above say here what they use an adapter for, as a sentence, or None (AppConfig.ready).
USES_OF_ADAPTERS: list[Callable[[Adapter], str | None]] = []


# ... and why an adapter may not be shared with the team yet, as a sentence, or None.
BEFORE_SHARING: list[Callable[[Adapter], str | None]] = []


def check_may_be_shared(adapter: Adapter) -> None:
    """ValidationError with the reason when the team may not have it yet."""
    for why_not in BEFORE_SHARING:
        if message := why_not(adapter):
            raise ValidationError(message, "approval_needed")


def remove_adapter(adapter: Adapter) -> None:
    """Deletes the row, and the files once no other row has the same content. Conflict while a run
    is using it.
    """
    for use in USES_OF_ADAPTERS:
        if message := use(adapter):
            raise Conflict(message, "adapter_in_use")
    adapter.delete()
    _forget_files(adapter)


def remove_checkpoint(checkpoint: Checkpoint) -> None:
    """Deletes the row, its adapters and their files, not the checkpoint's own folder.
    ProtectedError: runs use it.
    """
    adapters = list(checkpoint.adapters.all())
    checkpoint.delete()
    for adapter in adapters:
        _forget_files(adapter)


def _forget_files(adapter: Adapter) -> None:
    if not Adapter.objects.filter(sha256=adapter.sha256).exists():
        shutil.rmtree(adapter.path, ignore_errors=True)
