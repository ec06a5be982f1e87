"""What a download will do, decided and checked once, when it is asked for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.checkpoints.fetch.catalogue import CATALOGUE, CatalogueModel
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.hub import endpoints_from_environment
from chat.checkpoints.fetch.sources import HubRepository, PackagedModel, Source, parse_source
from chat.models import Checkpoint, FetchRun, Hub
from chat.registry import check_name
from portal.models import Run
from portal.runs import lifecycle

MOST_ENDPOINTS = 10


def create_fetch(
    owner,
    source_text: str,
    *,
    name: str = "",
    default: bool = False,
    accept_licence: bool = False,
    in_queue: bool = True,
) -> tuple[FetchRun, bool]:
    """The run that fetches the source, and whether it is a new one: two who want the same thing
    watch the same run. ValidationError({"source", "name" or "accept_licence": ...}).
    """
    try:
        source = parse_source(source_text if isinstance(source_text, str) else "")
    except FetchFailed as failed:
        raise ValidationError({"source": ValidationError(worded(failed), failed.code)}) from failed
    if len(source.key) > 500:
        raise ValidationError({"source": ValidationError(_("The path is too long."), "too_long")})
    _check_terms(source, accept_licence)
    with transaction.atomic():
        running = FetchRun.objects.filter(source=source.key, status__in=Run.ACTIVE).first()
        if running is not None:
            return running, False
        _check_new(source, name)
        if name:
            try:
                name = check_name(name, 100)
            except ValidationError as error:
                raise ValidationError({"name": error}) from error
        run = FetchRun(
            owner=owner,
            kind=Run.Kind.FETCH,
            name=(name or source.name)[:120],
            source=source.key,
            recipe={
                "source": source.key,
                "name": name,
                "default": default,
                "accept_licence": accept_licence,
                "endpoints": endpoints(source.hub) if isinstance(source, HubRepository) else [],
            },
        )
        lifecycle.enqueue(run, ring_bell=in_queue)
    return run, True


def _check_terms(source: Source, accepted: bool) -> None:
    if isinstance(source, PackagedModel) and source.model.terms.must_accept and not accepted:
        terms = source.model.terms
        message = _("The terms “%(name)s” (%(url)s) must be accepted first.")
        problem = ValidationError(message % {"name": terms.name, "url": terms.url}, "terms")
        raise ValidationError({"accept_licence": problem})


def _check_new(source: Source, name: str) -> None:
    """A catalogue's model that is here already need not come again, unless under another name."""
    here = Checkpoint.objects.filter(description__source__source=source.key).first()
    if here is not None and not name:
        message = _("This is here already, as “%(name)s”. Give another name to fetch it once more.")
        problem = ValidationError(message % {"name": here.name}, "already_here")
        raise ValidationError({"source": problem})


def worded(failed: FetchFailed) -> str:
    """Why a source is refused, in the active language."""
    texts = {
        "source_missing": _("Say what is to be fetched."),
        "unknown_model": _(
            "“%(source)s” is not in the catalogue (%(known)s). A model of a hub is written "
            "hf:ORGANISATION/NAME or modelscope:ORGANISATION/NAME."
        ),
        "bad_repository": _("“%(source)s” is not written %(hub)s:ORGANISATION/NAME or …@REVISION."),
        "path_missing": _("%(path)s is neither a folder nor a file that can be read."),
        "unknown_file": _("%(file)s is neither a .gguf file nor a known archive."),
    }
    return texts[failed.code] % failed.parameters if failed.code in texts else failed.message


def catalogue() -> list[dict]:
    """The catalogue's models for people: each with the checkpoint and the run that are there."""
    here = {
        one.description.get("source", {}).get("source"): one
        for one in Checkpoint.objects.exclude(description__source=None)
    }
    runs = {run.source: run for run in FetchRun.objects.filter(status__in=Run.ACTIVE)}
    return [
        {
            "model": model,
            "checkpoint": here.get(model.name),
            "run": runs.get(model.name),
            "can": can(model),
            "cannot": cannot(model),
        }
        for model in CATALOGUE.values()
    ]


def can(model: CatalogueModel) -> str:
    texts = {
        "smollm2-135m-instruct": _(
            "Chats in English: short questions, small talk, rewording. A good first real model."
        ),
        "gemma-3-270m": _(
            "Goes on writing in many languages, Chinese among them. Made to be tuned on your rows."
        ),
    }
    return texts.get(model.name, "")


def cannot(model: CatalogueModel) -> str:
    texts = {
        "smollm2-135m-instruct": _(
            "Knows little, is often wrong about facts and numbers, and hardly speaks Chinese."
        ),
        "gemma-3-270m": _(
            "Does not follow a conversation before it is tuned: it is a base model without a chat "
            "form."
        ),
    }
    return texts.get(model.name, "")


# ------------------------------------------------------------------ endpoints


def endpoints(hub: str) -> list[str]:
    """The addresses that a hub's models are asked for at, in order."""
    row = Hub.objects.filter(name=hub).first()
    return list(row.endpoints) if row and row.endpoints else list(endpoints_from_environment()[hub])


def set_endpoints(hub: str, addresses: Sequence[str]) -> None:
    """ValidationError for what is no http address. None at all: back to the environment's."""
    kept = []
    for address in addresses:
        address = address.strip().rstrip("/")
        if not address:
            continue
        try:
            parts = urlsplit(address)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            good = False
        if not good or len(address) > 300:
            message = _("“%(address)s” is no http address.")
            raise ValidationError(message % {"address": address[:100]}, "no_address")
        kept.append(address)
    if len(kept) > MOST_ENDPOINTS:
        raise ValidationError(_("There may be at most %(most)s.") % {"most": MOST_ENDPOINTS})
    Hub.objects.update_or_create(name=hub, defaults={"endpoints": kept})
